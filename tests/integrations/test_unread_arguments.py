"""Functions named as Liger's and OpenRLHF's take their arguments; an argument that a loss does not read warns once."""

import inspect
import pickle
import warnings

import pytest
import torch

from fused_po import modules
from fused_po.integrations import liger, openrlhf, unread
from fused_po.modules import liger_grpo
from fused_po.modules.liger import DPO_LOSSES

B, T, H, V = 4, 6, 8, 30


@pytest.fixture(autouse=True)
def fresh():
    unread._warned.clear()
    yield
    unread._warned.clear()


def collected(function):
    """(result, the arguments named in warnings)."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = function()
    texts = [str(w.message) for w in seen if "has no effect here, it is used only with" in str(w.message)]
    return result, sorted(text.split(": ")[1].split(" has no effect")[0] for text in texts)


def grpo_batch():
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H)
    mask = (torch.arange(T) < torch.tensor([[6], [3], [5], [1]])).long()
    logps = -torch.rand(B, T)
    return dict(
        _input=hidden,
        lin_weight=weight,
        selected_token_ids=torch.randint(0, V, (B, T)),
        attention_mask=mask,
        advantages=torch.randn(B),
        old_per_token_logps=logps,
        ref_per_token_logps=logps,
    )


UNREAD = {
    "dapo": ["max_completion_length"],
    "grpo": ["max_completion_length"],
    "bnpo": ["max_completion_length"],
    "dr_grpo": [],
    "luspo": ["max_completion_length"],
    "cispo": ["delta", "epsilon_low", "max_completion_length"],
    "sapo": ["delta", "epsilon_high", "epsilon_low", "max_completion_length"],
    "vespo": ["delta", "epsilon_high", "epsilon_low", "max_completion_length"],
}


@pytest.mark.parametrize("loss_type", liger_grpo.LOSSES)
def test_grpo_called_as_by_swift(loss_type, seed):
    """All settings for any loss_type; the result depends only on the settings that the loss reads."""
    how = dict(beta=0.04, epsilon_low=0.1, epsilon_high=0.3, delta=2.0, temperature=0.9, max_completion_length=77)
    module, warned = collected(lambda: liger.LigerFusedLinearGRPOLoss(loss_type=loss_type, use_ref_model=True, **how))
    assert warned == UNREAD[loss_type]
    read = {n: v for n, v in how.items() if n not in warned}
    batch, results = grpo_batch(), []
    for each in (module, modules.FusedLinearGRPOLoss(loss_type=loss_type, **read)):
        loss, aux = each(**batch)
        results.append((loss, *aux, *torch.autograd.grad(loss, batch["_input"])))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    _, warned = collected(lambda: liger.LigerFusedLinearGRPOLoss(loss_type=loss_type, **how))
    assert not warned, "a warning is given once per process"


@pytest.mark.parametrize("loss_type", liger_grpo.LOSSES)
def test_grpo_num_items_in_batch(loss_type, seed):
    batch, module = grpo_batch(), liger.LigerFusedLinearGRPOLoss(beta=0.0, loss_type=loss_type, max_completion_length=9)
    (with_count, _), warned = collected(lambda: module(**batch, num_items_in_batch=torch.tensor(60)))
    read = loss_type in liger_grpo.STEP_MEANS
    assert warned == ([] if read else ["num_items_in_batch"])
    assert torch.equal(with_count, module(**batch)[0]) != read


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_dpo(loss_type, seed):
    hidden, weight, target = torch.randn(B, T, H), torch.randn(V, H), torch.randint(0, V, (B, T))
    how = dict(beta=0.3, label_smoothing=0.1, discopop_tau=0.2)
    module, warned = collected(lambda: liger.LigerFusedLinearDPOLoss(loss_type=loss_type, use_ref_model=False, **how))
    smooths = loss_type in ("sigmoid", "robust", "exo_pair")
    expected = [] if loss_type == "discopop" else ["discopop_tau"]
    assert warned == expected + ([] if smooths else ["label_smoothing"])
    read = {n: v for n, v in how.items() if n not in warned}
    strict = modules.FusedLinearDPOLoss(loss_type=loss_type, use_ref_model=False, **read)
    assert torch.equal(module(weight, hidden, target)[0], strict(weight, hidden, target)[0])


def test_orpo(seed):
    hidden, weight, target = torch.randn(B, T, H), torch.randn(V, H), torch.randint(0, V, (B, T))
    module = liger.LigerFusedLinearORPOLoss(compute_nll_loss=False)
    (loss, _), warned = collected(lambda: module(weight, hidden, target, None, target))
    assert warned == ["nll_target"] and torch.equal(loss, module(weight, hidden, target)[0])


ORDERS = {
    "CPO": "ignore_index beta alpha label_smoothing compute_nll_loss compiled average_log_prob chunk_size",
    "DPO": "ignore_index beta alpha compute_nll_loss compiled use_ref_model average_log_prob chunk_size loss_type "
    "label_smoothing discopop_tau",
    "GRPO": "beta compiled use_ref_model chunk_size epsilon_low epsilon_high loss_type max_completion_length "
    "importance_sampling_level sapo_temperature_pos sapo_temperature_neg temperature delta use_bias_correction_kl "
    "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
    "KTO": "ignore_index beta compiled use_ref_model average_log_prob chunk_size desirable_weight undesirable_weight",
    "ORPO": "ignore_index beta compute_nll_loss compiled chunk_size",
    "SimPO": "ignore_index beta alpha label_smoothing compute_nll_loss compiled gamma chunk_size",
}


@pytest.mark.parametrize("name", ORDERS)
def test_ligers_order(name):
    """The order of arguments is that of Liger 0.8.5, also for positional calls."""
    cls, ours = getattr(liger, f"LigerFusedLinear{name}Loss"), getattr(modules, f"FusedLinear{name}Loss")
    found = inspect.signature(cls).parameters
    assert " ".join(found) == ORDERS[name]
    defaults = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
    assert {n: p.default for n, p in found.items()} == defaults | {"compiled": None, "chunk_size": None}
    with pytest.warns(UserWarning, match="compiled=False has no effect"):
        place = list(found).index("compiled")
        module = cls(*[p.default for p in list(found.values())[:place]], False)
    assert type(pickle.loads(pickle.dumps(module))) is cls
    with pytest.raises(TypeError):
        cls(*[None] * (len(found) + 1))


WRONG = [
    (lambda: liger.LigerFusedLinearGRPOLoss(loss_type="grpa"), ValueError, "loss_type: got 'grpa'"),
    (lambda: liger.LigerFusedLinearGRPOLoss(loss_type="dr_grpo"), ValueError, "max_completion_length: got None"),
    (lambda: liger.LigerFusedLinearGRPOLoss(epsilon_low=-1.0), ValueError, "epsilon_low: got -1.0"),
    (lambda: liger.LigerFusedLinearGRPOLoss(epsilon=0.1), TypeError, "unexpected keyword argument 'epsilon'"),
    (
        lambda: liger.LigerFusedLinearGRPOLoss(loss_type="vespo", importance_sampling_level="sequence"),
        ValueError,
        "importance_sampling_level: got sequence",
    ),
    (lambda: liger.LigerFusedLinearDPOLoss(loss_type="ipo"), ValueError, "loss_type: got 'ipo'"),
    (lambda: openrlhf.PolicyLoss(policy_loss_type="ppa"), ValueError, "policy_loss_type: got 'ppa'"),
    (lambda: openrlhf.DPOLoss(), TypeError, "missing a required argument: 'beta'"),
    (lambda: openrlhf.DPOLoss(-1.0), ValueError, "beta: got -1.0"),
]


@pytest.mark.parametrize("call, error, match", WRONG, ids=[w[2] for w in WRONG])
def test_arguments_that_are_read_are_checked(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("loss_type", ("cispo", "sapo"))
def test_ratios_of_sequences(loss_type, seed):
    """Liger refuses ratios of sequences. Ours follow TRL: all tokens of an answer have its geometric mean ratio."""
    batch = grpo_batch()
    module = liger.LigerFusedLinearGRPOLoss(0.0, loss_type=loss_type, importance_sampling_level="sequence")
    got = module(**batch)[0]
    mask = batch["attention_mask"].bool()
    logits = (batch["_input"] @ batch["lin_weight"].T).double()
    logps = logits.log_softmax(-1).gather(-1, batch["selected_token_ids"][..., None])[..., 0]
    ratio = torch.where(mask, logps - batch["old_per_token_logps"], 0).sum(-1, keepdim=True) / mask.sum(-1, True)
    ratio, gain = ratio.exp(), batch["advantages"][:, None].double()
    if loss_type == "cispo":
        tokens = -ratio.clamp(max=0.2).detach() * gain * logps
    else:
        temperature = torch.where(gain > 0, 1.0, 1.05)
        tokens = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * gain
    # cispo is a mean over the step's tokens; sapo is a mean over answers of means over tokens
    tokens = torch.where(mask, tokens, 0)
    means = {"cispo": tokens.sum() / mask.sum(), "sapo": (tokens.sum(-1) / mask.sum(-1)).mean()}
    torch.testing.assert_close(got.double(), means[loss_type], rtol=1e-5, atol=1e-6)


POLICY = [
    {"is_correction_gating": "tv"},
    {"is_correction_mode": "clip"},
    {"is_correction_threshold": (-1.0, 0.1)},
    {"policy_loss_type": "gspo", "is_correction_level": "seq", "is_correction_gating": "binary_kl"},
]


@pytest.mark.parametrize("how", POLICY, ids=lambda how: "-".join(how))
def test_policy_loss(how, seed):
    """A correction that is off, and that of gspo, read neither mode nor gating nor threshold."""
    module, warned = collected(lambda: openrlhf.PolicyLoss(**how))
    assert warned == sorted(set(how) - {"policy_loss_type", "is_correction_level"})
    strict = modules.PolicyLoss(**{n: v for n, v in how.items() if n not in warned})
    logps = -torch.rand(3, B, T)
    args = (*logps[:2], torch.randn(B, T), None, logps[2])
    assert torch.equal(module(*args)[0], strict(*args)[0])


@pytest.mark.parametrize("token_level", (True, False))
@pytest.mark.parametrize("name", ("PolicyLoss", "SFTLoss", "ValueLoss"))
def test_unused_counts(name, token_level, seed):
    """As in OpenRLHF: without its count a loss uses that of the batch; the other count and dp_size change nothing."""
    module = getattr(openrlhf, name)(token_level_loss=token_level)
    values = torch.rand(2, B, T) - 1
    args = (values[0], torch.ones(B, T)) if name == "SFTLoss" else (*values, torch.randn(B, T), torch.ones(B, T))
    read, other = ("batch_num_tokens", "global_batch_size")[:: 1 if token_level else -1]

    def loss(**counts):
        result = module(*args, **counts)
        return result[0] if isinstance(result, tuple) else result

    plain = loss()
    got, warned = collected(lambda: loss(dp_size=2, **{other: 9.0}))
    assert warned == sorted(["dp_size", other]) and torch.equal(got, plain)
    got, warned = collected(lambda: loss(dp_size=2, **{read: 30.0, other: 9.0}))
    assert not warned and not torch.equal(got, plain)


def test_the_other_losses(seed):
    rewards = torch.randn(2, B)
    module, warned = collected(lambda: openrlhf.DPOLoss(0.3, 0.1, True))
    assert warned == ["label_smoothing"]
    assert torch.equal(module(*rewards, *rewards)[0], modules.DPOLoss(0.3, ipo=True)(*rewards, *rewards)[0])
    got, warned = collected(lambda: openrlhf.LogExpLoss()(*rewards, torch.rand(B)))
    assert warned == ["margin"] and torch.equal(got, modules.LogExpLoss()(*rewards))
    for name, cls in openrlhf.LOSSES.items():
        if "__init__" in vars(getattr(modules, name)):
            assert inspect.signature(cls) == inspect.signature(getattr(modules, name))
        assert cls.__name__ == name and issubclass(cls, getattr(modules, name))


def test_modules_stay_strict():
    """In fused_po.modules an argument that nothing reads is an error."""
    with pytest.raises(ValueError, match="max_completion_length: got 3"):
        modules.FusedLinearGRPOLoss(max_completion_length=3)
    with pytest.raises(ValueError, match=r"label_smoothing: got 0\.1"):
        modules.DPOLoss(0.1, 0.1, True)
