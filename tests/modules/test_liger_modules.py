"""The modules with Liger's signatures against log_softmax of full logits and independent formulas."""

import pytest
import torch
from liger_batches import GRPO, GRPO_IDS, IGNORE, Answers, B, Batch, T, V, compare, grpo_arguments
from torch.nn.functional import logsigmoid

from fused_po import losses, modules


@pytest.fixture(autouse=True)
def float64():
    """Random tensors are float64, so that modules and formulas agree closely."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def logistic(x):
    return -logsigmoid(x).mean()


def pair_oracle(batch, leaves, contrast, average, nll_target=None, alpha=None, ref=(0.0, 0.0), beta=0.3):
    """(loss, aux) of a pairwise loss; contrast(chosen, rejected) returns a number."""
    hidden, weight, *bias = leaves
    chosen, rejected = batch.sequences(hidden, weight, *bias, average=average).chunk(2)
    means = batch.logits_mean(slice(0, B)), batch.logits_mean(slice(B, 2 * B))
    loss, nll = contrast(chosen, rejected), torch.zeros(())
    if alpha is not None:
        labels = batch.target if nll_target is None else nll_target
        tokens = batch.tokens(hidden, weight, *bias, target=labels)[:B]
        nll = -tokens.sum() / (labels[:B] != IGNORE).sum()
        loss = loss + alpha * nll
    rewards = beta * (chosen - ref[0]), beta * (rejected - ref[1])
    return loss, (chosen, rejected, *means, nll, *rewards)


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("nll", (False, True))
@pytest.mark.parametrize("use_ref", (False, True))
def test_fused_linear_dpo(average, nll, use_ref, seed):
    batch = Batch()
    how = dict(beta=0.3, alpha=0.7, compute_nll_loss=nll, use_ref_model=use_ref, average_log_prob=average)
    ours, theirs = batch.leaves(), batch.leaves()
    hidden, weight, bias = ours
    result = modules.FusedLinearDPOLoss(**how)(weight, hidden, batch.target, bias, *batch.reference())
    ref = batch.sequences(*batch.reference(), average).chunk(2) if use_ref else (0.0, 0.0)

    def contrast(chosen, rejected):
        return logistic(0.3 * (chosen - ref[0] - rejected + ref[1]))

    expected = pair_oracle(batch, theirs, contrast, average, alpha=0.7 if nll else None, ref=ref)
    assert not any(reward.requires_grad for reward in result[1][5:])
    compare(result, expected, (ours, theirs))


@pytest.mark.parametrize("loss_type", modules.liger.DPO_LOSSES)
def test_fused_linear_dpo_by_name(loss_type, seed):
    """Each name gives `losses.preference_loss` of that name, of the sequences' log-probs."""
    batch = Batch(scale=0.3)
    smoothing = 0.1 if loss_type in ("sigmoid", "robust", "exo_pair") else 0.0
    how = dict(beta=0.3, loss_type=loss_type, label_smoothing=smoothing)
    ours, theirs = batch.leaves(), batch.leaves()
    loss, _ = modules.FusedLinearDPOLoss(**how)(ours[1], ours[0], batch.target, ours[2], *batch.reference())
    pairs = *batch.sequences(*theirs).chunk(2), *batch.sequences(*batch.reference()).chunk(2)
    compare((loss, ()), (losses.preference_loss(*pairs, **how).mean(), ()), (ours, theirs))


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("nll", (False, True))
def test_fused_linear_cpo(average, nll, seed):
    batch = Batch()
    ours, theirs = batch.leaves(), batch.leaves()
    module = modules.FusedLinearCPOLoss(IGNORE, 0.3, 0.7, 0.1, nll, average_log_prob=average)
    result = module(ours[1], ours[0], batch.target, ours[2])

    def contrast(chosen, rejected):
        return 0.9 * logistic(0.3 * (chosen - rejected)) + 0.1 * logistic(0.3 * (rejected - chosen))

    compare(result, pair_oracle(batch, theirs, contrast, average, alpha=0.7 if nll else None), (ours, theirs))


@pytest.mark.parametrize("nll", (False, True))
def test_fused_linear_simpo(nll, seed):
    batch = Batch(bias=False)
    ours, theirs = batch.leaves(), batch.leaves()
    result = modules.FusedLinearSimPOLoss(IGNORE, 0.3, 0.7, 0.1, nll, gamma=0.2)(ours[1], ours[0], batch.target)

    def contrast(chosen, rejected):
        h = 0.3 * (chosen - rejected) - 0.2
        return 0.9 * logistic(h) + 0.1 * logistic(-h)

    compare(result, pair_oracle(batch, theirs, contrast, True, alpha=0.7 if nll else None), (ours, theirs))


@pytest.mark.parametrize("nll", (False, True, "other labels"))
def test_fused_linear_orpo(nll, seed):
    batch = Batch()
    ours, theirs = batch.leaves(), batch.leaves()
    labels = torch.randint(0, V, (2 * B, T)) if nll == "other labels" else None
    result = modules.FusedLinearORPOLoss(beta=0.3, compute_nll_loss=bool(nll))(
        ours[1], ours[0], batch.target, ours[2], labels
    )
    odds = []

    def contrast(chosen, rejected):
        logits = [torch.log(v.exp() / (1 - v.exp())) for v in (chosen, rejected)]
        odds.append(logits[0] - logits[1])
        return 0.3 * logistic(odds[0])

    loss, aux = pair_oracle(batch, theirs, contrast, True, labels, alpha=1.0 if nll else None)
    compare(result, (loss, (*aux, -logistic(odds[0]), odds[0].mean())), (ours, theirs))


@pytest.mark.parametrize("use_ref", (False, True))
@pytest.mark.parametrize("average", (False, True))
@pytest.mark.parametrize("kl", (None, 0.4))
def test_fused_linear_kto(use_ref, average, kl, seed):
    batch = Batch(5)
    good = torch.tensor([True, False, False, True, True])
    ours, theirs = batch.leaves(), batch.leaves()
    module = modules.FusedLinearKTOLoss(
        beta=0.3, use_ref_model=use_ref, average_log_prob=average, desirable_weight=2.0, undesirable_weight=0.5
    )
    z0 = None if kl is None else torch.tensor(kl)
    result = module(*ours[:2], batch.target, ours[2], good, *batch.reference(), kl=z0)
    logps = batch.sequences(*theirs, average)
    ratio = logps - (batch.sequences(*batch.reference(), average) if use_ref else 0)
    value = torch.sigmoid(0.3 * (ratio - (kl or 0.0)) * torch.where(good, 1, -1))
    loss = ((1 - value) * torch.where(good, 2.0, 0.5)).mean()
    logits = (batch.hidden @ batch.weight.T + batch.bias).sum(-1)
    sums = [v[side].sum() for v in (logps, logits.sum(-1), 0.3 * ratio) for side in (good, ~good)]
    assert not any(reward.requires_grad for reward in result[1][4:])
    compare(result, (loss, tuple(sums)), (ours, theirs))


grpo = modules.FusedLinearGRPOLoss


def grpo_oracle(name, batch, leaves, how, weights):
    """(loss, metrics), written out."""
    how = dict(beta=0.04, epsilon_low=0.2, epsilon_high=0.2) | how
    logps = batch.tokens(*leaves, temperature=how.get("temperature", 1.0))
    mask, count = batch.mask.to(batch.hidden), batch.mask.sum()
    delta = (logps - batch.old) * mask
    gain = batch.advantages[:, None].expand(4, T)
    if how.get("importance_sampling_level") == "sequence":
        delta = (delta.sum(-1) / mask.sum(-1))[:, None].expand(4, T)
    ratio, low, high = delta.exp(), 1 - how["epsilon_low"], 1 + how["epsilon_high"]
    clipped = ((ratio < low) & (gain < 0)) | ((ratio > high) & (gain > 0))
    if name == "cispo":
        clipped = (ratio > how["epsilon_high"]) & (gain > 0)
        loss = -ratio.detach().clamp(max=how["epsilon_high"]) * gain * logps
    elif name == "sapo":
        tau = torch.where(gain > 0, how["sapo_temperature_pos"], how["sapo_temperature_neg"])
        loss, clipped = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * gain, torch.zeros(4, T)
    elif name == "vespo":
        k, lam = torch.where(gain >= 0, 1.5, 3.0), torch.where(gain >= 0, 3.0, 2.5)
        w = (delta + (0 if weights is None else weights.log() * mask)).sum(-1, keepdim=True).exp().detach()
        loss, clipped = -lam.exp() * w**k * (-lam * w).exp() * gain * logps, torch.zeros(4, T)
    else:
        bounded = ratio if "delta" not in how else ratio.clamp(max=how["delta"])
        loss = -torch.min(bounded * gain, ratio.clamp(low, high) * gain)
    if weights is not None and name != "vespo":
        loss = loss * weights
    kl = torch.zeros(4, T)
    if how["beta"] and how.get("use_ref_model", True):
        r = batch.ref - logps
        kl = (r.exp() - r - 1) * (ratio if how.get("use_bias_correction_kl") else 1)
        loss = loss + how["beta"] * kl
    loss, share = loss * mask, (clipped * mask).sum() / count
    sums = loss.sum(-1)
    total = {
        "grpo": (sums / mask.sum(-1)).mean(),
        "sapo": (sums / mask.sum(-1)).mean(),
        "dr_grpo": sums.sum() / (4 * how.get("max_completion_length", 1)),
        "luspo": sums.mean(),
    }.get(name, sums.sum() / count)
    return total, ((kl * mask).sum() / count, share) if how["beta"] else (share,)


@pytest.mark.parametrize("weighed", (False, True), ids=("", "weights"))
@pytest.mark.parametrize("name, how", GRPO, ids=GRPO_IDS)
def test_fused_linear_grpo(name, how, weighed, seed):
    batch = Answers()
    weights, ours, theirs = batch.is_ratio if weighed else None, batch.leaves(), batch.leaves()
    result = modules.FusedLinearGRPOLoss(loss_type=name, **how)(**grpo_arguments(batch, ours, weights))
    compare(result, grpo_oracle(name, batch, theirs, how, weights), (ours, theirs))


def test_fused_linear_grpo_scores_the_reference(seed):
    """The reference's log-probs come from its hidden states and head. Without old log-probs the ratios are 1."""
    batch = Answers()
    near = [(v + 0.1 * torch.randn_like(v)).detach() for v in batch.leaves()]
    batch.ref_hidden, batch.ref_weight, batch.ref_bias = near
    module = modules.FusedLinearGRPOLoss(temperature=0.7)
    batch.ref = batch.tokens(*batch.reference(), temperature=0.7)
    batch.old = batch.tokens(batch.hidden, batch.weight, batch.bias, temperature=0.7)
    ours, theirs = batch.leaves(), batch.leaves()
    ids = batch.ids, batch.mask, batch.advantages
    parts = dict(zip(("ref_input", "ref_weight", "ref_bias"), batch.reference()))
    result = module(*ours[:2], *ids, ours[2], **parts)
    compare(result, grpo_oracle("dapo", batch, theirs, {"temperature": 0.7}, None), (ours, theirs))


def test_fused_linear_grpo_divides_by_the_steps_tokens(seed):
    batch = Answers()
    module, arguments = modules.FusedLinearGRPOLoss(), grpo_arguments(batch, batch.leaves(), None)
    loss, of_step = module(**arguments)[0], module(**arguments, num_items_in_batch=torch.tensor(60))[0]
    torch.testing.assert_close(of_step, loss * batch.mask.sum() / 60)


@pytest.mark.parametrize(
    "module", (modules.FusedLinearCPOLoss, modules.FusedLinearSimPOLoss, modules.FusedLinearORPOLoss)
)
def test_sequences_without_tokens_give_no_nan(module, seed):
    batch = Batch()
    batch.target[0] = batch.target[3] = IGNORE
    leaves = batch.leaves()
    loss, aux = module()(leaves[1], leaves[0], batch.target, leaves[2])
    loss.backward()
    assert all(v.isfinite().all() for v in (loss, *aux, *(leaf.grad for leaf in leaves)))


def test_orpo_of_a_certain_answer_stays_finite():
    """log p rounds to 0, where Liger's odds are infinite."""
    hidden = torch.full((2, 1, 1), 100.0, requires_grad=True)
    loss, aux = modules.FusedLinearORPOLoss()(torch.tensor([[1.0], [-1.0]]), hidden, torch.tensor([[0], [1]]))
    loss.backward()
    assert all(v.isfinite().all() for v in (loss, *aux, hidden.grad))


def call(module, *arguments, **named):
    batch = Batch()
    return module(batch.weight, batch.hidden, batch.target, *arguments, **named)


def call_kto(*arguments):
    batch = Batch()
    return modules.FusedLinearKTOLoss(use_ref_model=True)(batch.hidden, batch.weight, batch.target, None, *arguments)


def call_grpo(module, **named):
    batch = Answers()
    return module(*batch.leaves()[:2], batch.ids, batch.mask, batch.advantages, **named)


BAD = [
    (
        lambda: modules.FusedLinearDPOLoss(loss_type="ipo"),
        ValueError,
        "loss_type: got 'ipo', allowed are 'sigmoid', 'hi",
    ),
    (
        lambda: modules.FusedLinearDPOLoss(loss_type="hinge", label_smoothing=0.1),
        ValueError,
        "label_smoothing: got 0.1",
    ),
    (lambda: modules.FusedLinearDPOLoss(discopop_tau=0.1), ValueError, "discopop_tau: got 0.1"),
    (lambda: modules.FusedLinearDPOLoss(beta=0.0), ValueError, "beta: got 0.0"),
    (
        lambda: modules.FusedLinearDPOLoss(-100, 0.1, 1.0, False, True),
        TypeError,
        "positional",
    ),  # Liger's argument `compiled`
    (lambda: modules.FusedLinearCPOLoss(compiled=False), TypeError, "compiled"),
    (lambda: modules.FusedLinearCPOLoss(label_smoothing=0.5), ValueError, "label_smoothing: got 0.5"),
    (lambda: modules.FusedLinearSimPOLoss(gamma=-1.0), ValueError, "gamma: got -1.0"),
    (lambda: modules.FusedLinearSimPOLoss(alpha=float("nan")), ValueError, "alpha: got nan"),
    (lambda: modules.FusedLinearORPOLoss(beta=-1.0), ValueError, "beta: got -1.0"),
    (lambda: modules.FusedLinearKTOLoss(desirable_weight=-1.0), ValueError, "desirable_weight: got -1.0"),
    (lambda: call(modules.FusedLinearDPOLoss()), ValueError, "ref_input, ref_weight: got None"),
    (lambda: call(modules.FusedLinearORPOLoss(), None, torch.zeros(4, T)), TypeError, "nll_target: got dtype"),
    (
        lambda: call(modules.FusedLinearORPOLoss(compute_nll_loss=False), nll_target=torch.zeros(4, T).long()),
        ValueError,
        "nll_target: not used with compute_nll_loss=False",
    ),
    (lambda: call_kto(), ValueError, "preference_labels: got None"),
    (lambda: call_kto(torch.ones(4)), ValueError, r"preference_labels: got torch.float64 \[4\]"),
    (lambda: call_kto(torch.ones(3).bool()), ValueError, r"preference_labels: got torch.bool \[3\]"),
    (lambda: call_kto(torch.ones(4).bool()), ValueError, "ref_input, ref_weight: got None"),
    (lambda: grpo(loss_type="dpo"), ValueError, "loss_type: got 'dpo', allowed are"),
    (lambda: grpo(loss_type="dr_grpo"), ValueError, "max_completion_length: got None"),
    (lambda: grpo(max_completion_length=3), ValueError, "max_completion_length: got 3"),
    (lambda: grpo(loss_type="cispo", epsilon_low=0.1), ValueError, "epsilon_low: got 0.1, used only with"),
    (lambda: grpo(loss_type="sapo", epsilon_high=0.1), ValueError, "epsilon_high: got 0.1, used only with"),
    (lambda: grpo(loss_type="sapo", delta=2.0), ValueError, "delta: got 2.0, used only with"),
    (lambda: grpo(delta=1.1), ValueError, "delta: got 1.1, allowed are"),
    (lambda: grpo(sapo_temperature_neg=1.0), ValueError, "sapo_temperature_neg: got 1.0, used only with"),
    (lambda: grpo(vespo_k_neg=1.0), ValueError, "vespo_k_neg: got 1.0, used only with"),
    (
        lambda: grpo(loss_type="vespo", importance_sampling_level="sequence"),
        ValueError,
        "importance_sampling_level: got sequence, used only with",
    ),
    (lambda: grpo(importance_sampling_level="word"), ValueError, "importance_sampling_level: got 'word'"),
    (lambda: grpo(temperature=0.0), ValueError, "temperature: got 0.0"),
    (lambda: call_grpo(grpo()), ValueError, "ref_per_token_logps: got None"),
    (lambda: call_grpo(grpo(), ref_per_token_logps=torch.zeros(4, 2)), ValueError, "ref_per_token_logps: got shape"),
    (
        lambda: call_grpo(grpo(beta=0.0), old_per_token_logps=torch.zeros(4)),
        ValueError,
        "old_per_token_logps: got shape",
    ),
    (lambda: call_grpo(grpo(beta=0.0), vllm_is_ratio=torch.zeros(3)), ValueError, "vllm_is_ratio: got shape"),
    (
        lambda: call_grpo(grpo(loss_type="grpo", beta=0.0), num_items_in_batch=7),
        ValueError,
        "num_items_in_batch: got 7, used only with",
    ),
]


@pytest.mark.parametrize("bad, error, message", BAD, ids=[f"{i}-{row[2][:25]}" for i, row in enumerate(BAD)])
def test_bad_call(bad, error, message):
    with pytest.raises(error, match=message):
        bad()
