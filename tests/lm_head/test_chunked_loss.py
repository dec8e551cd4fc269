"""`chunked_loss`: the loss and gradients of the whole batch, with 3 GEMMs and within the budget."""

import counting
import pytest
import torch
from numerics import DEVICE, IGNORE, random_labels

import fused_po
from fused_po import Schedule, losses
from fused_po.lm_head.chunked import chunks_of

PAIRS, T, H, V = 6, 5, 16, 300
ROW = 4 * 304


def pair_of_token():
    """[2B, T]: the chosen answers, then the rejected ones, so that the tokens of a pair are not adjacent."""
    return torch.arange(PAIRS, device=DEVICE).repeat(2)[:, None].expand(2 * PAIRS, T)


def dpo_share(rows, logps, ref):
    """A chunk's share of the mean DPO loss, from the statistics of its tokens."""
    sequence = rows // T
    sums = torch.zeros(2 * PAIRS, device=rows.device, dtype=logps.dtype).index_add(0, sequence, logps)
    pairs = (sequence % PAIRS).unique()
    margins = losses.dpo(sums[pairs], sums[pairs + PAIRS], ref[pairs], ref[pairs + PAIRS], beta=0.5)
    return margins.sum() / PAIRS


def problem(dtype=torch.float32, needs=(True, True, True)):
    shapes = (2 * PAIRS, T, H), (V, H), (V,)
    tensors = [(torch.randn(s, device=DEVICE) / 2).to(dtype).requires_grad_(need) for s, need in zip(shapes, needs)]
    return *tensors, random_labels(2 * PAIRS * T, V).view(2 * PAIRS, T)


NEEDS = {"all": (True,) * 3, "hidden": (True, False, False), "head": (False, True, False)}
CASES = [("reference", need, rows) for need in NEEDS for rows in (0, 1, 11, 10**6)]
CASES += [("triton", "all", 0), ("triton", "all", 11), ("triton", "hidden", 11)]


@pytest.mark.parametrize(
    "backend, needs, rows_kept", [(b, NEEDS[need], rows) for b, need, rows in CASES], ids=map(str, CASES)
)
@pytest.mark.parametrize("outputs", (("logps",), ("logps", "entropy", "lse")), ids=("logps", "all"))
def test_chunks_equal_the_whole_batch(backend, outputs, needs, rows_kept, seed):
    hidden, weight, bias, labels = problem(needs=needs)
    ref = torch.randn(2 * PAIRS, device=DEVICE)
    trained = [t for t in (hidden, weight, bias) if t.requires_grad]

    def share(stats, rows):
        value = dpo_share(rows, stats.logps, ref)
        return value if len(outputs) == 1 else value + (0.1 * stats.entropy + 0.01 * stats.lse.square()).sum()

    how = dict(outputs=outputs, backend=backend, temperature=0.8)
    whole = fused_po.linear_logps(hidden, weight, labels, bias, **how)
    flat = type(whole)(*(None if v is None else v.flatten() for v in whole))
    expected = share(flat, torch.arange(labels.numel(), device=DEVICE))
    schedule = Schedule(logits_budget=rows_kept * ROW, tile_bytes=7 * ROW)
    got = fused_po.chunked_loss(share, hidden, weight, labels, pair_of_token(), bias, schedule=schedule, **how)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(3 * got, trained), torch.autograd.grad(3 * expected, trained)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_three_gemms_at_any_number_of_tokens(seed):
    hidden, weight, _, labels = problem()
    ref = torch.zeros(2 * PAIRS, device=DEVICE)
    unit = 2 * int((labels != IGNORE).sum()) * H * V
    sizes = []

    def share(stats, rows):
        sizes.append(rows.numel())
        return dpo_share(rows, stats.logps, ref)

    schedule = Schedule(logits_budget=2 * T * ROW)  # one pair, or two where many tokens are ignored

    def run(weight):
        fused_po.chunked_loss(share, hidden, weight, labels, pair_of_token(), schedule=schedule).backward()

    assert counting.flops(lambda: run(weight)) == 3 * unit
    assert len(sizes) >= 3 and sum(sizes) == labels.numel()
    assert counting.flops(lambda: run(weight.detach())) == 2 * unit


def test_a_low_precision_head_is_rounded_once(seed):
    """The sum over chunks is fp32, so its error against float64 is one rounding for any number of chunks.

    On a GPU the gradient of the logits is also rounded to bf16 for the GEMM: half a unit for each element.
    """
    hidden, weight, _, labels = problem(torch.bfloat16)
    labels = labels.clamp(min=0)
    groups = torch.arange(labels.numel(), device=DEVICE).view(labels.shape)
    schedule = Schedule(logits_budget=2 * ROW)  # two tokens per chunk

    def share(stats, rows):
        return stats.logps.sum()

    fused_po.chunked_loss(share, hidden, weight, labels, groups, schedule=schedule).backward()
    h, w = hidden.detach().double(), weight.detach().double().requires_grad_()
    logits = h @ w.T
    logits.log_softmax(-1).gather(-1, labels[..., None]).sum().backward()
    error = (weight.grad.double() - w.grad).abs()
    d_logits = torch.nn.functional.one_hot(labels, V) - logits.detach().softmax(-1)
    unit = 2.0**-8 if DEVICE == "cuda" else 2.0**-20
    terms = torch.einsum("btv,bth->vh", d_logits.abs(), h.abs())
    assert weight.grad.dtype == torch.bfloat16
    assert (error <= w.grad.abs() * 2**-8 + 1.1 * unit * terms + 1e-6).all()


def test_second_backward_no_grad_and_groups_in_any_order(seed):
    hidden, weight, _, labels = problem()
    groups = torch.randint(-3, 3, labels.shape, device=DEVICE)
    schedule = Schedule(logits_budget=9 * ROW)
    seen = []

    def share(stats, rows):
        seen.append(rows)
        return stats.logps.square().sum()

    loss = fused_po.chunked_loss(share, hidden, weight, labels, groups, schedule=schedule)
    flat = groups.flatten()
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(labels.numel(), device=DEVICE))
    assert not set().union(*(flat[a].tolist() for a in seen[:1])) & set(flat[torch.cat(seen[1:])].tolist())
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (hidden, weight))))
    with torch.no_grad():
        alone = fused_po.chunked_loss(share, hidden, weight, labels, groups, schedule=schedule)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, loss)


@pytest.mark.parametrize(
    "sizes, limit, expected",
    [
        ([2, 3, 1], 5, [[0, 1], [2]]),
        ([2, 3, 1], 1, [[0], [1], [2]]),
        ([9, 1, 1], 2, [[0], [1, 2]]),
        ([2, 3, 1], None, [[0, 1, 2]]),
        ([], 3, [[]]),
        ([0, 0, 4], 3, [[0, 1], [2]]),
    ],
)
def test_chunks_are_whole_groups_within_the_limit(sizes, limit, expected):
    groups = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size + 1)], dtype=torch.long)
    scored = torch.tensor([int(i > 0) for size in sizes for i in range(size + 1)], dtype=torch.long)
    mixed = torch.randperm(len(groups))
    chunks = chunks_of(groups[mixed], scored[mixed].long() - 1, -1, limit)
    assert [sorted(set(groups[mixed][rows].tolist())) for rows in chunks] == expected


def test_bad_calls(seed):
    hidden, weight, _, labels = problem()
    groups, other = pair_of_token(), torch.ones((), requires_grad=True)

    def run(loss_fn=lambda stats, rows: stats.logps.sum(), groups=groups, **how):
        return fused_po.chunked_loss(loss_fn, hidden, weight, labels, groups, **how)

    run().backward()
    bad = [
        (lambda: run(3), TypeError, "loss_fn: got int, expected a function"),
        (lambda: run(lambda stats, rows: stats.logps), ValueError, "loss_fn: returned shape"),
        (lambda: run(lambda stats, rows: 1.0), ValueError, "loss_fn: returned float"),
        (lambda: run(lambda stats, rows: stats.logps.sum() * other), ValueError, "loss_fn: its loss depends on"),
        (lambda: run(groups=groups[:2]), ValueError, "groups: got shape"),
        (lambda: run(groups=groups.float()), TypeError, "groups: got dtype"),
        (lambda: run(schedule=Schedule(num_scored=3)), ValueError, "schedule: got num_scored"),
        (lambda: run(outputs=("entropi",)), ValueError, "outputs: got 'entropi'"),
    ]
    for call, error, message in bad:
        with pytest.raises(error, match=message):
            call()
