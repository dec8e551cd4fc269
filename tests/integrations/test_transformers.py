"""`fuse_lm_head` on tiny models of many architectures: outputs against float64 and the plain forward."""

import copy

import counting
import pytest
import torch
from numerics import IGNORE, assert_close, assert_error, nudge
from tiny_models import MODELS, V, batch, causal_lm, vision_model

import fused_po
from fused_po.integrations.heads import read_head
from fused_po.integrations.transformers import fuse_lm_head, unfuse_lm_head

STATS = ("logps", "entropy", "lse", "mean_logits", "is_top1", "log_sum_sq_probs")


def token_logps(model, inputs, labels):
    """The log-probs of the plain forward."""
    logits = model(**inputs).logits
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1)
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == IGNORE, 0, logps)


def run(model, batches, fused):
    """Loss, token log-probs and the gradients of all parameters, each over all batches."""
    results = {}
    for inputs, labels in batches:
        floats = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        model.zero_grad()
        out = model(**floats, labels=labels, **({"fused": True} if fused else {}))
        out.loss.backward()
        with torch.no_grad():
            logps = out.token_stats.logps if fused else token_logps(model, floats, labels)
        values = {"loss": out.loss[None], "logps": logps}
        values |= {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        for name, value in values.items():
            results.setdefault(name, []).append(value.detach().clone())
    return {name: torch.stack(values) for name, values in results.items()}


def check(model, batches, fuse=fuse_lm_head):
    """Compare the fused model with float64; the error of the plain forward bounds ours.

    A loss is a mean over tokens, so its error is bounded by that of the tokens. Gradients are compared all together,
    since the largest error of a few is random; each parameter's error is relative to its own size, or to 3% of the
    overall size if that is larger. The plain forward in fp32 runs with nudged weights too, since the error of one
    model is random.
    """
    exact, stock = run(copy.deepcopy(model).double(), batches, False), []
    for seed in range(4 if model.dtype == torch.float32 else 1):
        plain = copy.deepcopy(model)
        nudge(seed, plain)
        stock.append(run(plain, batches, False))
    ours = run(fuse(model), batches, True)
    assert ours.keys() == stock[0].keys() == exact.keys() and len(ours) > 5
    assert ours["loss"].dtype == ours["logps"].dtype == torch.float32
    theirs = {name: [(run[name].float(), exact[name].double()) for run in stock] for name in ("logps", "loss")}
    assert_close("logps", ours["logps"], exact["logps"].double(), theirs["logps"])
    errors = {name: torch.cat([(a - b).abs().flatten() for a, b in pairs]) for name, pairs in theirs.items()}
    largest = (ours["loss"] - exact["loss"].double()).abs().max().item()
    rounding = torch.finfo(torch.float32).eps / 2 * exact["loss"].max().item()
    assert_error("loss", largest, [*errors["loss"].tolist(), errors["logps"].max().item()], rounding)
    names = [n for n in exact if n not in theirs]
    sizes = {n: exact[n].square().mean().sqrt() for n in names}
    floor = 0.03 * torch.cat([exact[n].flatten() for n in names]).square().mean().sqrt()

    def gradients(results):
        return torch.cat([(results[n].double() / sizes[n].clamp(min=floor)).flatten() for n in names])

    for n in names:
        assert ours[n].dtype == stock[0][n].dtype
        if sizes[n] == 0:  # frozen, or not used
            assert (ours[n] == 0).all(), n
    wanted = gradients(exact)
    # In float64, so that the rounding of the results does not widen the bound.
    assert_close("gradients", gradients(ours), wanted, [(gradients(run), wanted) for run in stock])


def batches_of(n=6, seed=0, **more):
    return [
        ({"input_ids": ids, "attention_mask": (ids >= 0).long()} | more, labels)
        for ids, labels in map(batch, range(seed, seed + n))
    ]


@pytest.mark.parametrize("name", MODELS)
def test_against_float64(name, seed):
    model = causal_lm(name, seed)
    check(model, batches_of(seed=seed))
    assert model._fused_po.processing == MODELS[name][1]


@pytest.mark.parametrize("name", ("Llama", "Gemma2", "Qwen3Moe"))
def test_bf16(name, seed):
    check(causal_lm(name, seed).bfloat16(), batches_of(seed=seed))


@pytest.mark.parametrize("name", ("Llava", "Qwen2VL"))
def test_vision_language(name, seed):
    model, more, image = vision_model(name, seed)
    batches = batches_of(seed=seed, **more)
    for inputs, _ in batches:
        inputs["input_ids"][:, 1:5] = image
    check(model, batches)


def test_the_logits_need_their_scaling():
    """The logits of the models above are large enough that a missing scale or softcap changes the results."""
    for name, (_, (scale, cap)) in MODELS.items():
        model = causal_lm(name)
        (inputs, labels), processing = batches_of(1)[0], (scale, cap)
        raw = []
        model.get_output_embeddings().register_forward_hook(lambda head, args, out, raw=raw: raw.append(out))
        plain = token_logps(model, inputs, labels)
        unprocessed = raw[0].log_softmax(-1).gather(-1, inputs["input_ids"].roll(-1, 1)[..., None])[..., 0]
        scored = plain != 0
        assert ((plain - unprocessed)[scored].abs().max() > 1e-2) == (processing != (1.0, None)), name


def test_no_logits_are_computed():
    """No operator in forward and backward returns as many elements as the logits; in the plain forward one does."""
    model = causal_lm("Llama")
    ids, labels = batch(0, rows=8, length=40)
    fuse_lm_head(model, schedule=fused_po.Schedule(tile_bytes=4 * V * 16, logits_budget=4 * V * 16))
    largest = {}
    for fused in (False, True):
        with counting.LargestTensor() as seen:
            model(ids, labels=labels, fused=fused).loss.backward()
        largest[fused] = seen.elements
    assert largest[False] >= ids.numel() * V > 2 * largest[True]


def test_calls_that_are_not_fused_are_unchanged():
    model, (ids, labels) = causal_lm("Gemma2"), batch(0)
    before = model(ids, labels=labels, num_items_in_batch=7), model.generate(ids, max_new_tokens=4, do_sample=False)
    fuse_lm_head(model)
    after = model(ids, labels=labels, num_items_in_batch=7), model.generate(ids, max_new_tokens=4, do_sample=False)
    assert before[0].keys() == after[0].keys() and torch.equal(before[1], after[1])
    assert torch.equal(before[0].loss, after[0].loss) and torch.equal(before[0].logits, after[0].logits)
    assert "token_stats" not in after[0]
    unfuse_lm_head(model)
    assert not {"forward", "_loss_function", "_fused_po"} & set(vars(model)) and not model.lm_head._forward_pre_hooks
    with pytest.raises(ValueError, match="model: it is not fused"):
        unfuse_lm_head(model)


def test_the_output():
    """The output holds what was asked for and what the model itself returns, and nothing else."""
    model, (ids, labels) = fuse_lm_head(causal_lm("Llama")), batch(0)
    out = model(ids, labels=labels, fused=True, outputs=STATS, temperature=0.7, output_hidden_states=True)
    assert out.logits is None and set(out.keys()) == {"loss", "past_key_values", "hidden_states", "token_stats"}
    assert len(out.hidden_states) == 3 and isinstance(out, type(model(ids, labels=labels)))
    logits = model(ids).logits
    aligned = fused_po.shift_labels(labels)
    expected = fused_po.logps_from_logits(logits, aligned, temperature=0.7, outputs=STATS)
    for name, got, value in zip(STATS, out.token_stats, expected):
        assert got.shape == labels.shape
        torch.testing.assert_close(got, value, rtol=2e-5, atol=2e-5, msg=name)
    torch.testing.assert_close(out.loss, -expected.logps.sum() / (aligned != IGNORE).sum())
    (out.loss + out.token_stats.entropy.sum()).backward()
    assert model(ids, labels=labels, fused=True).token_stats[1:] == (None,) * 5


@pytest.mark.parametrize("name", ("Llama", "GPT2", "Qwen3Moe"))
def test_the_loss_follows_trainers_arguments(name):
    """num_items_in_batch, aligned labels and another ignore_index work as in the plain forward."""
    plain, model, (ids, labels) = causal_lm(name), fuse_lm_head(causal_lm(name)), batch(0)
    aligned = fused_po.shift_labels(labels)
    cases = [dict(labels=labels, num_items_in_batch=n) for n in (5, torch.tensor(9), 2.5)]
    cases += [
        dict(labels=labels, shift_labels=aligned),
        dict(labels=labels, shift_labels=aligned, num_items_in_batch=4),
    ]
    for case in cases:
        torch.testing.assert_close(model(ids, **case, fused=True).loss, plain(ids, **case).loss, rtol=1e-5, atol=1e-6)
    alone = model(ids, shift_labels=aligned, fused=True)
    assert torch.equal(alone.token_stats.logps, model(ids, labels=labels, fused=True).token_stats.logps)
    other = labels.masked_fill(labels == IGNORE, 0)
    a, b = (m(ids, labels=other, ignore_index=0, **how).loss for m, how in ((model, {"fused": True}), (plain, {})))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "count", (None, 0, 0.0, torch.tensor(0), torch.tensor(0.0), torch.tensor([0])), ids=lambda c: str(c)
)
def test_nothing_scored_is_a_differentiable_zero(count):
    """Trainer counts 0 tokens in a step where everything is masked."""
    model, (ids, labels) = fuse_lm_head(causal_lm("Llama")), batch(0)
    for how in ({"fused": True}, {"fused": True, "outputs": ("entropy",), "temperature": 0.7}):
        model.zero_grad()
        out = model(ids, labels=torch.full_like(labels, IGNORE), num_items_in_batch=count, **how)
        out.loss.sum().backward()
        assert (out.loss == 0).all() and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
        assert model.lm_head.weight.grad is not None


def test_always_mode_and_copies():
    model, (ids, labels) = fuse_lm_head(causal_lm("Llama"), always=True), batch(0)
    assert "token_stats" in model(ids, labels=labels) and "token_stats" not in model(ids)
    assert model(ids, labels=labels, fused=False).logits is not None
    model.train().model.layers[0].eval()
    fuse_lm_head(model, always=True)
    assert model.training and model.model.layers[1].mlp.training and not model.model.layers[0].training
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    a, b = model(ids, labels=labels), twin(ids, labels=labels)
    torch.testing.assert_close(b.loss, unfuse_lm_head(twin)(ids, labels=labels).loss)
    assert torch.equal(a.loss, model(ids, labels=labels).loss) and a.loss != b.loss


def test_errors():
    model, (ids, labels) = fuse_lm_head(causal_lm("Llama")), batch(0)
    calls = {
        "labels: got None, but fused=True needs them": dict(fused=True),
        r"outputs: got \('entropy',\), used only with fused=True": dict(labels=labels, outputs=("entropy",)),
        "temperature: got 2.0, used only with fused=True": dict(labels=labels, temperature=2.0),
        "temperature: got 0.0, allowed are finite": dict(labels=labels, fused=True, temperature=0.0),
        "did you mean 'entropy'": dict(labels=labels, fused=True, outputs=("entropi",)),
        "return_dict: got False": dict(labels=labels, fused=True, return_dict=False),
        "do not use logits_to_keep in fused calls": dict(labels=labels, fused=True, logits_to_keep=3),
    }
    for match, case in calls.items():
        with pytest.raises((TypeError, ValueError), match=match):
            model(ids, **case)
    assert "token_stats" in model(ids, labels=labels, fused=True), "an error must leave nothing behind"
    with pytest.raises(TypeError, match="model: got Linear, expected a transformers model"):
        fuse_lm_head(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"softcap: got 3\.0, used only with logit_scale"):
        fuse_lm_head(causal_lm("Llama"), softcap=3.0)
    replicate = "_replicate_for_data_parallel"  # nn.DataParallel calls this on each module, for each GPU
    with pytest.raises(
        TypeError, match=r"model: nn\.DataParallel cannot copy a fused model; start one process per GPU"
    ):
        getattr(model, replicate)()
    assert getattr(unfuse_lm_head(model), replicate)()._is_replica


def strange(change):
    """A Llama whose class changes hidden states or logits in its own way."""
    kind = type(causal_lm("Llama"))

    class Strange(kind):
        forward = change(kind.forward)

    model = causal_lm("Llama")
    model.__class__ = Strange
    return model


def after_the_head(how):
    """Changes the logits a plain forward returns."""

    def change(stock):
        def forward(self, *args, **kwargs):
            out = stock(self, *args, **kwargs)
            out.logits = how(out.logits)
            return out

        return forward

    return change


def test_a_head_whose_weight_is_sharded_by_zero_3():
    """ZeRO-3 keeps an empty parameter with a ds_id outside the forward of its module."""
    head = torch.nn.Linear(4, 5)
    head.weight = torch.nn.Parameter(torch.empty(0))
    head.weight.ds_id = 0
    with pytest.raises(TypeError, match=r"lm_head: its parameters are sharded"):
        read_head(head, torch.zeros(1, 4))


class OtherHead(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.relu())


@pytest.mark.parametrize(
    "what", ("mask", "offset", "power", "negative", "no hook", "head", "no Linear", "instance", "loss")
)
def test_models_with_other_processing_are_refused(what):
    def unhooked(stock):
        def forward(self, input_ids, labels=None, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.T)

        return forward

    import transformers

    mask = torch.zeros(V).index_fill_(0, torch.arange(3), -1e9)
    changes = {"mask": lambda z: z + mask, "offset": lambda z: z + 0.1, "power": lambda z: z.sign() * z.abs() ** 1.1}
    changes["negative"] = lambda z: -z
    if what in changes:
        model = strange(after_the_head(changes[what]))
    elif what == "no hook":
        model = strange(unhooked)
    else:
        model = causal_lm("Llama")
    if what == "head":
        model.lm_head = OtherHead(32, V, bias=False)
    elif what == "no Linear":
        model.lm_head = torch.nn.Identity()
    elif what == "instance":  # looks like a Linear but is not one
        model.lm_head.forward = lambda x: torch.nn.functional.linear(x.relu(), model.lm_head.weight)
    elif what == "loss":
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    before = set(vars(model))
    with pytest.raises(TypeError, match=r"model: |lm_head: "):
        fuse_lm_head(model)
    assert set(vars(model)) == before, "a refused model must not change"


def test_a_model_that_cannot_run_yet_raises_with_the_reason():
    with torch.device("meta"):
        model = causal_lm("Llama")
    with pytest.raises(ValueError, match="logit_scale"):
        fuse_lm_head(model)
    fuse_lm_head(model, logit_scale=1.0)
    model = model.to_empty(device="cpu")
    source = causal_lm("Llama")
    model.load_state_dict(source.state_dict())
    model.model.rotary_emb = source.model.rotary_emb
    ids, labels = batch(0)
    torch.testing.assert_close(model(ids, labels=labels, fused=True).loss, source(ids, labels=labels).loss)
