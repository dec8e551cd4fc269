"""Triton statistics with each row split over several programs, as on a GPU with more multiprocessors than rows."""

import functools
import importlib

import pytest
import torch
from numerics import DEVICE, IGNORE, Scaling, assert_close, count_launches, fresh_seed, oracle, plain, random_labels

import fused_po

pytest.importorskip("triton")
kernels = importlib.import_module("fused_po.kernels.triton.statistics")  # the package has a function of that name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = ("logps", "entropy", "lse", "mean_logits", "log_sum_sq_probs")
ALL_BITS = 63
BLOCK = 4096  # columns per part at these vocabularies
WHOLE, SPLIT = ["statistics_kernel"], ["scan_parts_kernel", "merge_parts_kernel"]
PLAIN, SOFTCAP = Scaling(), Scaling(temperature=1.3, logit_scale=0.5, softcap=5.0)


@functools.cache
def shared_seed() -> int:
    return fresh_seed("test_row_splits.py")


@pytest.fixture
def seed(request):
    """Like the seed of conftest.py, but one for this file, since its tests share problems."""
    torch.manual_seed(shared_seed())
    request.node.user_properties.append(("seed", shared_seed()))
    return shared_seed()


@pytest.fixture
def split(monkeypatch):
    """split(n): from now on rows are split as if the device had n multiprocessors."""

    def choose(processors: int) -> None:
        monkeypatch.setattr(kernels, "multiprocessors", lambda device: processors)

    return choose


def problem(*args, **kwargs):
    """`draw` with the current seed."""
    return draw(torch.initial_seed(), *args, **kwargs)


@functools.cache
def draw(seed: int, v: int, dtype: torch.dtype, scaling: Scaling, masked: bool = False, rows: int = 64):
    """(logits, labels, incoming gradients, exact statistics, exact gradient, plain PyTorch's statistics).

    There are many rows because the error of one row is random; we score only the first few.
    """
    torch.manual_seed(seed)
    logits = (torch.randn(rows, v, device=DEVICE) * 3).to(dtype)
    labels = random_labels(rows, v, "none")
    labels[2] = IGNORE
    if masked:
        mask = torch.rand(rows, v, device=DEVICE) < 0.5
        mask[0] = True  # only the label is left
        mask[1, : v - 5] = True  # full parts of the row
        labels[1] = v - 1
        mask.scatter_(1, labels.clamp(min=0)[:, None], False)
        logits.masked_fill_(mask, -torch.inf)
    grads = {name: torch.randint(0, 2, (rows,), device=DEVICE) * 2.0 - 1 for name in OUTPUTS[:3]}
    exact, exact_grad = oracle(logits, labels, scaling, grads)
    return logits, labels, grads, exact, exact_grad, plain(logits, labels, scaling)


def score(logits, labels, outputs=OUTPUTS, scaling=PLAIN):
    """(TokenStats, names of the kernels launched)."""
    how = dict(scaling._asdict(), outputs=outputs, backend="triton")
    with count_launches() as launched:
        stats = fused_po.logps_from_logits(logits, labels, **how)
    return stats, launched


def check(n, v, dtype, scaling=PLAIN, outputs=OUTPUTS, launches=SPLIT, **how):
    """Compare the first n rows of a problem with the oracle."""
    logits, labels, _, exact, _, theirs = problem(v, dtype, scaling, **how)
    ours, launched = score(logits[:n], labels[:n], outputs, scaling)
    assert launched == launches
    for name in outputs:
        assert_close(name, getattr(ours, name), exact[name][:n], [(theirs[name], exact[name])])
        assert (getattr(ours, name)[labels[:n] == IGNORE] == 0).all(), name


# 32768: full blocks of 4096 columns; 33000: full 16-byte groups; 33003: every row has another alignment.
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "v, processors, parts",
    [
        (32768, 0, 1),
        (32768, 2, 2),
        (32768, 8, 4),
        (32768, 100, 8),
        (33000, 4, 3),
        (33000, 8, 5),
        (33003, 0, 1),
        (33003, 2, 2),
        (33003, 4, 3),
        (33003, 8, 5),
        (33003, 14, 9),
    ],
)
def test_every_output_against_float64(dtype, v, processors, parts, split, seed, poison):
    split(processors)
    assert kernels.row_parts(3, v, BLOCK, processors)[0] == parts
    check(3, v, dtype, launches=SPLIT if parts > 1 else WHOLE)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("v", (32768, 33003))
@pytest.mark.parametrize("scaling, masked", ((PLAIN, True), (SOFTCAP, False)), ids=("masked", "softcap"))
def test_masked_vocabulary_and_softcap(dtype, v, scaling, masked, split, seed, poison):
    split(8)
    check(3, v, dtype, scaling, masked=masked)


@pytest.mark.parametrize("outputs", [(name,) for name in OUTPUTS])
def test_each_output_alone(outputs, split, seed, poison):
    split(8)
    check(2, 33003, torch.bfloat16, outputs=outputs)


def test_the_largest_number_of_parts(split, seed, poison):
    split(1000)
    v = kernels.MAX_PARTS * BLOCK
    assert kernels.row_parts(1, v, BLOCK, 1000) == (kernels.MAX_PARTS, BLOCK)
    check(1, v, torch.bfloat16, rows=16)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_the_gradient_of_split_rows(dtype, split, seed, poison):
    split(8)
    logits, labels, grads, _, exact, _ = problem(33003, dtype, PLAIN)
    results = []
    for n, of in ((3, functools.partial(score, outputs=OUTPUTS[:3])), (len(logits), None)):
        x = logits[:n].clone().requires_grad_()
        stats = of(x, labels[:n])[0]._asdict() if of else plain(x, labels, PLAIN)
        sum((stats[name] * g[:n]).sum() for name, g in grads.items()).backward()
        results.append(x.grad)
    assert_close("gradient", results[0], exact[:3], [(results[1], exact)])
    assert (results[0][2] == 0).all()


@pytest.mark.parametrize("v", (20480, 20603))
def test_is_top1_is_argmax_with_ties_in_several_parts(v, split, seed, poison):
    split(100)
    logits = torch.randint(0, 4, (12, v), device=DEVICE).to(torch.bfloat16)
    first = logits.float().argmax(-1)
    labels = torch.where(torch.arange(12, device=DEVICE) % 2 == 0, first, torch.randint(0, v, (12,), device=DEVICE))
    for row, (a, b) in enumerate(((5, v - 1), (4095, 4096), (4100, 4101), (8191, 12300))):  # two maxima each
        for i, label in ((row, a), (row + 4, b)):
            logits[i, a], logits[i, b], labels[i] = 9, 9, label
    labels[11] = IGNORE
    expected = (logits.float().argmax(-1) == labels) & (labels != IGNORE)
    assert expected[:8].tolist() == [True] * 4 + [False] * 4
    stats, launched = score(logits, labels, ("is_top1",))
    assert launched == SPLIT
    assert torch.equal(stats.is_top1, expected)


def test_columns_that_fp32_cannot_count(split, monkeypatch, seed):
    """The row starts 3 columns before a 16-byte boundary; its maximum is in column 2^24 + 3, which fp32 rounds up."""
    split(1000)
    monkeypatch.setattr(kernels, "launch_shape", lambda *_: {"BLOCK": 4 * BLOCK, "GROUP": 8, "num_warps": 32})
    at = 2**24 + 3
    row = torch.zeros(at + 9, dtype=torch.bfloat16, device=DEVICE)[5:].view(1, -1)
    row[0, at] = 1
    stats, launched = score(row, torch.tensor([at], device=DEVICE), ("is_top1",))
    assert launched == SPLIT
    assert stats.is_top1.tolist() == [True]


def test_ignored_rows_are_not_read(split, seed, poison):
    split(100)
    logits = torch.randn(4, 20603, device=DEVICE)
    logits[2] = torch.nan
    labels = torch.tensor([IGNORE, 7, IGNORE, IGNORE], device=DEVICE)
    *results, saved = kernels.statistics(logits[None], labels, 1.0, None, IGNORE, ALL_BITS)
    for value in torch.cat([r.view(-1, 4) for r in results]):
        assert value[[0, 2, 3]].tolist() == [0, 0, 0]
        assert value[1].isfinite()
    assert (saved[1] == torch.inf).tolist() == [True, False, True, True]
    assert (saved[0] == kernels.LOWEST.value).tolist() == [True, False, True, True]  # the initial value of a maximum


def test_broken_rows_stay_alone(split, seed, poison):
    split(100)
    logits = torch.randn(6, 20603, device=DEVICE)
    logits[1, 5000], logits[2, 20602], logits[3], logits[4, 0] = torch.nan, torch.inf, -torch.inf, torch.nan
    labels = torch.arange(6, device=DEVICE) * 4000
    names = ("logps", "entropy", "log_sum_sq_probs", "is_top1")
    stats, launched = score(logits, labels, names)
    assert launched == SPLIT
    for name in names[:3]:
        assert getattr(stats, name).isnan().tolist() == [False, True, True, True, True, False], name
    alone, _ = score(logits[[0, 5]], labels[[0, 5]], names)
    for name in names:
        assert torch.equal(getattr(stats, name)[[0, 5]], getattr(alone, name)), name


def test_strides(split, seed, poison):
    """Rows of a view with two strides give the results of contiguous rows, with any alignment."""
    split(100)
    base = torch.randn(3, 3, 16500, device=DEVICE)
    labels = random_labels(6, 16400, "some").view(3, 2)
    for begin in (0, 4, 97):
        view = base[:, 1:, begin : begin + 16400]
        stats, launched = score(view, labels)
        assert launched == SPLIT
        for ours, expected in zip(stats, score(view.contiguous(), labels)[0]):
            if ours is not None:  # unaligned rows are summed in another order
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("v", (20480, 20603))
def test_two_runs_are_bitwise_equal(v, split, seed, poison):
    split(100)
    logits, labels = torch.randn(1, 5, v, device=DEVICE), random_labels(5, v)
    with count_launches() as launched:
        a, b = (kernels.statistics(logits.clone(), labels, 0.7, None, IGNORE, ALL_BITS) for _ in range(2))
    assert launched == SPLIT * 2
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_when_rows_are_split():
    for n_rows in (1, 2, 3, 7, 64, 131, 132, 133, 263, 264, 265, 5000):
        for n_cols in (1, 2, 4096, 12288, 12289, 32000, 50257, 151936, 2**20):
            for processors in (0, 1, 16, 108, 132, 304):
                parts, part_cols = kernels.row_parts(n_rows, n_cols, BLOCK, processors)
                blocks = -(-n_cols // BLOCK)
                case = n_rows, n_cols, processors, parts, part_cols
                assert 1 <= parts <= min(blocks, kernels.MAX_PARTS), case
                assert part_cols % BLOCK == 0, case
                assert (parts - 1) * part_cols < n_cols <= parts * part_cols, case  # all columns, no empty part
                if n_rows >= 2 * processors or blocks < 4:
                    assert parts == 1, case
                else:
                    assert parts > 1, case
                    assert (parts - 1) * n_rows < 2 * processors, case  # no more programs than needed


def test_which_devices_split_rows():
    device = torch.zeros((), device=DEVICE).device
    expected = torch.cuda.get_device_properties(device).multi_processor_count if DEVICE == "cuda" else 0
    assert kernels.multiprocessors(device) == expected
    assert kernels.multiprocessors(torch.device("cpu")) == 0
