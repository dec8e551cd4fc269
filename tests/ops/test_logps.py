"""`logps_from_logits` and `linear_logps` against float64: a grid of sizes and dtypes, for every backend."""

import itertools

import pytest
import torch
from logps_checks import OUTPUTS, check_linear, check_logits
from numerics import BACKENDS, DEVICE, IGNORE, Scaling, assert_close, plain, random_labels

import fused_po

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SCALINGS = {
    "plain": Scaling(),
    "temperature": Scaling(temperature=0.7),
    "scale": Scaling(logit_scale=1 / 16),
    "softcap": Scaling(temperature=1.3, logit_scale=0.5, softcap=5.0),
}
LARGE = 20_000_000  # logits; larger problems are slow tests
INTERPRETED_ELEMENTS = 600_000  # Triton's interpreter takes seconds for more, and for many rows


def grid():
    """(backend, dtype, V, N) with the large cases marked slow, or left out where the interpreter would take minutes."""
    for backend, dtype, v, n in itertools.product(BACKENDS, DTYPES, (2, 127, 4097, 50257, 151936), (0, 1, 7, 513)):
        marks = []
        if v * n > LARGE:
            marks = [pytest.mark.slow]
        if backend == "triton" and DEVICE == "cpu":
            if v * n > 2_200_000:
                continue
            if v * n > INTERPRETED_ELEMENTS or n > 100 or (v > 100_000 and dtype != torch.bfloat16):
                marks = [pytest.mark.slow]
        yield pytest.param(backend, dtype, v, n, marks=marks, id=f"{backend}-{NAMES[dtype]}-{v}-{n}")


def baseline_rows(n: int, v: int) -> int:
    """The number of rows over which plain PyTorch's error is taken: the error of a single row is random."""
    return max(n, 256 if v < 5000 else 64 if v < 100_000 else 24) if n else 1


@pytest.mark.parametrize("backend, dtype, v, n", list(grid()))
def test_logits_grid(backend, dtype, v, n, seed, poison):
    rows = baseline_rows(n, v)
    logits = (torch.randn(rows, v, device=DEVICE) * 3).to(dtype)
    check_logits(logits, random_labels(rows, v), Scaling(), backend, n=n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("ignored", ("none", "some", "all"))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_logits_scaling_and_ignored(backend, scaling, ignored, dtype, seed, poison):
    logits = (torch.randn(256, 1003, device=DEVICE) * 4).to(dtype)
    labels = random_labels(256, 1003, "none")
    labels[:9] = random_labels(9, 1003, ignored)
    check_logits(logits, labels, scaling, backend, n=9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outputs", [(name,) for name in OUTPUTS[:3]] + [("entropy", "lse"), ("logps", "lse")])
def test_each_output_alone(backend, outputs, seed, poison):
    logits, labels = torch.randn(256, 300, device=DEVICE), random_labels(256, 300)
    check_logits(logits, labels, Scaling(), backend, outputs, n=6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
@pytest.mark.parametrize("v", (33, 1003, 4500))
def test_minus_infinity_is_a_masked_vocabulary(backend, dtype, v, seed, poison):
    logits = torch.randn(256, v, device=DEVICE).to(dtype) * 2
    labels = random_labels(256, v, "none")
    masked = torch.rand(256, v, device=DEVICE) < 0.5
    masked[0] = True  # only the label is left
    masked[1, : v - 5] = True
    labels[1] = v - 1
    masked.scatter_(1, labels[:, None], False)
    logits = logits.masked_fill(masked, -torch.inf)
    check_logits(logits, labels, Scaling(), backend, n=12)
    x = logits[:12].clone().requires_grad_()
    fused_po.logps_from_logits(x, labels[:12], backend=backend).logps.sum().backward()
    assert (x.grad[masked[:12]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_rows_keep_their_gradient(backend, seed):
    """The label's p is up to 1 - 1e-7, so 1 - p must not be computed by subtracting p from 1."""
    gap = torch.linspace(1, 16, 256, device=DEVICE)[torch.randperm(256, device=DEVICE)]
    logits = torch.randn(256, 10, device=DEVICE)
    logits[:, 3] = logits.max(-1).values + gap
    labels = torch.full((256,), 3, device=DEVICE)
    check_logits(logits, labels, Scaling(), backend, n=64)
    stats = fused_po.logps_from_logits(logits[:64], labels[:64], backend=backend)
    assert (stats.logps <= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", (20, 5000))
def test_is_top1_is_argmax_with_ties(backend, v, seed):
    logits = torch.randint(0, 4, (64, v), device=DEVICE).to(torch.bfloat16)
    first = logits.float().argmax(-1)
    labels = torch.where(torch.rand(64, device=DEVICE) < 0.6, first, torch.randint(0, v, (64,), device=DEVICE))
    labels[0] = IGNORE
    expected = (first == labels) & (labels != IGNORE)
    got = fused_po.logps_from_logits(logits, labels, outputs=("is_top1",), backend=backend).is_top1
    assert got.dtype == torch.bool
    assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype, v",
    [
        (torch.float32, 57),
        (torch.bfloat16, 16),
        (torch.bfloat16, 4099),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((torch.float32, 16), (torch.float32, 4099), (torch.bfloat16, 57))
        ),
    ],
    ids=str,
)
def test_strides(backend, dtype, v, seed, poison):
    """Slices, transposes and unaligned starts give bitwise the results and gradients of contiguous logits."""
    base = torch.randn(3, 6, v + 3, device=DEVICE).to(dtype)
    views = {
        "shifted": base[:, :-1, :v],
        "unaligned": base[:, 1:, 3:],
        "batch": base[1, :, :v],
        "transposed rows": base[..., :v].transpose(0, 1),
        "strided columns": torch.randn(v, 4, device=DEVICE).to(dtype).t(),
        "four dimensions": base.view(3, 2, 3, v + 3)[:, :, 1:, :v],
        "one row": base[0, 0, :v],
        "expanded": base[:1, :1, :v].expand(2, 2, v),
    }
    for name, view in views.items():
        labels = random_labels(view.shape[:-1].numel(), v).view(view.shape[:-1])
        results = []
        for x in (view.detach(), view.detach().contiguous()):
            x = x.requires_grad_()
            stats = fused_po.logps_from_logits(x, labels, outputs=("logps", "entropy"), backend=backend)
            grad = torch.autograd.grad((stats.logps + 0.3 * stats.entropy).sum(), x)[0]
            results.append((stats.logps, stats.entropy, grad))
        for ours, expected in zip(*results):
            # Unaligned rows are summed in another order.
            torch.testing.assert_close(
                ours, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6, msg=name
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_rows_stay_alone(backend, seed):
    logits = torch.randn(5, 400, device=DEVICE)
    logits[1, 7], logits[2, 9], logits[3] = torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([3, 4, 5, 6, 7], device=DEVICE)
    x = logits.clone().requires_grad_()
    stats = fused_po.logps_from_logits(x, labels, outputs=("logps", "entropy", "lse"), backend=backend)
    stats.logps.sum().backward()
    for value in stats[:2]:
        assert value.isnan().tolist() == [False, True, True, True, False]
    assert x.grad.isnan().any(-1).tolist() == [False, True, True, True, False]
    assert x.grad.isfinite().all(-1)[[0, 4]].all()


@pytest.mark.parametrize("backend, dtype, v, n", list(grid()))
def test_linear_grid(backend, dtype, v, n, seed, poison):
    width, rows = 24, baseline_rows(n, v)
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = (torch.randn(v, width, device=DEVICE) / 2).to(dtype)
    check_linear(hidden, weight, None, random_labels(rows, v), Scaling(), backend, n=n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("ignored", ("none", "some", "all"))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.values())
def test_linear_scaling_bias_and_tiles(backend, scaling, ignored, dtype, seed, poison):
    hidden = torch.randn(256, 16, device=DEVICE).to(dtype)
    weight = (torch.randn(203, 16, device=DEVICE) / 2).to(dtype)
    bias = torch.randn(203, device=DEVICE).to(dtype)
    labels = random_labels(256, 203, "none")
    labels[:11] = random_labels(11, 203, ignored)
    small = fused_po.Schedule(tile_bytes=4 * 203 * 3)  # three rows a tile, a few dozen columns a block
    check_linear(hidden, weight, bias, labels, scaling, backend, small, n=11)


@pytest.mark.parametrize("temperature", (0.5, 2.0))
def test_entropy_never_ignores_the_temperature(temperature, seed):
    """Other libraries had this bug: log-probs at the temperature, but the entropy and its bonus at temperature 1."""
    hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    labels, mask = torch.randint(0, 30, (1, 5)), torch.ones(1, 5)
    hidden.requires_grad_()
    stats = fused_po.linear_logps(hidden[None], weight, labels, temperature=temperature, outputs=("logps", "entropy"))
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(stats.entropy[0], expected)
    from_logits = fused_po.logps_from_logits(
        hidden @ weight.T, labels[0], temperature=temperature, outputs=("entropy",)
    )
    torch.testing.assert_close(from_logits.entropy, expected)
    bonus = fused_po.losses.entropy_bonus(stats.entropy, mask, coef=0.3).sum()
    grads = [torch.autograd.grad(v, hidden, retain_graph=True)[0] for v in (bonus, -0.3 * expected.sum())]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("keep", (0, None), ids=("recomputed", "kept"))
@pytest.mark.parametrize("outputs", (("logps",), ("logps", "entropy")), ids=("log-probs", "entropy"))
def test_the_gradient_of_a_bias_over_many_tokens(outputs, keep, seed):
    """A sum over 4,000 rows. PyTorch uses cascade summation; adding row after row errs ten times more."""
    n, v, width = 4000, 64, 8
    hidden, weight = torch.randn(n, width, device=DEVICE), torch.randn(v, width, device=DEVICE)
    bias, labels = torch.randn(v, device=DEVICE), torch.randint(v, (n,), device=DEVICE)
    schedule = fused_po.Schedule() if keep is None else fused_po.Schedule(logits_budget=keep)

    def gradient(bias, score):
        bias = bias.clone().requires_grad_()
        return torch.autograd.grad(sum(value.sum() for value in score(bias)), bias)[0]

    def in_plain_torch(dtype):
        wide = [t.to(dtype) for t in (hidden, weight)]
        stats = lambda b: plain(torch.nn.functional.linear(*wide, b), labels, Scaling())  # noqa: E731
        return gradient(bias.to(dtype), lambda b: [stats(b)[name] for name in outputs])

    how = dict(outputs=outputs, schedule=schedule, backend="reference")
    score = lambda b: fused_po.linear_logps(hidden, weight, labels, b, **how)  # noqa: E731
    ours = gradient(bias, lambda b: [getattr(score(b), name) for name in outputs])
    exact = in_plain_torch(torch.float64)
    assert_close("bias", ours, exact, [(in_plain_torch(torch.float32), exact)])


@pytest.mark.parametrize("op", ("linear_kl", "chunked_loss"))
def test_the_gradient_of_a_bias_over_many_tokens_in_other_ops(op, seed):
    """They sum a bias's gradient as `linear_logps` does; chunked_loss sums over eight groups."""
    n, v, width = 4000, 64, 8
    hidden, ref_hidden = torch.randn(2, n, width, device=DEVICE)
    weight, ref_weight = torch.randn(2, v, width, device=DEVICE)
    bias, labels = torch.randn(v, device=DEVICE), torch.randint(v, (n,), device=DEVICE)
    rows, groups = torch.arange(n, device=DEVICE), fused_po.Schedule(logits_budget=n // 8 * 4 * v)

    def ours(b):
        if op == "linear_kl":
            return fused_po.linear_kl(hidden, weight, ref_hidden, ref_weight, labels, bias=b).kl.sum()
        chunked = lambda stats, rows: stats.logps.sum()  # noqa: E731
        return fused_po.chunked_loss(chunked, hidden, weight, labels, rows, bias=b, schedule=groups)

    def in_plain_torch(b):
        side, other = (t.to(b.dtype) for t in (hidden, weight)), (t.to(b.dtype) for t in (ref_hidden, ref_weight))
        p, q = (torch.nn.functional.linear(*t).log_softmax(-1) for t in ((*side, b), other))
        return (p.exp() * (p - q)).sum() if op == "linear_kl" else p.gather(1, labels[:, None]).sum()

    def gradient(of, dtype=torch.float32):
        b = bias.to(dtype).requires_grad_()
        return torch.autograd.grad(of(b), b)[0]

    exact = gradient(in_plain_torch, torch.float64)
    assert_close("bias", gradient(ours), exact, [(gradient(in_plain_torch), exact)])
