"""Changes that must not affect a result (constants, orders, splits, packing, schedules, layouts), or in a known way.

Checked in float64, where only rounding may differ, and bit for bit where even rounding must be equal.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICE, IGNORE

import fused_po
from fused_po import Schedule
from fused_po.reduce import MODES

FEW = settings(max_examples=25, deadline=None)
F64 = torch.float64
SEEDS = st.integers(0, 2**31)
OUTPUTS = ("logps", "entropy", "lse", "mean_logits", "log_sum_sq_probs")
DIRECTIONS = st.sampled_from((("reverse", 0.5), ("forward", 0.5), ("js", 0.3)))


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype).to(DEVICE) for shape in shapes]


def some_labels(seed: int, shape: tuple[int, ...], v: int, ignored: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, v, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE).to(DEVICE)


def alike(a, b, **how) -> None:
    """Equal up to the rounding of float64 sums."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **{"rtol": 1e-10, "atol": 1e-10, **how})


def same(a, b) -> None:
    """Equal bit for bit."""
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def of_logits(logits, labels, scale=1.0, **how):
    """[log-prob, entropy, lse, ..., gradient of the logits]."""
    logits = logits.detach().requires_grad_()
    stats = fused_po.logps_from_logits(logits, labels, outputs=OUTPUTS, **how)
    loss = (stats.logps - 0.3 * stats.entropy + 0.7 * stats.lse.square() / 100).sum() * scale
    return [*(v.detach() for v in stats if v is not None), *torch.autograd.grad(loss, logits)]


def of_head(hidden, weight, labels, bias=None, outputs=OUTPUTS, scale=1.0, **how):
    """[log-prob, ..., gradients of hidden, weight, bias]."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    stats = fused_po.linear_logps(*leaves[:2], labels, *leaves[2:], outputs=outputs, **how)
    loss = (stats.logps - 0.3 * stats.entropy + 0.7 * stats.lse).sum() * scale
    return [*(v.detach() for v in stats if v is not None), *torch.autograd.grad(loss, leaves)]


@st.composite
def views(draw):
    """Logits as a slice, step or transpose of a larger tensor with up to four dimensions, and labels."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    base = torch.randn([2 * n + 3 for n in shape], generator=generator).to(DEVICE)
    base = base.permute(draw(st.permutations(range(len(shape)))))
    index = []
    for size in base.shape:
        begin = draw(st.integers(0, size - 1))
        index.append(slice(begin, draw(st.integers(begin + 1, size)), draw(st.integers(1, 3))))
    logits = base[tuple(index)]
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)
    ignored = torch.rand(labels.shape, generator=generator) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    return logits, labels.masked_fill(ignored, IGNORE).to(DEVICE)


@FEW
@given(views(), st.floats(0.1, 10), st.booleans())
def test_any_view_equals_its_contiguous_copy(problem, temperature, inplace):
    logits, labels = problem
    results = []
    for x in (logits, logits.contiguous()):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_() * 1.0
        how = {"temperature": temperature, "outputs": ("logps", "entropy"), "inplace_backward": inplace}
        stats = fused_po.logps_from_logits(x, labels, **how)
        results.append((*stats[:2], torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), x)[0]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@FEW
@given(SEEDS, st.integers(1, 40), st.floats(-50, 50), st.floats(-50, 50), DIRECTIONS)
def test_a_constant_added_to_a_row_changes_nothing(seed, v, constant, other, how):
    logits, ref = draw(seed, (4, v), (4, v))
    labels = some_labels(seed, (4,), v)

    def values(a, b):
        x = (logits + a).requires_grad_()
        stats = fused_po.logps_from_logits(x, labels, outputs=("logps", "entropy", "log_sum_sq_probs"))
        kl = fused_po.kl_from_logits(x, ref + b, labels, direction=how[0], js_weight=how[1]).kl
        total = stats.logps.sum() + stats.entropy.sum() + kl.sum()
        return [stats.logps, stats.entropy, stats.log_sum_sq_probs, kl, *torch.autograd.grad(total, x)]

    rows = torch.linspace(-1, 1, 4, dtype=F64, device=DEVICE)[:, None]
    alike(values(0, 0), values(constant * rows, other * rows))


@FEW
@given(SEEDS, st.integers(1, 9), st.integers(1, 60))
def test_the_order_of_rows(seed, n, v):
    (logits,), labels = draw(seed, (n, v), dtype=torch.float32), some_labels(seed, (n,), v)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    found, expected = of_logits(logits[order], labels[order]), [value[order] for value in of_logits(logits, labels)]
    if DEVICE == "cuda":  # the order in which a kernel sums a row depends on the row's alignment to 16 bytes
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        same(found, expected)


@FEW
@given(SEEDS, st.integers(1, 9), st.integers(1, 60), st.integers(0, 9), st.integers(1, 4000))
def test_the_order_of_the_vocabulary_and_of_the_rows_of_a_head(seed, n, v, kept, tile):
    hidden, weight, bias = draw(seed, (n, 5), (v, 5), (v,))
    labels, generator = some_labels(seed, (n,), v), torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(n, generator=generator).to(DEVICE), torch.randperm(v, generator=generator).to(DEVICE)
    place = torch.argsort(columns)
    moved = torch.where(labels == IGNORE, IGNORE, place[labels.clamp(min=0)])
    schedule = Schedule(logits_budget=kept * 8 * 64, tile_bytes=tile)
    *stats, d_hidden, d_weight, d_bias = of_head(hidden, weight, labels, bias, schedule=schedule)
    expected = [*(s[rows] for s in stats), d_hidden[rows], d_weight[columns], d_bias[columns]]
    alike(of_head(hidden[rows], weight[columns], moved[rows], bias[columns], schedule=schedule), expected)
    logits = hidden @ weight.T
    *stats, grad = of_logits(logits, labels)
    alike(of_logits(logits[:, columns], moved), [*stats, grad[:, columns]])


@FEW
@given(SEEDS, st.integers(2, 12), st.integers(1, 40), st.data())
def test_a_batch_in_parts(seed, n, v, data):
    hidden, weight = draw(seed, (n, 5), (v, 5))
    labels, at = some_labels(seed, (n,), v), data.draw(st.integers(1, n - 1))
    *stats, d_hidden, d_weight = of_head(hidden, weight, labels)
    first, second = (of_head(hidden[part], weight, labels[part]) for part in (slice(at), slice(at, n)))
    joined = [torch.cat(pair) for pair in zip(first[:-1], second[:-1])]
    alike([*joined, first[-1] + second[-1]], [*stats, d_hidden, d_weight])


SCHEDULES = st.builds(
    dict,
    logits_budget=st.none() | st.integers(0, 10).map(lambda rows: rows * 8 * 64),
    tile_bytes=st.none() | st.integers(1, 4000),
    compact=st.booleans(),
    skip_zero_rows=st.booleans(),
)


@FEW
@given(SEEDS, st.integers(0, 8), st.integers(1, 5), st.integers(1, 60), SCHEDULES, st.none() | st.integers(0, 3))
def test_the_schedule_changes_only_rounding(seed, n, width, v, schedule, excess):
    hidden, weight, ref_hidden, ref_weight = draw(seed, (n, width), (v, width), (n, 2), (v, 2))
    labels = some_labels(seed, (n,), v)
    if excess is not None and schedule["compact"]:
        schedule = schedule | {"num_scored": min(n, int((labels != IGNORE).sum()) + excess)}
    schedule = Schedule(**schedule)
    alike(of_head(hidden, weight, labels, schedule=schedule), of_head(hidden, weight, labels))
    results = []
    for how in (schedule, None):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = fused_po.linear_kl(*leaves, ref_hidden, ref_weight, labels, softcap=4.0, schedule=how)
        results.append([*stats, *torch.autograd.grad((stats.kl + stats.logps).sum(), leaves)])
    alike(*results)


@FEW
@given(SEEDS, st.integers(1, 4), st.integers(1, 8), st.booleans(), st.sampled_from((None, 0.0, 0.4)))
def test_packed_equals_padded(seed, pairs, length, average, ld_alpha):
    """Hidden states of 2B answers with and without padding: log-probs, sequences, and the loss of the batch."""
    v, generator = 17, torch.Generator().manual_seed(seed)
    hidden, weight = draw(seed, (2 * pairs, length, 4), (v, 4))
    lengths = torch.randint(0, length + 1, (2 * pairs,), generator=generator).to(DEVICE)
    mask = torch.arange(length, device=DEVICE) < lengths[:, None]
    labels = torch.where(mask, some_labels(seed, (2 * pairs, length), v, 0.0), IGNORE)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    how, results = dict(average=average, ld_alpha=ld_alpha), []
    for packed in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        h, y, m = (leaves[0][mask], labels[mask], None) if packed else (leaves[0], labels, mask)
        more = {"cu_seqlens": bounds} if packed else {}
        logps = fused_po.linear_logps(h, leaves[1], y).logps
        values = [fused_po.sequence_logps(logps, m, **more, **how)]
        for mode in MODES:
            norm = {"max_length": 9} if mode.endswith("norm") else {}
            values.append(fused_po.aggregate(logps, m, mode, **more, **norm))
        total = sum((i + 1) * value.sum() for i, value in enumerate(values))
        results.append([*values, *torch.autograd.grad(total, leaves)])
    alike(*results)


def dpo_of(hidden, weight, ref_hidden, labels, linear, **how):
    """[losses, rewards, ..., gradient of hidden or logits]."""
    x = (hidden if linear else hidden @ weight.T).detach().requires_grad_()
    if linear:
        out = fused_po.linear_dpo(x, weight, labels, ref_hidden, weight, **how)
    else:
        out = fused_po.dpo_from_logits(x, labels, ref_hidden @ weight.T, **how)
    grad = torch.autograd.grad(out.losses.sum() + out.chosen_logps.sum(), x)[0]
    return [
        out.losses,
        out.chosen_logps,
        out.rejected_logps,
        out.chosen_rewards,
        out.rejected_rewards,
        out.margins,
    ], grad


@FEW
@given(SEEDS, st.integers(1, 5), st.integers(1, 4), st.booleans(), st.sampled_from((None, "k1", "k3", "full")))
def test_the_order_of_pairs(seed, pairs, length, linear, kl):
    hidden, weight, ref = draw(seed, (2 * pairs, length, 3), (11, 3), (2 * pairs, length, 3))
    labels = some_labels(seed, (2 * pairs, length), 11)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    both = torch.cat([order, order + pairs])
    values, grad = dpo_of(hidden, weight, ref, labels, linear, kl=kl)
    moved, moved_grad = dpo_of(hidden[both], weight, ref[both], labels[both], linear, kl=kl)
    alike([*moved, moved_grad], [*(v[order] for v in values), grad[both]])


@FEW
@given(SEEDS, st.integers(1, 4), st.booleans())
def test_swapping_chosen_and_rejected(seed, pairs, linear):
    """Swapping chosen and rejected changes the sign of each margin, and the loss becomes -log s(-h)."""
    hidden, weight, ref = draw(seed, (2 * pairs, 3, 3), (11, 3), (2 * pairs, 3, 3))
    labels, turned = some_labels(seed, (2 * pairs, 3), 11), torch.arange(2 * pairs).roll(pairs)
    (losses, *values), _ = dpo_of(hidden, weight, ref, labels, linear)
    (other, *swapped), _ = dpo_of(hidden[turned], weight, ref[turned], labels[turned], linear)
    chosen, rejected, chosen_reward, rejected_reward, margins = values
    alike(swapped, [rejected, chosen, rejected_reward, chosen_reward, -margins])
    alike([other], [torch.nn.functional.softplus(margins)])
    alike([losses], [torch.nn.functional.softplus(-margins)])


@FEW
@given(SEEDS, st.integers(1, 8), st.integers(1, 60), st.integers(-20, 20), SCHEDULES)
def test_gradients_scale_with_the_incoming_gradient(seed, n, v, power, schedule):
    """Scaling the incoming gradient by a power of two scales gradients exactly."""
    hidden, weight = draw(seed, (n, 4), (v, 4), dtype=torch.float32)
    labels, scale = some_labels(seed, (n,), v), 2.0**power
    *_, grad = of_logits(hidden @ weight.T, labels)
    same(of_logits(hidden @ weight.T, labels, scale)[-1:], [grad * scale])
    how = dict(schedule=Schedule(**schedule))
    *_, d_hidden, d_weight = of_head(hidden, weight, labels, **how)
    same(of_head(hidden, weight, labels, scale=scale, **how)[-2:], [d_hidden * scale, d_weight * scale])


@FEW
@given(SEEDS, st.integers(1, 8), st.integers(1, 300), SCHEDULES, DIRECTIONS, st.sampled_from((None, 5.0)))
def test_equal_policy_and_reference_have_zero_kl(seed, n, v, schedule, how, softcap):
    """Log-ratio, KL and its gradient are exactly 0, for any inputs that require grad and any budget."""
    hidden, weight = draw(seed, (2 * n, 4), (v, 4), dtype=torch.bfloat16)
    labels, tile = some_labels(seed, (2 * n,), v), schedule["tile_bytes"]
    policy = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    same_tiles = dict(softcap=softcap, schedule=Schedule(tile_bytes=tile, compact=schedule["compact"]))
    logps = fused_po.linear_logps(*policy, labels, softcap=softcap, schedule=Schedule(**schedule)).logps
    with torch.no_grad():
        assert torch.equal(logps, fused_po.linear_logps(hidden, weight, labels, **same_tiles).logps)
    stats = fused_po.linear_kl(
        *policy,
        hidden,
        weight,
        labels,
        direction=how[0],
        js_weight=how[1],
        softcap=softcap,
        schedule=Schedule(**schedule),
    )
    assert not stats.kl.any() and torch.equal(stats.logps, stats.ref_logps)
    assert not any(g.any() for g in torch.autograd.grad(stats.kl.sum(), policy))
    stacked = hidden.view(2, n, 4), weight, labels.view(2, n), hidden.view(2, n, 4), weight
    out = fused_po.linear_dpo(*stacked, softcap=softcap, schedule=Schedule(**schedule), kl="k3")
    assert not out.margins.any() and not out.kl_per_token.any()
    logits = (hidden @ weight.T).view(2, n, v)
    out = fused_po.dpo_from_logits(logits, labels.view(2, n), logits, softcap=softcap, kl="full")
    assert not out.margins.any() and not out.kl_per_token.any()
