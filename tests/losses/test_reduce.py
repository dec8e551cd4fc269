"""`sequence_logps`, `aggregate`, `token_weights`: by hand, against loops, over micro-batches and ranks, bad input."""

import pytest
import torch
from plain_ops import aggregate_in_torch

import fused_po
from fused_po.reduce import MODES

F64 = torch.float64
COUNTED = {
    "token-mean": "num_tokens",
    "seq-mean-token-sum": "num_sequences",
    "seq-mean-token-mean": "num_sequences",
    "seq-mean-token-sum-norm": "num_sequences",
}


def test_sequence_logps(seed):
    logps = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    broken = torch.where(mask, logps, torch.nan)  # masked values are not read
    sums = fused_po.sequence_logps(broken, mask)
    expected = torch.stack([row[m].sum() for row, m in zip(logps, mask)])
    torch.testing.assert_close(sums, expected)
    means = fused_po.sequence_logps(broken, mask, average=True)
    torch.testing.assert_close(means, expected / torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64))
    lengths = [2, 0, 5]
    bounds = torch.tensor([0, 2, 2, 7])
    packed = torch.randn(7, dtype=torch.float64, requires_grad=True)
    pieces = packed.split(lengths)
    torch.testing.assert_close(
        fused_po.sequence_logps(packed, cu_seqlens=bounds), torch.stack([p.sum() for p in pieces])
    )
    average = fused_po.sequence_logps(packed, cu_seqlens=bounds.int(), average=True)
    torch.testing.assert_close(average, torch.stack([p.mean() if len(p) else p.sum() for p in pieces]))
    assert torch.autograd.gradcheck(lambda p: fused_po.sequence_logps(p, cu_seqlens=bounds), packed)


def test_low_precision_sums_and_counts_are_fp32():
    logps = torch.full((1, 1001), -1.0, dtype=torch.bfloat16)
    assert fused_po.sequence_logps(logps).tolist() == [-1001.0]
    assert fused_po.sequence_logps(logps, average=True).tolist() == [-1.0]


def ld_oracle(rows, alpha):
    """LD-DPO's sums of 2B lists of log-probs, the chosen answers first."""
    half = len(rows) // 2
    shared = [min(len(rows[i % half]), len(rows[i % half + half])) for i in range(len(rows))]
    return [sum(row[:n]) + alpha * sum(row[n:]) for row, n in zip(rows, shared)]


def test_ld_alpha_by_hand():
    # lengths 3 and 1: shared 1; -1 + 0.5 * (-2 - 4) = -4, and -8 alone
    logps, mask = torch.tensor([[-1.0, -2.0, -4.0], [-9.0, -8.0, -9.0]]), torch.tensor([[1, 1, 1], [0, 1, 0]])
    assert fused_po.sequence_logps(logps, mask, ld_alpha=0.5).tolist() == [-4.0, -8.0]
    packed, bounds = torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([0, 3, 4])
    assert fused_po.sequence_logps(packed, None, bounds, ld_alpha=0.5).tolist() == [-4.0, -8.0]
    # average=True divides by all 3 counted tokens, like TRL's sigmoid_norm
    average = fused_po.sequence_logps(logps, mask, ld_alpha=0.5, average=True)
    torch.testing.assert_close(average, torch.tensor([-4 / 3, -8.0]))


@pytest.mark.parametrize("alpha", (0.0, 0.3, 1.0))
def test_ld_alpha_against_the_loop(alpha, seed):
    logps, mask = torch.randn(8, 9, dtype=F64), torch.rand(8, 9) < 0.5
    mask[2] = False  # an empty chosen answer: all tokens of the rejected answer are in its tail
    broken = torch.where(mask, logps, torch.nan).requires_grad_()
    rows = [row[m].tolist() for row, m in zip(logps, mask)]
    got = fused_po.sequence_logps(broken, mask, ld_alpha=alpha)
    torch.testing.assert_close(got, torch.tensor(ld_oracle(rows, alpha), dtype=F64))
    if alpha == 1:
        torch.testing.assert_close(got, fused_po.sequence_logps(broken, mask))
    got.sum().backward()
    assert torch.equal(broken.grad[~mask], torch.zeros_like(broken.grad[~mask]))
    assert set(broken.grad[mask].unique().tolist()) <= {alpha, 1.0}

    # The same rows packed, with masked tokens in between.
    lengths = torch.randint(0, 7, (8,))
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    packed, packed_mask = torch.randn(int(bounds[-1]), dtype=F64), torch.rand(int(bounds[-1])) < 0.7
    rows = [r[m].tolist() for r, m in zip(packed.split(lengths.tolist()), packed_mask.split(lengths.tolist()))]
    got = fused_po.sequence_logps(packed, packed_mask, bounds.int(), ld_alpha=alpha)
    torch.testing.assert_close(got, torch.tensor(ld_oracle(rows, alpha), dtype=F64))


def test_ld_alpha_gradcheck(seed):
    mask = torch.rand(4, 5) < 0.6
    logps = torch.randn(4, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fused_po.sequence_logps(x, mask, ld_alpha=0.3, average=True), logps)


def lengths_of(mode):
    return {"max_length": 12} if mode == "seq-mean-token-sum-norm" else {}


def test_modes_by_hand():
    loss, mask = (
        torch.tensor([[1.0, 3.0], [5.0, torch.nan], [torch.nan, torch.nan]]),
        torch.tensor([[1, 1], [1, 0], [0, 0]]),
    )
    expected = {
        "token-mean": 3.0,  # (1 + 3 + 5) / 3 tokens
        "seq-mean-token-sum": 4.5,  # (4 + 5) / 2 sequences
        "seq-mean-token-mean": 3.5,  # (2 + 5) / 2
        "seq-mean-token-sum-norm": 0.375,  # 4.5 / 12
    }
    assert set(expected) == set(MODES)
    for mode, value in expected.items():
        assert fused_po.aggregate(loss, mask, mode, **lengths_of(mode)).item() == value
    # TRL counts the empty sequence: 9 / 3
    assert fused_po.aggregate(loss, mask, "seq-mean-token-sum", num_sequences=len(loss)).item() == 3.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", (False, True))
def test_modes_against_the_loop(mode, packed, seed):
    loss, mask = torch.randn(5, 7, dtype=F64), torch.rand(5, 7) < 0.6
    mask[1] = False
    rows, more = [row[m] for row, m in zip(loss, mask)], {}
    if packed:
        loss, mask, more = loss.flatten(), mask.flatten(), {"cu_seqlens": torch.arange(0, 36, 7)}
    got = fused_po.aggregate(loss, mask, mode, **more, **lengths_of(mode))
    torch.testing.assert_close(got, aggregate_in_torch(rows, mode, **lengths_of(mode)))
    assert torch.autograd.gradcheck(
        lambda x: fused_po.aggregate(x, mask, mode, **more, **lengths_of(mode)), loss.requires_grad_()
    )
    if not mask.all():
        broken = torch.where(mask, loss.detach(), torch.nan).requires_grad_()
        fused_po.aggregate(broken, mask, mode, **more, **lengths_of(mode)).backward()
        assert broken.grad.isfinite().all() and not broken.grad[~mask].any()


@pytest.mark.parametrize("as_tensor", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", (False, True))
def test_micro_batches_and_ranks_equal_one_batch(mode, packed, as_tensor, seed):
    """Value and gradient on two ranks, with micro-batches of different sizes and lengths, one of them empty."""
    loss, mask = torch.randn(12, 6, dtype=F64), torch.rand(12, 6) < 0.5
    mask[3:5] = False
    weight = torch.ones((), dtype=F64, requires_grad=True)
    whole = fused_po.aggregate(loss * weight, mask, mode, **lengths_of(mode))
    (exact,) = torch.autograd.grad(whole, weight)
    counts = {"num_tokens": int(mask.sum()), "num_sequences": int(mask.any(1).sum())}
    if as_tensor:
        counts = {name: torch.tensor(count) for name, count in counts.items()}
    ranks = [[range(0, 3), range(3, 5)], [range(5, 6), range(6, 8), range(8, 12)]]
    values, grads = [], []
    for micro_batches in ranks:
        weight.grad, total = None, 0.0
        for rows in micro_batches:
            x, m, more = loss[rows] * weight, mask[rows], {}
            if packed:
                more["cu_seqlens"] = torch.arange(0, 6 * len(rows) + 1, 6)
                x, m = x.flatten(), m.flatten()
            value = fused_po.aggregate(x, m, mode, **more, **counts, **lengths_of(mode), world_size=len(ranks))
            value.backward()
            total += value.item()
        values.append(total)
        grads.append(weight.grad)
    torch.testing.assert_close(torch.tensor(values, dtype=F64).mean(), whole.detach())
    torch.testing.assert_close(torch.stack(grads).mean(), exact)


@pytest.mark.parametrize("counts", ({}, {"num_tokens": 0, "num_sequences": torch.tensor(0)}))
@pytest.mark.parametrize("mode", MODES)
def test_without_counted_tokens_the_loss_is_a_differentiable_zero(mode, counts):
    for shape in ((3, 4), (3, 0), (0, 4)):
        loss = torch.full(shape, torch.nan, requires_grad=True)
        value = fused_po.aggregate(loss, torch.zeros(shape), mode, **counts, **lengths_of(mode))
        value.backward()
        assert value.item() == 0 and not loss.grad.any()


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_compiles(mode, seed):
    torch.compiler.reset()
    loss, mask = torch.randn(3, 5), torch.rand(3, 5) < 0.7
    how = {"num_tokens": torch.tensor(20), "num_sequences": torch.tensor(6), **lengths_of(mode)}
    compiled = torch.compile(fused_po.aggregate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(loss, mask, mode, **how), fused_po.aggregate(loss, mask, mode, **how))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", (False, True))
def test_token_weights_are_those_of_aggregate(mode, packed, seed):
    mask = torch.rand(3, 5) < 0.6
    counts = {COUNTED[mode]: 17} | ({"max_length": 9} if mode == "seq-mean-token-sum-norm" else {})
    if packed:
        mask, counts = mask.flatten(), counts | {"cu_seqlens": torch.tensor([0, 4, 4, 15])}
    losses = torch.randn(mask.shape)
    weights = fused_po.token_weights(mask, mode, **counts)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close((weights * losses).sum(), fused_po.aggregate(losses, mask, mode, **counts))


def test_low_precision_is_summed_in_fp32():
    value = fused_po.aggregate(torch.ones(1, 1001, dtype=torch.bfloat16), None, "seq-mean-token-sum")
    assert value.dtype == torch.float32 and value.item() == 1001


L = torch.zeros(3, 4)
aggregate, sequence_logps = fused_po.aggregate, fused_po.sequence_logps
BAD = [
    (lambda: aggregate(L, None, "token_mean"), ValueError, "mode: got 'token_mean'.*did you mean 'token-mean'"),
    (lambda: aggregate(L, L[:2]), ValueError, r"mask: got shape \(2, 4\), expected \(3, 4\)"),
    (lambda: aggregate(L[0]), ValueError, r"token_loss: got shape \(4,\), expected \[B, T\] without cu_seqlens"),
    (lambda: aggregate(L.long()), TypeError, "token_loss: got dtype torch.int64"),
    (lambda: aggregate(L, None, "seq-mean-token-sum-norm"), ValueError, "max_length: got None, expected a length"),
    (
        lambda: aggregate(L, max_length=4),
        ValueError,
        "max_length: got 4, expected None with mode='token-mean'",
    ),
    (lambda: aggregate(L, None, "seq-mean-token-sum-norm", max_length=0), ValueError, "max_length: got 0"),
    (lambda: aggregate(L, world_size=2), ValueError, "num_tokens: got None, expected the count of the whole step"),
    (lambda: aggregate(L, None, "seq-mean-token-sum", num_tokens=9), ValueError, "num_sequences: got None, expected"),
    (lambda: aggregate(L, num_tokens=-1), ValueError, "num_tokens: got -1, allowed are numbers >= 0"),
    (lambda: aggregate(L, num_tokens=torch.ones(2)), ValueError, r"num_tokens: got shape \(2,\)"),
    (lambda: aggregate(L, num_tokens=9, world_size=0), ValueError, "world_size: got 0, allowed are integers >= 1"),
    (lambda: sequence_logps(L[:2], ld_alpha=1.5), ValueError, "ld_alpha: got 1.5, allowed are numbers from 0 to 1"),
    (lambda: sequence_logps(L, ld_alpha=0.5), ValueError, "logps: got 3 sequences, expected 2B of them"),
    (
        lambda: sequence_logps(L[0], None, torch.tensor([0, 3])),
        ValueError,
        r"cu_seqlens: got \[0, 3\], expected non-decreasing",
    ),
    (lambda: sequence_logps(L[0], None, torch.tensor([0, 3, 2, 4])), ValueError, "cu_seqlens: got .* from 0 to N = 4"),
    (lambda: sequence_logps(L[0], None, torch.tensor([0.0, 4.0])), TypeError, "cu_seqlens: got dtype torch.float32"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[row[2] for row in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
