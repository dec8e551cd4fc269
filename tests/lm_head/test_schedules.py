"""The schedules of `linear_logps`: counted FLOPs and memory, and results that do not depend on the schedule."""

import counting
import pytest
import torch
from logps_checks import check_linear
from numerics import BACKENDS, DEVICE, IGNORE, Scaling, product_buffers, random_labels

import fused_po
from fused_po import Schedule

STATS = ("logps", "entropy", "lse")
N, H, V = 60, 32, 1003
ROW = 4 * 1008  # bytes of a padded fp32 row
SHARES = {"nothing": 0.0, "tiny": 0.05, "half": 0.5, "all": 1.0}


def problem(dtype=torch.float32, needs=(True, True), ignored="none", n=N, h=H, v=V):
    """(hidden, weight, labels, incoming gradients)."""
    hidden = torch.randn(n, h, device=DEVICE).to(dtype).requires_grad_(needs[0])
    weight = (torch.randn(v, h, device=DEVICE) / h**0.5).to(dtype).requires_grad_(needs[1])
    return hidden, weight, random_labels(n, v, ignored), torch.randn(n, device=DEVICE)


def step(hidden, weight, labels, g, bias=None, outputs=("logps",), weigh=("logps",), **how):
    """Forward and backward; the gradients of the tensors that require grad."""
    stats = fused_po.linear_logps(hidden, weight, labels, bias, outputs=outputs, **how)
    loss = sum((getattr(stats, name) * g * (1 + i)).sum() for i, name in enumerate(weigh))
    return torch.autograd.grad(loss, [t for t in (hidden, weight, bias) if t is not None and t.requires_grad])


def budget(share, n=N):
    """The budget in bytes that keeps this share of n fp32 rows."""
    return int(share * n) * ROW


def test_the_counter_counts_every_product():
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    x, y, z = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    products = [
        lambda: torch.mm(a, b),
        lambda: torch.mm(a, b, out=c),
        lambda: a @ b,
        lambda: torch.addmm(c, a, b),
        lambda: torch.addmm(c, a, b, out=c),
        lambda: c.addmm_(a, b),
        lambda: torch.nn.functional.linear(a, b.t()),
    ]
    batched = [
        lambda: torch.bmm(x, y),
        lambda: torch.bmm(x, y, out=z),
        lambda: torch.baddbmm(z, x, y),
        lambda: torch.baddbmm(z, x, y, out=z),
        lambda: z.baddbmm_(x, y),
        lambda: torch.matmul(x, y),
    ]
    assert [counting.flops(call) for call in products] == [2 * 3 * 4 * 5] * len(products)
    assert [counting.flops(call) for call in batched] == [2 * 2 * 3 * 4 * 5] * len(batched)
    if DEVICE == "cuda":
        a, b, c = (t.cuda().bfloat16() for t in (a, b, c))
        wide = c.float()
        mixed = [lambda: torch.mm(a, b, out_dtype=torch.float32), lambda: torch.addmm(wide, a, b, out_dtype=wide.dtype)]
        assert [counting.flops(call) for call in mixed] == [2 * 3 * 4 * 5] * 2


@pytest.mark.parametrize("tile_rows", (7, 1000))
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_gemms_counted_exactly(share, tile_rows, seed):
    """No gradients: 1G. Frozen head: 2G, none of it in the backward. Trainable: (4 - f)G. Frozen hidden: (3 - f)G."""
    unit = 2 * N * H * V
    schedule = Schedule(logits_budget=budget(share), tile_bytes=tile_rows * ROW)

    def units(call):
        return counting.flops(call) / unit

    hidden, weight, labels, g = problem()
    how = dict(schedule=schedule)
    with torch.no_grad():
        assert units(lambda: fused_po.linear_logps(hidden, weight, labels, **how)) == 1
    kept = int(share * N) / N
    frozen, plain = weight.detach(), hidden.detach()
    expected = [(weight, hidden, ("logps",), 4 - kept), (weight, plain, ("logps",), 3 - kept)]
    expected += [(frozen, hidden, ("logps",), 2), (frozen, hidden, ("logps", "lse"), 2)]
    expected += [(frozen, hidden, ("logps", "entropy"), 3 - kept), (weight, hidden, STATS, 4 - kept)]
    for w, h, outputs, count in expected:
        got = units(lambda w=w, h=h, o=outputs: step(h, w, labels, g, outputs=o, weigh=o, **how))
        assert got == pytest.approx(count, abs=1e-9), (outputs, w.requires_grad, h.requires_grad)
    with counting.FlopCounter() as forward:
        logps = fused_po.linear_logps(hidden, frozen, labels, **how).logps
    assert forward.flops == 2 * unit
    assert counting.flops(lambda: logps.backward(g)) == 0


def test_ignored_rows_and_rows_without_gradient_cost_nothing(seed):
    hidden, weight, labels, g = problem()
    labels[::3], g[1::3] = IGNORE, 0
    unit = 2 * (N // 3) * H * V
    for share in (0.0, 1.0):
        schedule = Schedule(logits_budget=budget(share), skip_zero_rows=True)
        forward = counting.flops(lambda s=schedule: fused_po.linear_logps(hidden, weight, labels, schedule=s))
        assert forward == 2 * unit
        both = counting.flops(lambda s=schedule: step(hidden, weight, labels, g, schedule=s))
        assert both == (2 + 2 + (share == 0)) * unit


DTYPES = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "bf16 tiles": (torch.bfloat16,) * 2}


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("outputs", (("logps",), ("logps", "entropy")), ids=("logps", "entropy"))
@pytest.mark.parametrize("needs", ((True, True), (True, False), (False, True)), ids=("both", "hidden", "head"))
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("dtype, logits_dtype", DTYPES.values(), ids=DTYPES)
def test_memory(dtype, logits_dtype, share, needs, outputs, autocast, seed, monkeypatch):
    """The peak beyond the results is at most the budget, a tile, an fp32 block of the head and O(N H); no [V, H]."""
    if autocast and dtype != torch.float32:
        pytest.skip("autocast starts from fp32")
    n, h, v, tile = 96, 512, 8192, 1 << 20
    schedule = Schedule(logits_budget=int(share * n) * 4 * v, tile_bytes=tile, logits_dtype=logits_dtype)
    hidden, weight, labels, g = problem(dtype, needs, n=n, h=h, v=v)

    def run():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            kept.append(step(hidden, weight, labels, g, outputs=outputs, weigh=outputs, schedule=schedule))

    monkeypatch.setattr(fused_po.reference.rows, "BLOCK_BYTES", 1 << 16)  # 2 MiB blocks would hide other memory
    kept = []
    run()  # allocate what is allocated only once
    kept = []
    peak = counting.peak_bytes(run, DEVICE)
    results = sum(t.numel() * t.element_size() for t in kept[0])
    # hidden in the GEMMs' dtype, scaled, gathered and unrounded; statistics; row blocks of the reference backend
    small = 6 * 4 * n * h + 64 * n * 8 + 8 * (1 << 16)
    block = tile  # 4 Vb H, fp32
    bound = schedule.logits_budget + tile + block + small
    assert 4 * v * h > 3 * (tile + block + small), "the bound must catch a [V, H] temporary"
    if logits_dtype == torch.bfloat16:
        bound += product_buffers(hidden.detach(), weight.detach())
    assert peak - results <= bound, f"{peak - results} bytes beyond the results, allowed {bound}"


@pytest.mark.parametrize("scaling", (Scaling(), Scaling(0.7, 1.3), Scaling(1.0, 1.0, 3.0)), ids=("plain", "t", "cap"))
@pytest.mark.parametrize("share", (0.0, 0.5, 1.0), ids=("nothing", "half", "all"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_budget_against_float64(backend, dtype, share, scaling, seed, poison):
    """Log-probs, entropy and lse: gradients from the kept basis and, with a softcap, from recomputed logits."""
    hidden = torch.randn(256, 16, device=DEVICE).to(dtype)
    weight = (torch.randn(203, 16, device=DEVICE) / 2).to(dtype)
    bias = torch.randn(203, device=DEVICE).to(dtype)
    labels = random_labels(256, 203)
    n, row = 32, 4 * 208
    schedule = Schedule(logits_budget=int(share * n) * row, tile_bytes=8 * row)
    check_linear(hidden, weight, bias, labels, scaling, backend, schedule, n=n)


@pytest.mark.parametrize("needs", ((True, True), (True, False), (False, True)), ids=("both", "hidden", "head"))
@pytest.mark.parametrize("outputs", (("logps",), STATS), ids=("logps", "all"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_budgets_give_equal_gradients_and_runs_are_bitwise_equal(backend, outputs, needs, seed, poison):
    n, v = 20, 300
    hidden, weight, labels, g = problem(needs=needs, ignored="some", n=n, v=v)
    every = []
    for share in SHARES.values():
        schedule = Schedule(logits_budget=int(share * n) * 4 * 304, tile_bytes=6 * 4 * 304)
        how = dict(backend=backend, schedule=schedule)
        runs = [step(hidden, weight, labels, g, outputs=outputs, weigh=outputs, **how) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs))
        every.append(runs[0])
    for other in every[1:]:
        for a, b in zip(other, every[0]):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_bitwise_equal_whatever_is_kept(backend, dtype, seed, poison):
    """With equal weights, N and layout the log-ratio of policy and reference is exactly 0."""
    n, v = 20, 300
    hidden, weight, labels, _ = problem(dtype, ignored="some", n=n, v=v)
    every = []
    for needs in ((False, False), (True, True), (True, False), (False, True)):
        for share in SHARES.values():
            for outputs in (("logps",), STATS):
                h, w = hidden.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
                schedule = Schedule(logits_budget=int(share * n) * 4 * 304, tile_bytes=6 * 4 * 304)
                how = dict(outputs=outputs, backend=backend, schedule=schedule)
                every.append(fused_po.linear_logps(h, w, labels, **how).logps.detach())
    assert all(torch.equal(every[0], other) for other in every[1:])


@pytest.mark.parametrize("share", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("frozen", (False, True))
def test_retain_graph_checkpoint_hooks_and_compile(frozen, share, seed):
    from torch.utils.checkpoint import checkpoint

    hidden, weight, labels, g = problem(needs=(True, not frozen), ignored="some", n=24)
    schedule = Schedule(logits_budget=budget(share, 24), tile_bytes=5 * ROW)

    def run(h, w):
        return (fused_po.linear_logps(h, w, labels, schedule=schedule).logps * g).sum()

    def grads(loss, **how):
        hidden.grad = weight.grad = None
        loss.backward(**how)
        return [t.grad for t in (hidden, weight) if t.requires_grad]

    loss = run(hidden, weight)
    first = grads(loss, retain_graph=True)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    every = [grads(loss), grads(checkpoint(run, hidden, weight, use_reentrant=False)), grads(compiled(hidden, weight))]
    every.append(grads(checkpoint(run, hidden, weight, use_reentrant=True)))
    with torch.autograd.graph.save_on_cpu():
        every.append(grads(run(hidden, weight)))
    for other in every:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


@pytest.mark.parametrize("bound", (0, 20, 24))
def test_a_given_number_of_scored_tokens(bound, seed):
    """num_scored avoids the sync.

    Exact counts and upper bounds change no result; too low a bound raises or gives NaN.
    """
    hidden, weight, labels, g = problem(n=24)
    labels[:8] = IGNORE
    labels = labels[torch.randperm(24, device=DEVICE)]
    schedule = Schedule(num_scored=bound)

    def run():
        return fused_po.linear_logps(hidden, weight, labels, outputs=STATS, schedule=schedule)

    if bound < 16:
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match="num_scored: got 0, but 16 labels"):
                run()
        torch.compiler.reset()
        assert torch.compile(run, backend="aot_eager", fullgraph=True)().logps.isnan().all()
        return
    results = []
    for how in (Schedule(), schedule):
        stats = fused_po.linear_logps(hidden, weight, labels, outputs=STATS, schedule=how)
        loss = (stats.logps * g + stats.entropy + stats.lse * g).sum()
        results.append((*stats[:3], *torch.autograd.grad(loss, (hidden, weight))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (results[1][0][labels == IGNORE] == 0).all()


def test_the_budget_from_the_environment_and_the_device(monkeypatch, seed):
    hidden, weight, labels, g = problem()
    unit = 2 * N * H * V
    monkeypatch.setenv("FUSED_PO_LOGITS_BUDGET", "0")
    assert counting.flops(lambda: step(hidden, weight, labels, g)) == 4 * unit
    assert counting.flops(lambda: step(hidden, weight, labels, g, schedule=Schedule(logits_budget=1 << 28))) == 3 * unit
    for text in ("many", "-1", "1e9"):
        monkeypatch.setenv("FUSED_PO_LOGITS_BUDGET", text)
        with pytest.raises(ValueError, match=f"FUSED_PO_LOGITS_BUDGET: got '{text}', allowed are integers"):
            step(hidden, weight, labels, g)
    monkeypatch.setenv("FUSED_PO_LOGITS_BUDGET", str(1 << 62))
    with pytest.raises(ValueError, match=r"FUSED_PO_LOGITS_BUDGET: got .* bytes, allowed are 0 to"):
        step(hidden, weight, labels, g)
    monkeypatch.delenv("FUSED_PO_LOGITS_BUDGET")
    assert counting.flops(lambda: step(hidden, weight, labels, g)) == 3 * unit
    with pytest.raises(ValueError, match=r"logits_budget: got .* bytes, allowed are 0 to"):
        step(hidden, weight, labels, g, schedule=Schedule(logits_budget=1 << 62))


@pytest.mark.parametrize("where", ("forward", "backward"))
def test_out_of_memory_names_the_settings_and_frees_everything(where, monkeypatch, seed):
    """A GEMM runs out of memory after a few tiles."""
    import gc
    import weakref

    from fused_po.lm_head import gemm, head, tiles

    hidden, weight, labels, g = problem(n=60)
    schedule = Schedule(logits_budget=3 * ROW, tile_bytes=8 * ROW)
    made = []
    allocate, project, calls = tiles.padded_tile, gemm.project, []

    def noted(*arguments):
        made.append(allocate(*arguments))
        return made[-1]

    def failing(*arguments):
        calls.append(None)
        if len(calls) == (4 if where == "forward" else 11):
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return project(*arguments)

    monkeypatch.setattr(tiles, "padded_tile", noted)
    monkeypatch.setattr(head, "project", failing)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step(hidden, weight, labels, g, schedule=schedule)
    message = str(caught.value)
    assert f"logits_budget (now {3 * ROW} bytes" in message and f"tile_bytes (now {8 * ROW} bytes" in message
    assert "tried to allocate 1 TiB" in message
    tiles = [weakref.ref(t.untyped_storage()) for t in made]
    made.clear()
    gc.collect()
    assert tiles and all(tile() is None for tile in tiles), "a tile outlived the error, while the error is still held"
