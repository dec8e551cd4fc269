"""`linear_logps` with a low-rank addition to the head: raw = hidden W^T + u B^T, without a merged head in memory."""

import itertools

import counting
import pytest
import torch
from numerics import BACKENDS, DEVICE, Scaling, assert_close, oracle, plain, random_labels

import fused_po
from fused_po import Schedule

STATS = ("logps", "entropy", "lse")
N, H, R, V = 60, 32, 4, 1003
ROW = 4 * 1008  # bytes of a padded fp32 row
SHARES = {"nothing": 0.0, "half": 0.5, "all": 1.0}
NEEDS = {"all": (True,) * 4, "lora": (True, False, True, True), "frozen": (True, False, True, False)}


def problem(needs, dtype=torch.float32, n=N, h=H, r=R, v=V, ignored="none"):
    """((hidden, weight, u, low), labels); needs says which tensors require grad."""
    shapes = (n, h), (v, h), (n, r), (v, r)
    spread = (1, h**-0.5, 1, r**-0.5)
    values = [(torch.randn(shape, device=DEVICE) * s).to(dtype) for shape, s in zip(shapes, spread)]
    return [t.requires_grad_(need) for t, need in zip(values, needs)], random_labels(n, v, ignored)


def step(operands, labels, g, bias=None, weigh=("logps",), **how):
    """The gradients of the weighted sum in the tensors that require grad."""
    hidden, weight, u, low = operands
    stats = fused_po.linear_logps(hidden, weight, labels, bias, low_rank=(u, low), outputs=weigh, **how)
    loss = sum((getattr(stats, name) * g * (1 + i)).sum() for i, name in enumerate(weigh))
    return torch.autograd.grad(loss, [t for t in operands if t.requires_grad])


@pytest.mark.parametrize("softcap", (None, 4.0))
@pytest.mark.parametrize("schedule", (None, Schedule(tile_bytes=600)), ids=("one tile", "many tiles"))
def test_gradcheck(softcap, schedule, seed):
    shapes = (2, 3, 5), (23, 5), (23,), (2, 3, 2), (23, 2)
    inputs = [torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in shapes]
    labels = random_labels(6, 23).view(2, 3)
    how = dict(temperature=0.7, softcap=softcap, outputs=STATS, backend="reference", schedule=schedule)

    def run(hidden, weight, bias, u, low):
        return fused_po.linear_logps(hidden, weight, labels, bias, low_rank=(u, low), **how)[:3]

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("tile_rows", (7, 1000))
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_gemms_counted_exactly(share, tile_rows, seed):
    """Each GEMM of the head is H + r wide, except the gradient of a frozen weight, which is r wide."""
    schedule = Schedule(logits_budget=int(share * N) * ROW, tile_bytes=tile_rows * ROW)
    unit, thin, kept = 2 * N * (H + R) * V, 2 * N * R * V, int(share * N) / N
    expected = {"all": 4 - kept, "lora": 3 - kept + thin / unit, "frozen": 2}
    for case, needs in NEEDS.items():
        operands, labels = problem(needs)
        g = torch.randn(N, device=DEVICE)
        with torch.no_grad():
            one = counting.flops(
                lambda o=operands, y=labels: fused_po.linear_logps(*o[:2], y, low_rank=tuple(o[2:]), schedule=schedule)
            )
        both = counting.flops(lambda o=operands, y=labels, g=g: step(o, y, g, schedule=schedule))
        assert one == unit and both / unit == pytest.approx(expected[case], abs=1e-9), case


def grid():
    """Every schedule with the reference backend; interpreted kernels take seconds, so only one case is not slow."""
    scalings = {"plain": Scaling(), "cap": Scaling(0.7, 1.3, 3.0)}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    weighed = {"logps": ("logps",), "lse": ("logps", "lse"), "all": STATS}
    every = (BACKENDS, dtypes, SHARES, NEEDS, weighed, scalings)
    for backend, dtype, share, needs, weigh, scaling in itertools.product(*every):
        ordinary = backend == "reference" or (dtype, share, needs, weigh) == ("fp32", "half", "lora", "all")
        values = backend, dtypes[dtype], SHARES[share], NEEDS[needs], weighed[weigh]
        name = "-".join((backend, dtype, share, needs, weigh, scaling))
        yield pytest.param(*values, scalings[scaling], id=name, marks=[] if ordinary else [pytest.mark.slow])


@pytest.mark.parametrize("backend, dtype, share, needs, weigh, scaling", list(grid()))
def test_against_float64_and_the_merged_head(backend, dtype, share, needs, weigh, scaling, seed, poison):
    """Every schedule, with ignored rows and rows without gradient. Plain PyTorch adds two projections."""
    n, v, row = 96, 203, 4 * 208
    # ours runs the first n rows, plain PyTorch all of them
    operands, labels = problem(needs, dtype, 6 * n, 16, 3, v, "some")
    bias = torch.randn(v, device=DEVICE).to(dtype)
    g = torch.randint(-1, 2, (6 * n,), device=DEVICE).float()
    schedule = Schedule(logits_budget=int(share * n) * row, tile_bytes=8 * row)
    how = dict(backend=backend, schedule=schedule, **scaling._asdict())

    def some(rows):
        values = operands[0][rows], operands[1], operands[2][rows], operands[3]
        return [t.detach().clone().requires_grad_(old.requires_grad) for t, old in zip(values, operands)]

    ours = step(some(slice(n)), labels[:n], g[:n], bias, weigh, **how)

    hidden, weight, u, low = (t.detach().double() for t in operands)
    grads = {name: g * (1 + i) for i, name in enumerate(weigh)}
    _, d = oracle(hidden @ weight.T + u @ low.T + bias.double(), labels, scaling, grads)

    def exact(rows):
        return d[rows] @ weight, d[rows].T @ hidden[rows], d[rows] @ low, d[rows].T @ u[rows]

    def plain_grads(rows):
        copies = some(rows)
        h, w, u, low = copies
        stats = plain(h @ w.T + u @ low.T + bias, labels[rows], scaling)
        loss = sum((stats[name] * value[rows]).sum() for name, value in grads.items())
        return torch.autograd.grad(loss, [t for t in copies if t.requires_grad])

    groups = torch.arange(6 * n, device=DEVICE).split(n)
    tiles = [*groups, *groups[0].split(8)]  # a row's error depends on the GEMM it is in
    theirs = [(plain_grads(rows), exact(rows)) for rows in tiles]
    for at, i in enumerate(i for i, need in enumerate(needs) if need):
        name, problems = ("hidden", "weight", "u", "low")[i], theirs[: len(groups)] if i % 2 else theirs
        assert_close(
            f"gradient of {name}", ours[at], exact(groups[0])[i], [(got[at], true[i]) for got, true in problems]
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_probs_do_not_depend_on_what_is_kept(backend, seed, poison):
    operands, labels = problem((False,) * 4, n=20, v=300, ignored="some")
    every = []
    for needs in ((False,) * 4, *NEEDS.values()):
        for share in SHARES.values():
            hidden, weight, u, low = (t.detach().requires_grad_(need) for t, need in zip(operands, needs))
            schedule = Schedule(logits_budget=int(share * 20) * 4 * 304, tile_bytes=6 * 4 * 304)
            how = dict(low_rank=(u, low), backend=backend, schedule=schedule)
            every.append(fused_po.linear_logps(hidden, weight, labels, **how).logps.detach())
    assert all(torch.equal(every[0], other) for other in every[1:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("share", (0.0, 1.0))
def test_no_merged_head(share, dtype, seed, monkeypatch):
    """The peak beyond the results is the budget, two tiles, O(N H) and O(V r), far less than a merged head."""
    n, h, r, v, tile = 96, 512, 4, 8192, 1 << 20
    operands, labels = problem(NEEDS["lora"], dtype, n, h, r, v)
    schedule = Schedule(logits_budget=int(share * n) * 4 * v, tile_bytes=tile)
    monkeypatch.setattr(fused_po.reference.rows, "BLOCK_BYTES", 1 << 16)
    g, results = torch.randn(n, device=DEVICE), []

    def run():
        results[:] = step(operands, labels, g, schedule=schedule)

    run()
    peak = counting.peak_bytes(run, DEVICE) - sum(t.numel() * t.element_size() for t in results)
    bound = schedule.logits_budget + 2 * tile + 7 * 4 * n * (h + r) + 4 * 4 * v * r + 64 * n * 8 + 8 * (1 << 16)
    assert peak <= bound, f"{peak} bytes beyond the results, allowed {bound}"
    assert bound - schedule.logits_budget < v * h * dtype.itemsize, "the bound must catch a copy of the head"


def test_autocast_and_compile(seed):
    operands, labels = problem(NEEDS["lora"], n=24)
    g = torch.randn(24, device=DEVICE)

    def run(hidden, weight, u, low):
        return (fused_po.linear_logps(hidden, weight, labels, low_rank=(u, low)).logps * g).sum()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wanted = [t for t in operands if t.requires_grad]
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            eager = torch.autograd.grad(run(*operands), wanted)
            traced = torch.autograd.grad(compiled(*operands), wanted)
        assert all(torch.equal(a, b) for a, b in zip(eager, traced))
        if enabled:
            rounded = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in operands]
            low = torch.autograd.grad(run(*rounded), [t for t in rounded if t.requires_grad])
            assert all(torch.equal(a.bfloat16(), b) for a, b in zip(eager, low))


def test_errors(seed):
    (hidden, weight, u, low), labels = problem((False,) * 4)
    wrong = {
        "low_rank: got Tensor, expected a tuple": u,
        r"low_rank: got shapes \(60, 4\) and \(1003, 3\)": (u, low[:, :3]),
        r"low_rank: got shapes \(59, 4\)": (u[1:], low),
        r"low_rank: got shapes \(60, 4\) and \(1002, 4\)": (u, low[1:]),
        "with r >= 1": (u[:, :0], low[:, :0]),
        "low_rank: got dtype torch.bfloat16, expected torch.float32": (u, low.bfloat16()),
        "low_rank: got int, expected a torch.Tensor": (u, 3),
    }
    for match, value in wrong.items():
        with pytest.raises((TypeError, ValueError), match=match):
            fused_po.linear_logps(hidden, weight, labels, low_rank=value)
