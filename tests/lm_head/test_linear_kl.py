"""`linear_kl`: every schedule against float64, FLOPs and memory, and the exact KL inside losses."""

import functools

import counting
import pytest
import torch
from kl_problems import DIRECTIONS, in_torch, loss_of, pair
from numerics import BACKENDS, DEVICE, IGNORE, RUNS, assert_close, random_labels
from registered_ops import opcheck

import fused_po
from fused_po import Schedule
from fused_po.backend.interface import Divergence, Scaling
from fused_po.ops.kl import KLSettings
from fused_po.parallel.vocab import WHOLE

ROW = 4 * 208  # bytes of a padded fp32 row of 203 columns


def heads(dtype=torch.float32, n=40, h=16, ref_h=12, v=203):
    """(hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), labels; a third of the labels is ignored."""
    sides = []
    for width in (h, ref_h):
        weight = torch.randn(v, width, device=DEVICE) / width**0.5
        sides.append(
            [t.to(dtype) for t in (torch.randn(n, width, device=DEVICE), weight, torch.randn(v, device=DEVICE))]
        )
    return *sides, random_labels(n, v)


def run_linear(policy, reference, labels, how, **settings_):
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy, reference
    return fused_po.linear_kl(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        labels,
        bias=bias,
        ref_bias=ref_bias,
        direction=how[0],
        js_weight=how[1],
        **settings_,
    )


USES = {"kl": (1, 0, 0), "logps": (0, 1, 0), "kl, logps": (1, 1, 0), "all": (1, 1, 1)}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))
@pytest.mark.parametrize("share", (0.0, 0.4, 1.0))
@pytest.mark.parametrize("how", DIRECTIONS.values(), ids=DIRECTIONS)
def test_linear_in_float64(how, share, frozen, use, seed):
    """Every schedule gives the same values: rows kept, rows projected again, frozen heads, gradients of 0."""
    policy, reference, labels = heads(torch.float64)
    schedule = Schedule(logits_budget=int(share * 40) * 2 * ROW * 2, tile_bytes=14 * ROW * 2)
    g = [u * torch.randn(40, dtype=torch.float64, device=DEVICE) for u in use]
    for part in g:
        part[::5] = 0
    results = []
    for ours in (True, False):
        own = [t.clone().requires_grad_(i == 0 or not frozen) for i, t in enumerate(policy)]
        if ours:
            stats = run_linear(own, reference, labels, how, schedule=schedule)
        else:
            logits = [side[0] @ side[1].T + side[2] for side in (own, reference)]
            stats = in_torch(*logits, labels, *how)
        used = [(v, w) for v, w, u in zip((stats[0], stats[1], stats[3]), g, use) if u]
        sum((v * w).sum() for v, w in used).backward()
        results.append((*(v.detach() for v in stats), *(t.grad for t in own if t.requires_grad)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))
@pytest.mark.parametrize("share", (0.0, 1.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("how", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_errs_no_more_than_plain_pytorch(backend, how, dtype, share, frozen, seed, poison):
    schedule = Schedule(logits_budget=int(share * 40) * 2 * ROW, tile_bytes=14 * ROW)
    found, ours = [], None
    for i in range(RUNS):
        policy, reference, labels = heads(dtype)
        g = torch.randn(3, 40, device=DEVICE)
        sides = []
        for precision in (dtype, torch.float64):
            own = [t.to(precision).detach().requires_grad_(j == 0 or not frozen) for j, t in enumerate(policy)]
            other = [t.to(precision) for t in reference]
            logits = [s[0] @ s[1].T + s[2] for s in (own, other)]
            wide = [v if precision == torch.float64 else v.float() for v in logits]
            values = in_torch(*wide, labels, *how)
            grads = torch.autograd.grad(loss_of(values, g.to(values[0])), [t for t in own if t.requires_grad])
            sides.append([*(t.detach() for t in values), *grads])
        found.append(sides)
        if i == 0:
            own = [t.detach().requires_grad_(j == 0 or not frozen) for j, t in enumerate(policy)]
            stats = run_linear(own, reference, labels, how, schedule=schedule, backend=backend)
            grads = torch.autograd.grad(loss_of(stats, g), [t for t in own if t.requires_grad])
            ours = [*(t.detach() for t in stats), *grads]
    for i, value in enumerate(ours):
        assert_close(f"result {i}", value, found[0][1][i], [(side[0][i], side[1][i]) for side in found])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", DIRECTIONS.values(), ids=DIRECTIONS)
def test_equal_heads_give_exactly_zero(how, backend, seed, poison):
    policy, _, labels = heads()
    hidden, weight = policy[0].clone().requires_grad_(), policy[1].clone().requires_grad_()
    settings_ = dict(direction=how[0], js_weight=how[1], bias=policy[2], ref_bias=policy[2], backend=backend)
    schedule = Schedule(logits_budget=20 * ROW, tile_bytes=30 * ROW)
    stats = fused_po.linear_kl(hidden, weight, policy[0], policy[1], labels, **settings_, schedule=schedule)
    stats.kl.sum().backward()
    assert (stats.kl == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert torch.equal(stats.logps.detach(), stats.ref_logps)


@pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))
@pytest.mark.parametrize("share", (0.0, 0.4, 1.0))
def test_dropping_rows_does_not_change_results(share, frozen, seed):
    """compact=False computes ignored rows too; num_scored drops them without a sync; a mask works like labels."""
    policy, reference, labels = heads(torch.float64)
    scored = int((labels != IGNORE).sum())
    results = []
    for change in ({}, {"compact": False}, {"num_scored": scored}, {"num_scored": min(40, scored + 3)}):
        schedule = Schedule(logits_budget=int(share * 40) * 2 * ROW * 2, tile_bytes=14 * ROW * 2, **change)
        own = [t.clone().requires_grad_(i == 0 or not frozen) for i, t in enumerate(policy)]
        stats = run_linear(own, reference, labels, ("reverse", 0.5), schedule=schedule)
        loss_of(stats, [1.0, 2.0, 0.0 if frozen else 3.0]).backward()
        results.append((*(v.detach() for v in stats), *(t.grad for t in own if t.requires_grad)))
    masked = run_linear(policy, reference, None, ("reverse", 0.5), mask=labels != IGNORE)
    torch.testing.assert_close(masked.kl, results[0][0])
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    too_few = functools.partial(
        run_linear, policy, reference, labels, ("reverse", 0.5), schedule=Schedule(num_scored=1)
    )
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="num_scored: got 1, but"):
            too_few()
    else:  # checking would cost a sync
        assert too_few().kl.isnan().all()


def kl_step(policy, reference, labels, with_labels, schedule):
    """Forward and backward of the KL, or of the KL and the log-probs."""
    stats = run_linear(
        policy,
        reference,
        labels if with_labels else None,
        ("reverse", 0.5),
        schedule=schedule,
        mask=None if with_labels else labels != IGNORE,
    )
    loss = stats.kl.sum() + (stats.logps.sum() if with_labels else 0)
    return torch.autograd.grad(loss, [t for t in policy if t.requires_grad])


@pytest.mark.parametrize("with_labels", (False, True), ids=("kl", "kl and logps"))
def test_gemms_counted_exactly(with_labels, seed):
    """Trainable head: 2G forward, 2G backward, 2G more beyond the budget. Frozen: 3G + 0G (4G + 0G with log-probs)."""
    policy, reference, labels = heads(h=16, ref_h=16)
    unit = 2 * int((labels != IGNORE).sum()) * 16 * 203
    policy = [t.requires_grad_() for t in policy[:2]] + [policy[2]]
    frozen = [policy[0], policy[1].detach(), policy[2]]
    rows = Schedule(logits_budget=1 << 30)
    none = Schedule(logits_budget=0)
    for own, schedule, expected in (
        (policy, rows, 4),
        (policy, none, 6),
        (frozen, rows, 3 + with_labels),
        (frozen, none, 3 + with_labels),
    ):
        assert (
            counting.flops(lambda o=own, s=schedule: kl_step(o, reference, labels, with_labels, s)) == expected * unit
        )
    with counting.FlopCounter() as forward:
        stats = run_linear(frozen, reference, labels, ("reverse", 0.5), schedule=rows)
    assert forward.flops == 4 * unit
    assert counting.flops(lambda: (stats.kl.sum() + stats.logps.sum()).backward()) == 0


@pytest.mark.parametrize("with_labels", (False, True), ids=("kl", "kl and logps"))
@pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))
@pytest.mark.parametrize("share", (0.0, 0.5, 1.0))
def test_memory(share, frozen, with_labels, seed, monkeypatch):
    """The peak beyond the results is at most the budget, a tile of both sides, an fp32 block of the head and O(N H)."""
    n, h, v, tile = 96, 512, 8192, 1 << 20
    schedule = Schedule(logits_budget=int(share * n) * 4 * v, tile_bytes=tile)
    policy, reference, labels = heads(n=n, h=h, ref_h=h, v=v)
    policy = [t.requires_grad_(i == 0 or not frozen) for i, t in enumerate(policy)]
    monkeypatch.setattr(fused_po.reference.rows, "BLOCK_BYTES", 1 << 16)
    kl_step(policy, reference, labels, with_labels, schedule)  # allocate what is allocated only once
    kept = []
    peak = counting.peak_bytes(lambda: kept.append(kl_step(policy, reference, labels, with_labels, schedule)), DEVICE)
    results = sum(t.numel() * t.element_size() for t in kept[0])
    small = 8 * 4 * n * h + 128 * n * 8 + 16 * (1 << 16)
    bound = schedule.logits_budget + 2 * tile + small
    assert 4 * v * h > 3 * (2 * tile + small), "the bound must catch a [V, H] temporary"
    assert peak - results <= bound, f"{peak - results} bytes beyond the results, allowed {bound}"


def test_only_the_policy_gets_a_gradient(seed):
    policy, reference, labels = heads()
    for t in (*policy, *reference):
        t.requires_grad_()
    stats = run_linear(policy, reference, labels, ("reverse", 0.5))
    loss_of(stats, [1, 1, 1]).backward()
    assert all(t.grad is not None for t in policy) and all(t.grad is None for t in reference)
    assert not stats.ref_logps.requires_grad
    logits, ref_logits = (t.requires_grad_() for t in pair(3, 20))
    fused_po.kl_from_logits(logits, ref_logits).kl.sum().backward()
    assert ref_logits.grad is None


def test_opcheck_and_fullgraph(seed):
    policy, reference, labels = heads(n=6, v=30)
    logits, ref_logits = pair(6, 30)
    small = labels.clamp(max=29)

    def both(x, h, w):
        a = fused_po.kl_from_logits(x, ref_logits, small)
        b = fused_po.linear_kl(h, w, *reference[:2], small, direction="js")
        return a.kl.sum() + a.entropy.sum() + b.kl.sum() + b.logps.sum()

    inputs = [t.detach().requires_grad_() for t in (logits, policy[0], policy[1])]
    expected = torch.autograd.grad(both(*inputs), inputs)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        torch.testing.assert_close(a, b)
    settings = KLSettings(Divergence(Scaling(), Scaling(), "reverse", 0.5, True), IGNORE, False, "reference", WHOLE)
    opcheck("kl_fwd", logits.requires_grad_(), ref_logits, small, settings)


# The exact KL inside losses.


def test_dpo_with_the_exact_kl(seed):
    """linear_dpo and dpo_from_logits with kl="full" equal losses.dpo plus the masked mean of kl_from_logits."""
    policy, reference, labels = heads(torch.float64, n=24, v=50)
    labels = labels.view(4, 6)
    results = []
    for form in ("linear", "logits", "torch"):
        hidden, weight = policy[0].clone().requires_grad_(), policy[1].clone().requires_grad_()
        h, ref_h = hidden.view(4, 6, -1), reference[0].view(4, 6, -1)
        how = dict(beta=0.3, kl="full", kl_coef=0.4)
        if form == "linear":
            out = fused_po.linear_dpo(h, weight, labels, ref_h, reference[1], **how)
            loss, kl = out.loss, out.kl_per_token
        elif form == "logits":
            out = fused_po.dpo_from_logits(h @ weight.T, labels, ref_h @ reference[1].T, **how)
            loss, kl = out.loss, out.kl_per_token
        else:
            exact = in_torch(h @ weight.T, ref_h @ reference[1].T, labels, "reverse", 0.5)
            sums = [v.sum(-1).chunk(2) for v in exact[1:3]]
            kl = exact[0]
            loss = fused_po.losses.dpo(*sums[0], *sums[1], beta=0.3).mean() + 0.4 * kl.sum() / (labels != IGNORE).sum()
        results.append((loss.detach(), kl.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for other in results[:2]:
        for a, b in zip(other, results[2]):
            torch.testing.assert_close(a, b)


def test_tdpo_and_grpo_take_the_kl_as_a_tensor(seed):
    policy, reference, labels = heads(torch.float64, n=24, v=50)
    hidden = policy[0].requires_grad_()
    stats = fused_po.linear_kl(hidden, policy[1], *reference[:2], labels, direction="forward")
    per_sequence = [v.view(4, 6).sum(-1).chunk(2) for v in (stats.logps, stats.ref_logps, stats.kl)]
    tdpo = fused_po.losses.tdpo(*per_sequence[0], *per_sequence[1], *per_sequence[2], beta=0.3)
    mask = (labels != IGNORE).view(4, 6)
    old = stats.logps.detach().view(4, 6)
    grpo = fused_po.losses.grpo(stats.logps.view(4, 6), old, torch.randn(4, dtype=torch.float64, device=DEVICE), mask)
    loss = tdpo.mean() + fused_po.aggregate(grpo + 0.1 * stats.kl.view(4, 6), mask)
    loss.backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[labels == IGNORE] == 0).all()
    assert (hidden.grad[labels != IGNORE] != 0).any(-1).all()
