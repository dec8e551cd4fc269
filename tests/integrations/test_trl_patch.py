"""The patch: what it changes and restores, the versions it accepts, what it scores, and what it leaves to TRL."""

import copy
import json
import types
from typing import NamedTuple

import pytest
import torch
import transformers
import trl
from counting import FlopCounter
from numerics import RUNS, Scaling, assert_close
from repository import ROOT, python
from tiny_trl import PlainHead, V, model
from trl.experimental.cpo import CPOTrainer
from trl.trainer import utils
from trl.trainer.base_trainer import _BaseTrainer

from fused_po import Schedule
from fused_po.integrations.trl import patch, patched, unpatch
from fused_po.integrations.trl.experimental import scoring_base
from fused_po.integrations.trl.scored_logits import ScoredLogits

HERE = {"PYTHONPATH": str(ROOT)}
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def names():
    """Everything that a patch may change."""
    owners = utils, _BaseTrainer, CPOTrainer
    return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}


@pytest.fixture(autouse=True)
def restored():
    before = names()
    yield
    unpatch()
    assert names() == before


def test_patch_and_restore():
    before = names()
    patch()
    changed = {name for name in names() if names()[name] is not before.get(name)}
    assert {name for _, name in changed} >= {"_ChunkedLogProbFunction", "concatenated_forward", "__init_subclass__"}
    once = names()
    patch()
    assert names() == once
    unpatch()
    assert names() == before
    unpatch()
    with patched():
        assert names() != before
        with patched(Schedule(logits_budget=0)):
            pass
        assert names() != before
    assert names() == before
    patch()
    with patched():
        pass
    assert names() != before


def fused(batch=3, length=7, **head):
    """(model with TRL's fused head, ids, labels with prompts and padding ignored)."""
    made = model(**head.pop("config", {}))
    utils.add_fused_lm_head(made, **head)
    ids = torch.randint(4, V, (batch, length))
    labels = ids.masked_fill(torch.rand(batch, length) < 0.4, -100)
    return made, ids, labels


def test_the_schedule_reaches_the_head(seed):
    """With a budget of 0 the backward projects once more."""
    made, ids, labels = fused()

    def flops():
        with FlopCounter() as count:
            made(ids, labels=labels, fused_lm_head=True).loss.backward()
        return count.flops

    unit = 2 * int((labels[:, 1:] != -100).sum()) * made.config.hidden_size * V
    with patched():
        kept = flops()
        with patched(Schedule(logits_budget=0)):
            assert flops() == kept + unit
        assert flops() == kept
    with pytest.raises(TypeError, match=r"schedule: got dict, expected a fused_po\.Schedule"):
        patch({})


# Inputs of TRL's head: the model, its settings, the scaling they mean, and the form of the labels.

TINY = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


class Case(NamedTuple):
    family: str = "Llama"
    config: dict = {}  # noqa: RUF012
    dtype: torch.dtype = torch.float32
    scaling: Scaling = Scaling()
    head: dict = {}  # noqa: RUF012
    bias: bool = False
    frozen: bool = False
    labels: str = "labels"
    ignored: float = 0.4


CASES = {
    "plain": Case(),
    "temperature": Case(scaling=Scaling(0.7), head={"temperature": 0.7}),
    "tied": Case(config={"tie_word_embeddings": True}),
    "shifted": Case(labels="shift_labels"),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16 in fp32": Case(dtype=torch.bfloat16, head={"cast_lm_head_to_fp32": True}),
    "bias": Case(bias=True),
    "frozen": Case(frozen=True),
    "all ignored": Case(ignored=1.1),
    "softcap": Case("Gemma2", dict(final_logit_softcapping=3.0, head_dim=8), scaling=Scaling(softcap=3.0)),
    "scale": Case("Cohere", dict(logit_scale=0.25), scaling=Scaling(logit_scale=0.25)),
    "divided": Case("Granite", dict(logits_scaling=2.0), scaling=Scaling(1.3, 0.5), head={"temperature": 1.3}),
}


def causal_lm(case: Case):
    """A tiny model with weights drawn in fp32."""
    torch.manual_seed(4)
    config = getattr(transformers, f"{case.family}Config")(**TINY | case.config)
    made = getattr(transformers, f"{case.family}ForCausalLM")(config)
    if case.bias:
        made.lm_head.bias = torch.nn.Parameter(torch.randn(V))
    made.lm_head.requires_grad_(not case.frozen)
    return made.to(case.dtype)


def scored(case: Case, ids, labels):
    """(statistics by name, gradients by name, the hidden states, the head)."""
    made, hidden = causal_lm(case), []

    def cut(module, args, out):
        hidden.append(out.last_hidden_state.detach().requires_grad_())
        out.last_hidden_state = hidden[0]

    made.base_model.register_forward_hook(cut)
    utils.add_fused_lm_head(made, outputs=FIELDS, **case.head)
    out = made(ids, fused_lm_head=True, **{case.labels: labels})
    values = {name: getattr(out, name) for name in FIELDS}
    return values, gradients(values, hidden[0], made.lm_head), hidden[0], made.lm_head


def gradients(values: dict, hidden, head) -> dict:
    """The gradients of a loss that weights log-probs and entropies unevenly."""
    n = values["log_probs"].numel()
    weigh = torch.linspace(0.5, 1.5, n, dtype=values["log_probs"].dtype).view(values["log_probs"].shape)
    parts = {"hidden": hidden, **{n: p for n, p in head.named_parameters() if p.requires_grad}}
    loss = ((values["log_probs"] + 0.3 * values["entropy"]) * weigh).sum()
    return dict(zip(parts, torch.autograd.grad(loss, list(parts.values()))))


def exactly(case: Case, hidden, head, labels):
    """The statistics and gradients in float64, from all logits."""
    hidden = hidden.detach().double().requires_grad_()
    head = copy.deepcopy(head).double()
    rows, labels = (hidden, labels) if case.labels == "shift_labels" else (hidden[:, :-1], labels[:, 1:])
    scaling = case.scaling
    flat = PlainHead.apply(
        rows.flatten(0, 1),
        head.weight,
        head.bias,
        labels.clamp(min=0).flatten(),
        scaling.temperature,
        None,
        scaling.softcap,
        scaling.logit_scale,
    )
    valid = labels != -100
    values = {name: torch.where(valid, value.view(labels.shape), 0) for name, value in zip(FIELDS, flat)}
    return values, gradients(values, hidden, head)


def gradient_of_bias_by_gemm(hidden, head, labels):
    """Plain PyTorch's gradient of a bias that is a column of the head, so that a GEMM sums it, as in our op."""
    ones = hidden.new_ones(*hidden.shape[:-1], 1)
    wide = torch.nn.Linear(hidden.shape[-1] + 1, V, bias=False)
    wide.weight = torch.nn.Parameter(torch.cat([head.weight, head.bias[:, None]], 1).detach())
    whole = torch.cat([hidden.detach(), ones], -1).requires_grad_()
    flat = PlainHead.apply(whole[:, :-1].flatten(0, 1), wide.weight, None, labels[:, 1:].clamp(min=0).flatten(), 1.0, 0)
    valid = labels[:, 1:] != -100
    values = {name: torch.where(valid, value.view(valid.shape), 0) for name, value in zip(FIELDS, flat)}
    return gradients(values, whole, wide)["weight"][:, -1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients_of_the_patched_head(case, seed):
    """The errors of all five outputs and the gradients are at most twice TRL's own."""
    runs = []
    drawn = torch.randint(4, V, (RUNS, 6, 30)), torch.rand(RUNS, 6, 30) < case.ignored  # `causal_lm` sets the seed
    for ids, ignored in zip(*drawn):
        labels = ids.masked_fill(ignored, -100)
        theirs = scored(case, ids, labels)
        with patched():
            ours = scored(case, ids, labels)
        runs.append((ours, theirs, exactly(case, *ours[2:], labels), labels))
    for ours, _, exact, _ in runs:
        assert torch.equal(ours[0].pop("is_top1").bool(), exact[0].pop("is_top1").bool())
        assert not ours[0]["mean_logits"].requires_grad and not ours[0]["log_sum_sq_probs"].requires_grad
        for kind in (0, 1):
            for name in exact[kind]:
                others = [(theirs[kind][name], truth[kind][name]) for _, theirs, truth, _ in runs]
                if name == "bias":
                    others += [
                        (gradient_of_bias_by_gemm(*theirs[2:], labels), truth[1][name])
                        for _, theirs, truth, labels in runs
                    ]
                assert_close(name, ours[kind][name], exact[kind][name], others)


def test_an_unknown_output_is_an_error():
    made, ids, labels = fused(outputs=("log_probs", "perplexity"))
    with patched(), pytest.raises(ValueError, match="outputs: got 'perplexity'"):
        made(ids, labels=labels, fused_lm_head=True)


def test_low_precision_hidden_states_with_a_wider_head(seed):
    """Hidden states of a lower precision than the head are multiplied in their own dtype, as in TRL."""
    hidden, weight = torch.randn(512, 16).bfloat16(), torch.randn(V, 16)
    targets = torch.randint(0, V, (512,))
    with patched():
        ours = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ())[0]
    exact = (hidden.double() @ weight.bfloat16().double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    theirs = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, V, None, 1.0, ())[0]
    assert_close("log_probs", ours, exact, [(theirs, exact)])


def test_other_devices_stay_with_trl():
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace(unwrap_model=lambda m: m))
    assert scoring_base(trainer, model().to("meta")) == (None, "the head is on meta, supported are cpu and cuda")
    with patched():
        assert utils._use_triton(torch.device("cpu")) and not utils._use_triton(torch.device("meta"))
        assert not utils._supports_trl_loss_kernel(torch.randn(2, V, device="meta"))


def test_zero_3_stays_with_trl(seed):
    hidden, targets = torch.randn(9, 16), torch.randint(0, V, (9,))
    weight = torch.nn.Parameter(torch.randn(V, 16))
    stock = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, V)
    weight.ds_id = 1
    with patched(), pytest.warns(UserWarning, match="ZeRO-3"):
        ours = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, V)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock))


# Functions of logits.


def test_materialised_logits(seed):
    logits, index = (torch.randn(3, 40, V) * 3).requires_grad_(), torch.randint(0, V, (3, 40))
    mask = torch.rand(3, 40) < 0.7
    z = logits.detach().double() / 0.8
    logp = z.log_softmax(-1)
    exact = [logp.gather(-1, index[..., None])[..., 0] * mask, -(logp.exp() * logp).sum(-1) * mask]
    wide = logits.detach() / 0.8
    plain = wide.log_softmax(-1)
    theirs = [plain.gather(-1, index[..., None])[..., 0] * mask, -(plain.exp() * plain).sum(-1) * mask]
    with patched():
        ours = utils.selective_log_softmax_and_entropy(logits, index, temperature=0.8, row_mask=mask)
        alone = utils.selective_log_softmax(logits, index, temperature=0.8, row_mask=mask)
        top = utils.selective_log_softmax(logits, index[..., None].expand(3, 40, 2))
        unmasked = utils.entropy_from_logits(logits)
    for name, *values in zip(("log_probs", "entropy"), ours, exact, theirs):
        assert_close(name, values[0], values[1], [(values[2], values[1])])
    assert torch.equal(alone, ours[0]) and not utils.selective_log_softmax(logits, index).equal(alone)
    assert top.shape == (3, 40, 2)  # more than one token per row: TRL's own code
    entropy = -(logits.double().log_softmax(-1).exp() * logits.double().log_softmax(-1)).sum(-1)
    plain = logits.log_softmax(-1)
    assert_close("entropy", unmasked, entropy, [(-(plain.exp() * plain).sum(-1), entropy)])


# Versions and imports.


@pytest.mark.parametrize(
    "version, tried", [("1.14.3", False), ("1.17.0", False), ("2.0.0.dev0", False), ("1.16.9", True)]
)
def test_versions(version, tried, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    if tried:
        return patch()
    before = names()
    with pytest.raises(RuntimeError, match=rf"got version {version}, tested are 1.15 .*pip install 'trl>=1.15,<1.17'"):
        patch()
    assert names() == before
    patch(any_version=True)


@pytest.mark.parametrize("owner, name", [(utils, "_ChunkedLogProbFunction"), (CPOTrainer, "concatenated_forward")])
def test_a_missing_function_is_an_error_and_changes_nothing(owner, name, monkeypatch):
    with monkeypatch.context() as lacking:
        lacking.delattr(owner, name)
        before = names()
        with pytest.raises(RuntimeError, match=f"has no .*{name}.*"):
            patch()
        assert names() == before


COLD = """
import json, sys
import fused_po.integrations.trl as ours
foreign = {"trl", "transformers", "accelerate", "peft", "datasets", "triton.compiler"} & set(sys.modules)
print(json.dumps(sorted(foreign)))
"""


def test_import_is_light(tmp_path):
    assert json.loads(python(COLD, tmp_path, HERE)) == []


def test_without_trl(tmp_path):
    code = "import sys; sys.modules['trl'] = None; from fused_po.integrations.trl import patch\ntry: patch()\n"
    code += "except ModuleNotFoundError as error: print(error)"
    assert "pip install 'trl>=1.15,<1.17'" in python(code, tmp_path, HERE)


ORDER = """
import warnings
warnings.simplefilter("ignore")
import fused_po.integrations.trl as ours
from trl.experimental.cpo import CPOTrainer as early
stock = early.concatenated_forward
ours.patch()
from trl.experimental.tpo import TPOTrainer as late
class Own(early): pass
print(early.concatenated_forward is not stock, Own.concatenated_forward is early.concatenated_forward)
print(hasattr(late._compute_loss, "__wrapped__"))
ours.unpatch()
from trl.experimental.orpo import ORPOTrainer as later
print(early.concatenated_forward is stock, hasattr(late._compute_loss, "__wrapped__"))
print(hasattr(later.concatenated_forward, "__wrapped__"))
"""


def test_trainers_imported_before_and_after(tmp_path):
    assert python(ORDER, tmp_path, HERE).split() == ["True", "True", "True", "True", "False", "False"]


# The stand-in for logits in trainers that work with logits.


def test_scored_logits_answer_or_raise():
    labels = torch.tensor([[4, -100, 6, 0]])
    rows = {"labels": labels, "log_probs": torch.tensor([[-1.0, 0.0, -3.0, -4.0]], requires_grad=True)}
    rows |= {"is_top1": torch.tensor([[True, False, False, True]]), "mean_logits": torch.arange(4.0)[None]}
    logits = ScoredLogits(V, {"entropy": None, **rows})
    assert logits.shape == (1, 4, V) and logits[:, 1:-1, :].shape == (1, 2, V) == logits[..., 1:3, :].shape
    assert logits[torch.tensor([[True, False, False, True]])].shape == (2, V)
    assert logits.view(-1, V).shape == (4, V) and [part.shape for part in logits.chunk(2, 1)] == [(1, 2, V)] * 2
    # the label's log-prob; 0 where it was not scored; 0 for TRL's placeholder token 0; NaN for any other token
    assert logits.log_probs(torch.tensor([[4, 7, 0, 5]])).nan_to_num(9).tolist() == [[-1.0, 0.0, 0.0, 9.0]]
    target = torch.tensor([4, -100, 6, -100])
    assert torch.nn.functional.cross_entropy(logits.view(-1, V), target).item() == 2
    assert torch.nn.functional.cross_entropy(logits.view(-1, V), torch.tensor([4, 5, 6, 0])).isnan()
    assert logits.argmax(-1).tolist() == [[4, -1, -1, 0]] and logits.mean() == 1.5
    picked = torch.take_along_dim(logits.log_softmax(-1), labels.clamp(min=0)[..., None], dim=2)
    assert picked.squeeze(-1).tolist() == [[-1.0, 0.0, -3.0, -4.0]]
    assert not logits.detach().log_probs(labels).requires_grad
    refused = [
        lambda: logits[..., :5],
        lambda: logits.view(2, 2 * V),
        lambda: logits.chunk(2, -1),
        lambda: logits.mean(1),
        lambda: logits.log_probs_and_entropy(labels, 0.5, None),
        lambda: torch.softmax(logits, -1),
        lambda: torch.logsumexp(logits, -1),
        lambda: torch.take_along_dim(logits, labels.clamp(min=0)[..., None], dim=2),
        lambda: torch.nn.functional.cross_entropy(logits.view(-1, V), target, label_smoothing=0.1),
        lambda: torch.nn.functional.cross_entropy(logits.view(-1, V), target, reduction="sum"),
        lambda: logits._row("entropy"),
    ]
    for ask in refused:
        with pytest.raises(TypeError, match=r"fused_po: .*unpatch\(\)"):
            ask()
