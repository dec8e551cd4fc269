"""`gae` against a float64 loop over tokens: masks, lengths, strides, dtypes, opcheck, and the number of operations."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import BACKENDS, DEVICE, assert_close
from plain_ops import gae_loop
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_po
from fused_po.backend import choose as backends

plain = importlib.import_module("fused_po.reference.gae")  # the package has a function of that name

FEW = settings(max_examples=40, deadline=None)
FACTORS = {
    "default": (1.0, 0.95),
    "both 1": (1.0, 1.0),
    "discounted": (0.99, 0.9),
    "gamma 0": (0.0, 0.5),
    "lam 0": (0.9, 0.0),
}
MASKS = ("none", "half", "holes", "rare", "padded", "empty")


def random_mask(kind, rows, length):
    """[rows, length] or None. The first row of "half" and all rows of "empty" have no token."""
    if kind == "none":
        return None
    place = torch.arange(length, device=DEVICE).expand(rows, length)
    mask = {
        "half": torch.rand(rows, length, device=DEVICE) < 0.5,
        "holes": (place + torch.randint(0, 9, (rows, 1), device=DEVICE)) // 7 % 2 == 0,
        "rare": torch.rand(rows, length, device=DEVICE) < 2 / max(1, length),
        "padded": place < torch.randint(0, length + 1, (rows, 1), device=DEVICE),
        "empty": torch.zeros(rows, length, device=DEVICE, dtype=torch.bool),
    }[kind]
    if kind == "half":
        mask[0] = False
    return mask


def problem(rows, length, kind="none", bootstrap=False, dtype=torch.float32):
    """(rewards, values, mask, last values), with NaN at masked positions."""
    rewards, values = (torch.randn(rows, length, device=DEVICE).to(dtype) for _ in range(2))
    mask = random_mask(kind, rows, length)
    last = torch.randn(rows, device=DEVICE).to(dtype) if bootstrap else None
    if mask is not None:
        rewards, values = (torch.where(mask, x, torch.nan) for x in (rewards, values))
        last = None if last is None else torch.where(mask.any(1), last, torch.nan)
    return rewards, values, mask, last


def in_dtype(inputs, dtype):
    """The inputs in this dtype, with 0 at masked positions, for the loop."""
    return [x if x is None or x.dtype == torch.bool else x.to(dtype).nan_to_num() for x in inputs]


def check(rows, length, kind, bootstrap, factors, backend, dtype=torch.float32):
    """Check `gae` on one problem. The bound is the error of the fp32 loop on at least 64 rows of another problem.

    Errors accumulate along a row, so few rows are few independent samples and their RMS is random. assert_close
    compares only the maximum of fewer than 64 numbers.
    """
    inputs = problem(rows, length, kind, bootstrap, dtype)
    others = problem(max(64, 65536 // length), length, kind, bootstrap, dtype)
    ours = fused_po.gae(*inputs, gamma=factors[0], lam=factors[1], backend=backend)
    exact = gae_loop(*in_dtype(inputs, torch.float64), *factors)
    theirs = zip(*(gae_loop(*in_dtype(others, dtype), *factors) for dtype in (torch.float32, torch.float64)))
    for name, value, precise, baseline in zip(("advantages", "returns"), ours, exact, theirs):
        assert value.shape == (rows, length)
        size = 63 if rows < 64 else rows * length
        for piece, target in zip(value.flatten().split(size), precise.flatten().split(size)):
            assert_close(name, piece, target, [baseline])
        if inputs[2] is not None:
            assert (value[~inputs[2]] == 0).all(), name


def some_rows(backend):
    """The number of rows that a test has time for."""
    return 64 if backend == "reference" or DEVICE == "cuda" else 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bootstrap", (False, True), ids=("ended", "cut off"))
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("length", (1, 2, 33, 70))
def test_against_the_loop(backend, length, kind, bootstrap, seed, poison):
    check(some_rows(backend), length, kind, bootstrap, FACTORS["default"], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("kind", ("none", "half"))
def test_discounts(backend, factors, kind, seed, poison):
    check(some_rows(backend), 65, kind, True, factors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MASKS)
def test_more_than_one_block(backend, kind, seed, poison):
    """The kernel's blocks hold 1024 tokens; a row of "rare" has blocks without any."""
    check(64 if some_rows(backend) == 64 else 1, 2100, kind, True, (1.0, 1.0), backend)


@pytest.mark.parametrize("kind", ("none", "half"))
@pytest.mark.parametrize("rows, length", ((7, 33), (3, 150), (64, 15)))
def test_more_rows_than_one_launch_takes(rows, length, kind, seed, poison, monkeypatch):
    monkeypatch.setattr(plain, "ONE_THREAD", 200)
    monkeypatch.setattr(plain, "SCAN_WIDTH", 4)
    check(rows, length, kind, True, (1.0, 0.99), "reference")


@pytest.mark.parametrize("kind", ("none", "half"))
def test_large(kind, seed, poison):
    check(64, 4096, kind, False, (1.0, 0.99), "reference" if DEVICE == "cpu" else "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0, 0)))
def test_nothing(backend, shape, seed):
    inputs = problem(*shape, "half" if shape[0] else "none", True)
    for result in fused_po.gae(*inputs, backend=backend):
        assert result.shape == shape and result.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_low_precision_inputs_give_fp32(backend, dtype, seed, poison):
    check(some_rows(backend), 33, "half", True, FACTORS["default"], backend, dtype)
    rewards, values, mask, last = problem(3, 33, "half", True, dtype)
    mixed = fused_po.gae(rewards, values.float(), mask, last.float(), backend=backend)
    assert all(map(torch.equal, mixed, fused_po.gae(rewards, values, mask, last, backend=backend)))


@pytest.mark.parametrize("which", (0, 1, 3))
def test_any_float64_input_gives_float64(which, seed):
    inputs = list(problem(3, 33, "half", True))
    inputs[which] = inputs[which].double()
    results = fused_po.gae(*inputs, backend="reference")
    for ours, exact in zip(results, gae_loop(*in_dtype(inputs, torch.float64), 1.0, 0.95)):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_worked_out_by_hand():
    rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[2.0, 9.0, 3.0]])
    mask = torch.tensor([[1, 0, 1]])
    advantages, returns = fused_po.gae(rewards, values, mask, torch.tensor([4.0]), gamma=0.5, lam=0.5)
    # A_2 = 1 + 0.5 * 4 - 3 = 0, A_0 = 0 + 0.5 * 3 - 2 + 0.25 * A_2 = -0.5; returns A + V
    assert advantages.tolist() == [[-0.5, 0.0, 0.0]]
    assert returns.tolist() == [[1.5, 0.0, 3.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, seed, poison):
    base, wide = torch.randn(2, 9, 2 * 37, device=DEVICE), torch.rand(9, 4 * 37, device=DEVICE) < 0.6
    views = {
        "slices": (base[0, 1:4, :35], base[1, 2:5, 3:38], wide[3:6, 20:55]),
        "steps": (base[0, ::3, ::2], base[1, 1::3, 1::2], wide[2::3, ::4]),
        "transposed": (base[0, :, :3].t(), base[1, :, 5:8].t(), wide[:, ::50].t()),
        "expanded": (base[0, :1, :35].expand(3, 35), base[1, 0, 0].expand(3, 35), wide[:1, :35].expand(3, 35)),
    }
    last = torch.randn(2 * 3, device=DEVICE)[::2]
    for name, view in views.items():
        got = fused_po.gae(*view, last, backend=backend)
        expected = fused_po.gae(*(x.contiguous() for x in (*view, last)), backend=backend)
        assert all(map(torch.equal, got, expected)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_equal_in_every_run_and_for_any_masked_values(backend, seed, poison):
    rewards, values, mask, last = problem(3, 300, "half", True)
    first = fused_po.gae(rewards, values, mask, last, backend=backend)
    other = [torch.where(mask, x, torch.inf) for x in (rewards, values)]
    assert all(map(torch.equal, first, fused_po.gae(rewards, values, mask.int() * 2, last, backend=backend)))
    assert all(map(torch.equal, first, fused_po.gae(*other, mask, last, backend=backend)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_rows_stay_alone(backend, seed):
    """Where values are not checked, NaN and infinities stay in their row, at their position and before it."""
    rewards, values = torch.randn(3, 40, device=DEVICE), torch.randn(3, 40, device=DEVICE)
    whole = backends.get(backend).gae(rewards, values, None, None, 1.0, 0.95)
    rewards[1, 20] = torch.nan
    for mask in (None, torch.ones_like(rewards, dtype=torch.bool)):
        for got, expected in zip(backends.get(backend).gae(rewards, values, mask, None, 1.0, 0.95), whole):
            assert got.isnan().sum(1).tolist() == [0, 21, 0]
            torch.testing.assert_close(got[1, 21:], expected[1, 21:])
            torch.testing.assert_close(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient(backend, seed):
    inputs = [torch.randn(2, 5, device=DEVICE, requires_grad=True) for _ in range(2)]
    last = torch.randn(2, device=DEVICE, requires_grad=True)
    assert not any(x.requires_grad for x in fused_po.gae(*inputs, None, last, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind, bootstrap", (("none", False), ("half", True)))
def test_opcheck(backend, kind, bootstrap, seed):
    torch.library.opcheck(torch.ops.fused_po.gae, (*problem(2, 9, kind, bootstrap), 0.9, 0.95, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fullgraph_compile(backend, seed):
    torch.compiler.reset()
    compiled = torch.compile(fused_po.gae, fullgraph=True, backend="aot_eager")
    for inputs in (problem(2, 9), problem(2, 9, "half", True)):
        inputs = [x if x is None or not x.is_floating_point() else x.requires_grad_() for x in inputs]
        results = compiled(*inputs, gamma=0.9, backend=backend)
        assert all(map(torch.equal, results, fused_po.gae(*inputs, gamma=0.9, backend=backend)))


def test_autocast_changes_nothing(seed):
    inputs = problem(3, 33, "half", True)
    expected = fused_po.gae(*inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(map(torch.equal, fused_po.gae(*inputs), expected))


@st.composite
def small(draw):
    """(rewards, values, mask) in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    rewards, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, torch.rand(shape, generator=generator) < draw(st.sampled_from((0.1, 0.5, 0.9, 1.0)))


@FEW
@given(small(), st.floats(0, 1))
def test_with_lam_1_returns_are_discounted_rewards(case, gamma):
    rewards, values, mask = case
    advantages, returns = fused_po.gae(rewards, values, mask, gamma=gamma, lam=1.0)
    for row, (r, m) in enumerate(zip(rewards, mask)):
        r = r[m]
        expected = [sum(gamma ** (k - t) * float(r[k]) for k in range(t, len(r))) for t in range(len(r))]
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(returns[row][m], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(advantages[row][m], expected - values[row][m], rtol=1e-9, atol=1e-9)


@FEW
@given(small(), st.data(), st.floats(0, 1), st.floats(0, 1))
def test_positions_that_do_not_count_change_nothing(case, data, gamma, lam):
    rewards, values, mask = case
    n_extra = data.draw(st.integers(0, 20))
    order = torch.tensor(data.draw(st.permutations(range(mask.shape[1] + n_extra))))
    kept = order < mask.shape[1]  # positions of the real columns, in order, among n_extra masked ones
    wide = [torch.full((len(mask), len(order)), torch.nan, dtype=torch.float64) for _ in range(2)]
    wide_mask = torch.zeros(len(mask), len(order), dtype=torch.bool)
    for target, source in zip((*wide, wide_mask), (rewards, values, mask)):
        target[:, kept] = source
    results = fused_po.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for got, expected in zip(fused_po.gae(*wide, wide_mask, gamma=gamma, lam=lam), results):
        torch.testing.assert_close(got[:, kept], expected, rtol=1e-10, atol=1e-10)
        assert (got[:, ~kept] == 0).all()


R = torch.zeros(2, 3)
BROKEN = torch.tensor([[0.0, torch.nan, 0.0], [0.0, 0.0, 0.0]])
BAD = [
    (lambda: fused_po.gae(R, R[:, :2]), ValueError, r"values: got shape \(2, 2\), expected \(2, 3\)"),
    (lambda: fused_po.gae(R[0], R[0]), ValueError, r"rewards: got shape \(3,\), expected \[B, T\]"),
    (lambda: fused_po.gae(R.long(), R), TypeError, "rewards: got dtype torch.int64"),
    (lambda: fused_po.gae(R, R.tolist()), TypeError, "values: got list, expected a torch.Tensor"),
    (lambda: fused_po.gae(R, R, R[:1]), ValueError, r"mask: got shape \(1, 3\), expected \(2, 3\)"),
    (lambda: fused_po.gae(R, R, None, R[0]), ValueError, r"last_values: got shape \(3,\), expected \(2,\)"),
    (lambda: fused_po.gae(R, R, gamma=1.01), ValueError, "gamma: got 1.01, allowed are numbers from 0 to 1"),
    (lambda: fused_po.gae(R, R, lam=-0.1), ValueError, "lam: got -0.1, allowed are numbers from 0 to 1"),
    (lambda: fused_po.gae(R, R, lam=True), TypeError, "lam: got bool, expected a number"),
    (lambda: fused_po.gae(R, R, gamma=float("nan")), ValueError, "gamma: got nan"),
    (lambda: fused_po.gae(BROKEN, R), ValueError, "rewards: got nan at flat position 1, allowed are finite numbers"),
    (lambda: fused_po.gae(R, BROKEN, R + 1), ValueError, "values: got nan at flat position 1"),
    (lambda: fused_po.gae(R, R, None, torch.tensor([0, torch.inf])), ValueError, "last_values: got inf"),
    (lambda: fused_po.gae(R, R, backend="tritton"), ValueError, "backend: got 'tritton', allowed are 'triton'"),
    (lambda: fused_po.gae(R.double(), R, backend="triton"), ValueError, "backend: 'triton' cannot run on dtype"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[row[2] for row in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Work(TorchDispatchMode):
    """Counts PyTorch operations, inside custom operators too, and the elements they produce."""

    operations = numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = OPDEFS.get(func._schema.name)
        if inside is not None:
            with self:
                return inside._init_fn(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        self.operations += 1
        self.numbers += sum(value.numel() for value in tree_leaves(out) if isinstance(value, torch.Tensor))
        return out


@pytest.mark.parametrize("kind", ("none", "half"))
def test_a_twentieth_of_the_loops_operations(kind, seed):
    """The scan runs at most a twentieth of the loop's operations, and produces only a few times as many elements.

    Each operation costs microseconds on the host. Times are not compared: they depend on the machine.
    """
    rewards, values, mask, _ = problem(64, 4096, kind)
    with Work() as theirs:
        gae_loop(rewards, values, mask, None, 1.0, 0.95)
    with Work() as ours:
        fused_po.gae(rewards, values, mask, backend="reference")
    assert theirs.operations >= 20 * ours.operations > 0
    assert ours.numbers <= 4 * theirs.numbers
