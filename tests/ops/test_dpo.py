"""`dpo_from_logits` and `linear_dpo` against plain PyTorch in float64: loss, KL, rewards, gradients, launches."""

import itertools
import math

import pytest
import torch
from numerics import BACKENDS, DEVICE, IGNORE, assert_close, count_launches, random_labels
from plain_ops import dpo_in_torch

import fused_po

KLS = (None, "k1", "k2", "k3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch(pairs=3, length=5, v=70, dtype=torch.float32, distance=0.3):
    """(logits, labels, ref_logits): policy and reference differ a little; prompts and padding are ignored."""
    logits = (torch.randn(2 * pairs, length, v, device=DEVICE) * 2).to(dtype)
    ref_logits = (logits.float() + distance * torch.randn_like(logits.float())).to(dtype)
    labels = random_labels(2 * pairs * length, v).view(2 * pairs, length)
    labels[:, 0] = IGNORE
    labels[:, 1] = 0
    return logits, labels, ref_logits


def ref_logps_of(ref_logits, labels):
    picked = ref_logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels != IGNORE, picked, 0)


def unit(exact):
    """The power of two nearest to the RMS. Gradients are divided by it, since their errors grow with their size."""
    return 2.0 ** round(math.log2(exact.square().mean().sqrt().item() + 1e-30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize(
    "dtype, smoothing",
    [
        pytest.param(d, e, id=f"{e}-{name}", marks=[] if e or name == "bf16" else pytest.mark.slow)
        for (d, name), e in itertools.product(zip(DTYPES, ("fp32", "bf16", "fp16")), (0.0, 0.2))
    ],
)
def test_dpo_from_logits(backend, kl, dtype, smoothing, seed, poison):
    coef = 0.4 if kl else 0.0
    how = (0.3, smoothing, kl, coef)
    problems, ours_too = [], []  # (plain PyTorch, exact) of many problems, ours of the first: one error is random
    for i in range(256):
        logits, labels, ref_logits = batch(dtype=dtype)
        picked = ref_logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        ref32 = torch.where(labels != IGNORE, picked, 0)
        sides = []
        for refs, precision in ((ref32, torch.float32), (ref_logps_of(ref_logits, labels), torch.float64)):
            x = (logits if precision == torch.float32 else logits.double()).detach().requires_grad_()
            out = dpo_in_torch(x, labels, refs, *how, precision)
            (out["loss"] * 2 + out["losses"].sum() - out["rejected_logps"].sum() * 0.1).backward()
            sides.append({**{k: v.detach() for k, v in out.items()}, "gradient": x.grad})
        scale = unit(sides[1]["gradient"])
        if kl:  # k3 is an exponential: its error grows with its slope
            steep = (1 + sides[1]["kl_per_token"].abs()).log2().round().exp2().float()
        for side in sides:
            side["gradient"] = side["gradient"] / scale
            if kl:
                side["kl_per_token"] = side["kl_per_token"] / steep
        problems.append(sides)
        if i < 4:
            x = logits.detach().requires_grad_()
            settings = {"beta": how[0], "label_smoothing": smoothing, "kl": kl, "kl_coef": coef, "backend": backend}
            ours = fused_po.dpo_from_logits(x, labels, ref_logits, **settings)
            (ours.loss * 2 + ours.losses.sum() - ours.rejected_logps.sum() * 0.1).backward()
            ours_too.append({**ours._asdict(), "gradient": x.grad / scale})
            if kl:
                ours_too[-1]["kl_per_token"] = ours.kl_per_token / steep
            ours_labels = labels
    for name in problems[0][1]:
        got = torch.cat([o[name].detach().flatten() for o in ours_too])
        exact = torch.cat([sides[1][name].flatten() for sides in problems[: len(ours_too)]])
        assert_close(name, got, exact, [(sides[0][name], sides[1][name]) for sides in problems])
    assert torch.equal(ours.accuracy, (ours.margins > 0).to(ours.accuracy.dtype))
    assert (ours_too[-1]["gradient"][ours_labels == IGNORE] == 0).all()
    if kl:
        assert (ours.kl_per_token[ours_labels == IGNORE] == 0).all()
    else:
        assert ours.kl is None and ours.kl_per_token is None
    detached = (ours.chosen_rewards, ours.rejected_rewards, ours.margins, ours.accuracy, ours.kl, ours.kl_per_token)
    assert not any(t is not None and t.requires_grad for t in detached)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reference", ("logits", "tokens", "sums"))
def test_gradcheck_dpo_from_logits(kl, reference, seed):
    if kl and reference == "sums":
        kl = None
    logits, labels, ref_logits = batch(2, 3, 9, torch.float64)
    ref = ref_logps_of(ref_logits, labels)
    refs = {"logits": (ref_logits, None), "tokens": (None, ref), "sums": (None, ref.sum(-1))}[reference]

    def run(x):
        how = dict(beta=0.5, label_smoothing=0.1, kl=kl, kl_coef=0.7 if kl else 0.0, temperature=0.8, softcap=6.0)
        return fused_po.dpo_from_logits(x, labels, *refs, **how)[:4]

    assert torch.autograd.gradcheck(run, logits.requires_grad_())


@pytest.mark.parametrize("kl", KLS)
def test_gradcheck_linear_dpo(kl, seed):
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, device=DEVICE) for s in ((4, 3, 5), (9, 5), (9,)))
    ref_hidden, ref_weight = (torch.randn(s, dtype=torch.float64, device=DEVICE) for s in ((4, 3, 6), (9, 6)))
    hidden, ref_hidden = hidden / 4, ref_hidden / 4  # k3 of large log-ratios curves too much for finite differences
    labels = random_labels(12, 9).view(4, 3)

    def run(h, w, b):
        how = dict(beta=0.5, kl=kl, kl_coef=0.7 if kl else 0.0)
        return fused_po.linear_dpo(h, w, labels, ref_hidden, ref_weight, bias=b, **how)[:4]

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (hidden, weight, bias)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl", KLS)
def test_equal_policy_and_reference_give_exactly_zero(backend, kl, seed, poison):
    logits, labels, _ = batch(dtype=torch.bfloat16)
    out = fused_po.dpo_from_logits(logits, labels, logits.clone(), kl=kl, kl_coef=0.5 if kl else 0.0, backend=backend)
    hidden, weight = torch.randn(6, 5, 8, device=DEVICE), torch.randn(70, 8, device=DEVICE)
    trained = hidden.clone().requires_grad_()
    linear = fused_po.linear_dpo(trained, weight, labels, hidden, weight, kl=kl, backend=backend)
    for o in (out, linear):
        assert (o.chosen_rewards == 0).all() and (o.rejected_rewards == 0).all() and (o.margins == 0).all()
        assert (o.losses == torch.tensor(math.log(2.0), dtype=torch.float32)).all()
        assert o.loss == torch.tensor(math.log(2.0), dtype=torch.float32) or abs(o.loss.item() - math.log(2)) < 1e-7
        assert kl is None or (o.kl == 0 and (o.kl_per_token == 0).all())


@pytest.mark.parametrize("kl, kl_coef", [(None, 0.0), ("k3", 0.2)])
@pytest.mark.parametrize("inplace", (False, True))
def test_two_launches_forward_one_backward(kl, kl_coef, inplace, seed):
    logits, labels, ref_logits = batch()
    x = (logits * 1.0).requires_grad_() * 1.0
    how = dict(kl=kl, kl_coef=kl_coef, inplace_backward=inplace, backend="triton")
    with count_launches() as forward:
        out = fused_po.dpo_from_logits(x, labels, ref_logits, **how)
    with count_launches() as backward:
        (out.loss + out.losses.sum() + out.chosen_logps.sum()).backward()
    assert forward == ["pair_statistics_kernel", "dpo_kernel"]
    assert backward == ["dpo_gradient_kernel"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_forms_of_the_reference_agree(backend, seed):
    logits, labels, ref_logits = batch()
    ref = fused_po.logps_from_logits(ref_logits, labels, backend=backend).logps
    noise = torch.where(labels == IGNORE, torch.nan, ref)  # values at ignored positions are not read
    outs = []
    for refs in ((ref_logits, None), (None, ref), (None, noise), (None, ref.sum(-1)), (ref_logits.double(), None)):
        if backend == "triton" and refs[0] is not None and refs[0].dtype == torch.float64:
            continue
        x = logits.clone().requires_grad_()
        out = fused_po.dpo_from_logits(x, labels, *refs, beta=0.3, backend=backend)
        out.loss.backward()
        outs.append((out.loss, out.margins, out.chosen_logps, x.grad))
    for other in outs[1:]:
        for a, b in zip(other, outs[0]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl", (None, "k2"))
def test_linear_and_logits_forms_agree(backend, kl, seed, poison):
    hidden, weight, bias = (torch.randn(s, device=DEVICE) for s in ((6, 5, 8), (70, 8), (70,)))
    ref_hidden, ref_weight = torch.randn(6, 5, 4, device=DEVICE), torch.randn(70, 4, device=DEVICE)
    labels = random_labels(30, 70).view(6, 5)
    how = dict(beta=0.2, label_smoothing=0.1, kl=kl, kl_coef=0.3 if kl else 0.0, temperature=1.5, backend=backend)
    results = []
    for linear in (True, False):
        h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
        if linear:
            out = fused_po.linear_dpo(h, w, labels, ref_hidden, ref_weight, bias=b, **how)
        else:
            out = fused_po.dpo_from_logits(h @ w.T + b, labels, ref_hidden @ ref_weight.T, **how)
        (out.loss + out.chosen_logps.sum()).backward()
        results.append([*(t for t in out if t is not None), h.grad, w.grad, b.grad])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_losses_in_plain_pytorch(backend, seed):
    logits, labels, ref_logits = batch()
    mask = labels != IGNORE
    logps, ref = (fused_po.logps_from_logits(t, labels, backend=backend).logps for t in (logits, ref_logits))
    sums = [fused_po.sequence_logps(t, mask).chunk(2) for t in (logps, ref)]
    losses = fused_po.losses.dpo(*sums[0], *sums[1], beta=0.3, label_smoothing=0.1)
    kl = fused_po.losses.kl_loss(logps, ref, "k3")
    expected = losses.mean() + 0.2 * (kl * mask).sum() / mask.sum()
    how = dict(beta=0.3, label_smoothing=0.1, kl="k3", kl_coef=0.2, backend=backend)
    out = fused_po.dpo_from_logits(logits, labels, ref_logits, **how)
    torch.testing.assert_close(out.losses, losses)
    torch.testing.assert_close(out.kl_per_token, kl * mask, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dpo_gradient_is_the_papers(backend, seed):
    """-beta s(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)): DPO, section 4."""
    logits, labels, ref_logits = batch(1, 4, 30)
    x = logits.clone().requires_grad_()
    out = fused_po.dpo_from_logits(x, labels, ref_logits, beta=0.7, backend=backend)
    out.loss.backward()
    y = logits.double().requires_grad_()
    logp = y.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    chosen, rejected = torch.where(labels != IGNORE, logp, 0).sum(-1)
    (direction,) = torch.autograd.grad(chosen - rejected, y)
    weight = torch.sigmoid(out.rejected_rewards - out.chosen_rewards).double()
    torch.testing.assert_close(x.grad.double(), -0.7 * weight * direction, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", (60.0, -60.0, 1e4, -1e4))
def test_extreme_margins(backend, gap, seed):
    logits, labels, _ = batch(1, 3, 20)
    x = logits.clone().requires_grad_()
    sums = fused_po.logps_from_logits(logits, labels, backend=backend).logps.sum(-1)
    reference = sums - torch.tensor([gap, 0.0], device=DEVICE)
    out = fused_po.dpo_from_logits(x, labels, ref_logps=reference, beta=1.0, backend=backend)
    out.loss.backward()
    expected = torch.nn.functional.softplus(torch.tensor(-gap, dtype=torch.float64)).item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-30)
    assert x.grad.isfinite().all()
    if gap > 100:
        assert (x.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_and_empty_answers(backend, seed, poison):
    empty = fused_po.dpo_from_logits(
        torch.zeros(0, 4, 9, device=DEVICE, requires_grad=True),
        torch.zeros(0, 4, dtype=torch.long, device=DEVICE),
        torch.zeros(0, 4, 9, device=DEVICE),
        kl="k1",
        backend=backend,
    )
    empty.loss.backward()
    assert empty.loss.item() == 0 and empty.losses.shape == (0,) and empty.kl.item() == 0
    logits = torch.randn(4, 3, 9, device=DEVICE, requires_grad=True)
    labels = torch.full((4, 3), IGNORE, device=DEVICE)
    out = fused_po.dpo_from_logits(logits, labels, logits.detach() + 1, kl="k3", kl_coef=1.0, backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2)) and out.kl.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:fused_po. k1 as a loss")
@pytest.mark.parametrize("distance", (30.0, 1e4, -1e4))
@pytest.mark.parametrize("kl", KLS[1:])
def test_distant_policies_give_the_finite_values_of_the_pure_losses(backend, distance, kl, seed, poison):
    """k3's exponential would overflow. Beyond a limit it continues along its tangent, in the op and in the losses."""
    logits, labels, _ = batch(2, 3, 9)
    ref_logps = torch.where(labels != IGNORE, distance, 0.0)
    x = logits.requires_grad_()
    out = fused_po.dpo_from_logits(x, labels, ref_logps=ref_logps, kl=kl, kl_coef=1e-3, backend=backend)
    out.loss.backward()
    logps = fused_po.logps_from_logits(logits.detach(), labels, backend=backend).logps.requires_grad_()
    expected = fused_po.losses.kl_loss(logps, ref_logps, kl)
    torch.testing.assert_close(out.kl_per_token, expected.detach())
    assert out.loss.isfinite() and x.grad.isfinite().all()
    loss = fused_po.losses.dpo(*logps.sum(-1).chunk(2), *ref_logps.sum(-1).chunk(2)).mean()
    loss = loss + 1e-3 * expected.sum() / (labels != IGNORE).sum()
    # A sequence's log-ratio is a sum of up to 3 numbers as large as the distance; the order of the sum varies.
    atol = max(1e-5, 0.1 * 3 * abs(distance) * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1.3e-6, atol=atol)
    slopes = torch.autograd.grad(loss, logps)[0]
    y = logits.detach().requires_grad_()
    fused_po.logps_from_logits(y, labels, backend=backend).logps.backward(slopes)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=atol)
