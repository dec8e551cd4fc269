"""`kl_from_logits` against plain PyTorch in float64: values, gradients, extremes, strides, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_problems import DIRECTIONS, in_torch, loss_of, pair, terms
from numerics import BACKENDS, DEVICE, IGNORE, Scaling, assert_close, random_labels

import fused_po

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gradient_in_closed_form(logits, ref_logits, direction, weight):
    """d KL / d logits without autograd, which turns log 0 into NaN."""
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    if direction == "forward":
        return p.exp() - q.exp()
    m = q if direction == "reverse" else (weight * q.exp() + (1 - weight) * p.exp()).log()
    share = 1.0 if direction == "reverse" else 1 - weight
    return share * (terms(p, m) - p.exp() * terms(p, m).sum(-1, keepdim=True))


def check_logits(n, v, dtype, backend, how, scalings=(None, None), ref_dtype=None, problems=16):
    """Compare with float64; the bound is plain PyTorch's error on several problems."""
    found, ours = [], None
    settings_ = {}
    if scalings[0]:
        settings_ = {name: tuple(getattr(s, name) for s in scalings) for name in Scaling._fields}
    for i in range(problems):
        logits, ref_logits = pair(n, v, dtype, ref_dtype=ref_dtype)
        labels, g = random_labels(n, v), torch.randn(3, n, device=DEVICE).sign()
        sides = []
        for precision in (torch.float32, torch.float64):
            x = (logits if precision == torch.float32 else logits.double()).detach().requires_grad_()
            values = in_torch(x.to(precision), ref_logits.to(precision), labels, *how, *scalings)
            (grad,) = torch.autograd.grad(loss_of(values, g.to(precision)), x)
            sides.append([*(t.detach() for t in values), grad])
        found.append(sides)
        if i == 0:
            x = logits.detach().requires_grad_()
            direction = {"direction": how[0], "js_weight": how[1]}
            stats = fused_po.kl_from_logits(x, ref_logits, labels, **direction, **settings_, backend=backend)
            (grad,) = torch.autograd.grad(loss_of(stats, g), x)
            ours = [*(t.detach() for t in stats), grad]
            assert (grad[labels == IGNORE] == 0).all() and (stats.kl >= 0).all()
    for i, name in enumerate(("kl", "logps", "ref_logps", "entropy", "gradient")):
        assert_close(name, ours[i], found[0][1][i], [(side[0][i], side[1][i]) for side in found])


@pytest.mark.parametrize("v", (2, 127, 1000, 4099))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("how", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, how, dtype, v, seed, poison):
    check_logits(9, v, dtype, backend, how)


@pytest.mark.parametrize("v", (50257, 151936))
@pytest.mark.parametrize("how", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_vocabularies(backend, how, v, seed, poison):
    check_logits(2, v, torch.bfloat16, backend, how, problems=8)


@pytest.mark.parametrize("ref", (Scaling(), Scaling(1.0, 2.0, 8.0)), ids=("plain reference", "capped reference"))
@pytest.mark.parametrize("policy", (Scaling(0.7, 1.3), Scaling(1.3, 0.5, 5.0)), ids=("scaled", "capped"))
@pytest.mark.parametrize("how", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_side_has_its_scaling_and_dtype(backend, how, policy, ref, seed, poison):
    check_logits(9, 300, torch.bfloat16, backend, how, (policy, ref), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vocabulary_of_one(backend, seed, poison):
    logits, ref_logits = pair(5, 1)
    for direction, weight in DIRECTIONS.values():
        x = logits.clone().requires_grad_()
        stats = fused_po.kl_from_logits(x, ref_logits, direction=direction, js_weight=weight, backend=backend)
        stats.kl.sum().backward()
        rounding = torch.finfo(torch.float32).eps * (logits.abs() + ref_logits.abs()).max()
        assert stats.kl.max() <= rounding and x.grad.abs().max() <= rounding


@pytest.mark.parametrize("how", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_sides_give_exactly_zero(backend, how, seed, poison):
    logits, _ = pair(7, 300)
    logits[0, :200] = -torch.inf
    x = logits.clone().requires_grad_()
    stats = fused_po.kl_from_logits(x, logits, direction=how[0], js_weight=how[1], backend=backend)
    stats.kl.sum().backward()
    assert (stats.kl == 0).all() and (x.grad == 0).all()
    assert stats.logps is None and stats.ref_logps is None and stats.entropy is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_tokens(backend, seed, poison):
    """In KL(p || q) a token forbidden (-inf) in both adds 0, and a token forbidden only in q gives +inf."""
    logits, ref_logits = pair(4, 300)
    logits[:2, 10:20] = -torch.inf
    ref_logits[:2, 10:20] = -torch.inf  # both
    logits[1, 30], ref_logits[2, 40], logits[3, 50] = -torch.inf, -torch.inf, -torch.inf
    infinite = {"reverse": [2], "forward": [1, 3], "js": []}
    for name, (direction, weight) in DIRECTIONS.items():
        x = logits.clone().requires_grad_()
        stats = fused_po.kl_from_logits(x, ref_logits, direction=direction, js_weight=weight, backend=backend)
        stats.kl.sum().backward()
        labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        exact = in_torch(logits.double(), ref_logits.double(), labels, direction, weight)[0]
        finite = [i for i in range(4) if i not in infinite[name]]
        assert torch.isinf(stats.kl[infinite[name]]).all() and torch.isinf(exact[infinite[name]]).all()
        torch.testing.assert_close(stats.kl[finite].double(), exact[finite], rtol=1e-5, atol=1e-6)
        grad = gradient_in_closed_form(logits.double(), ref_logits.double(), direction, weight)
        torch.testing.assert_close(x.grad[finite].double(), grad[finite], rtol=1e-4, atol=1e-6)
        assert (x.grad[:2, 10:20] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend, poison):
    logits, ref_logits = pair(3, 100)
    logits[1, 3], ref_logits[2, 5] = torch.nan, torch.nan
    kl = fused_po.kl_from_logits(logits, ref_logits, backend=backend).kl
    assert kl[0].isfinite() and kl[1:].isnan().all()


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_masks(backend, inplace, seed):
    """[:, :-1] of a batch, a transpose and four dimensions give the results of their contiguous copies."""
    base, ref_base = (torch.randn(3, 6, 2, 50, device=DEVICE) for _ in range(2))
    views = [lambda t: t[:, :-1, 0], lambda t: t.transpose(0, 2), lambda t: t[..., ::2], lambda t: t[1:, ::2]]
    for view in views:
        results = []
        for copy in (False, True):
            x = base.clone().requires_grad_()
            logits, ref_logits = view(x * 1.0), view(ref_base)
            if copy:
                logits, ref_logits = logits.contiguous(), ref_logits.contiguous()
            labels = torch.arange(logits[..., 0].numel(), device=DEVICE).view(logits.shape[:-1]) % 20
            mask = labels % 3 > 0
            stats = fused_po.kl_from_logits(logits, ref_logits, labels, mask, inplace_backward=inplace, backend=backend)
            loss_of(stats, [1.0, 2.0, 3.0]).backward()
            results.append((*(t.detach() for t in stats), x.grad))
            assert (stats.kl[~mask] == 0).all() and (stats.logps[~mask] == 0).all()
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 80), st.floats(0, 30), st.floats(-50, 50))
def test_never_negative_and_unchanged_by_constants(number, v, distance, constant):
    torch.manual_seed(number)
    logits, ref_logits = pair(3, v, distance=distance)
    for direction, weight in DIRECTIONS.values():
        how = dict(direction=direction, js_weight=weight)
        kl = fused_po.kl_from_logits(logits, ref_logits, **how).kl
        assert (kl >= 0).all()
        shifted = fused_po.kl_from_logits(logits.double() + constant, ref_logits.double(), **how).kl
        torch.testing.assert_close(kl.double(), shifted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", DIRECTIONS.values(), ids=DIRECTIONS)
def test_gradcheck(how, seed):
    logits, ref_logits = pair(4, 9, torch.float64)
    labels = random_labels(4, 9)

    def run(x):
        stats = fused_po.kl_from_logits(
            x, ref_logits, labels, direction=how[0], js_weight=how[1], temperature=(0.8, 1.0), softcap=(6.0, None)
        )
        return stats.kl, stats.logps, stats.entropy

    assert torch.autograd.gradcheck(run, logits.requires_grad_())


def logits(v=7):
    return torch.randn(2, 3, v)


BAD = [
    (lambda: fused_po.kl_from_logits(logits(), logits(8)), r"ref_logits: got shape \(2, 3, 8\), expected \(2, 3, 7\)"),
    (lambda: fused_po.kl_from_logits(logits(), logits(), direction="revers"), "did you mean 'reverse'"),
    (lambda: fused_po.kl_from_logits(logits(), logits(), js_weight=0.3), "js_weight: got 0.3, used only with"),
    (lambda: fused_po.kl_from_logits(logits(), logits(), direction="js", js_weight=1.0), "js_weight: got 1.0, allowed"),
    (lambda: fused_po.kl_from_logits(logits(), logits(), temperature=0.0), "temperature: got 0.0"),
    (
        lambda: fused_po.kl_from_logits(logits(), logits(), temperature=(1.0,)),
        "temperature: got 1 values, expected one",
    ),
    (lambda: fused_po.kl_from_logits(logits(), logits(), torch.full((2, 3), 7)), "labels: got 7 at flat position 0"),
    (lambda: fused_po.kl_from_logits(logits(), logits(), mask=torch.ones(2)), r"mask: got shape \(2,\)"),
    (lambda: fused_po.kl_from_logits(logits().long(), logits()), "logits: got dtype torch.int64"),
    (lambda: fused_po.linear_kl(logits(), torch.randn(9, 7), logits(), torch.randn(8, 7)), "ref_weight: got shape"),
    (
        lambda: fused_po.linear_kl(logits(), torch.randn(9, 7), torch.randn(2, 2, 7), torch.randn(9, 7)),
        "ref_hidden: got",
    ),
    (lambda: fused_po.linear_kl(logits(), torch.randn(9, 6), logits(), torch.randn(9, 7)), "weight: got shape"),
    (
        lambda: fused_po.dpo_from_logits(logits(), torch.ones(2, 3).long(), ref_logps=torch.zeros(2, 3), kl="full"),
        "kl: got 'full' with ref_logps",
    ),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
