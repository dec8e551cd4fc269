"""The report of a plan: times on a device, the schedule that runs, what does not fit, and what to change."""

from __future__ import annotations

from typing import NamedTuple, Optional

from fused_po.planner import peers
from fused_po.planner.cost import Sizes, ours
from fused_po.planner.devices import Device, collective_seconds, rate_name
from fused_po.planner.work import Cost, Work

MOST_RANKS = 1024  # over which cutting the vocabulary is tried
WORTH = 0.02  # the share of the time that a larger tile must save to be recommended


class Times(NamedTuple):
    """Seconds of one step on one rank."""

    steps: list[float]
    total: float  # of what nothing else hides; data-parallel collectives run under the rest of the model's backward


def times_of(cost: Cost, work: Work, device: Device) -> Times:
    """Lower bounds of times: GEMMs limited by FLOPs or memory, passes limited by memory, collectives on rings."""
    rate = rate_of(work, device)
    seconds, by_name, total = [], {}, 0.0
    for step in cost.steps:
        if step.kind in ("tp", "dp"):
            ranks, stride = (work.tp, 1) if step.kind == "tp" else (work.dp, work.tp)
            time = collective_seconds(device, step.sent, ranks, stride, step.rounds, step.count)
        else:
            time = max(step.flops / rate, step.moved / device.bandwidth)
        seconds.append(time)
        by_name[step.name] = time
        if step.kind != "dp":
            total += max(0.0, time - by_name.get(step.hidden_by, 0.0)) if step.hidden_by else time
    return Times(seconds, total)


def schedules(work: Work) -> dict[str, Work]:
    """The same work with each schedule."""
    row = Sizes(work).basis_row
    everything = work._replace(needs=(True, True), budget=row * work.scored)
    found = {
        "no gradients": work._replace(needs=(False, False), entropy=False),
        "head frozen": work._replace(needs=(True, False)),
        "head trainable, all tokens kept": everything,
        "head trainable, no tokens kept": everything._replace(budget=0),
    }
    exact = everything._replace(loss="kl", budget=row * work.scored)
    if not work.kl_bases:
        found |= {"exact KL, all tokens kept": exact, "exact KL, no tokens kept": exact._replace(budget=0)}
    return found


def runs(work: Work) -> str:
    """Which schedule will run."""
    if work.keep == "nothing":
        return "no gradients: forward only"
    what = "linear_kl" if work.kl_bases else "linear_logps"
    if work.keep == "product":
        return f"{what}, head frozen: the forward computes the gradient of hidden, the backward has no GEMM"
    if work.kept_rows == work.scored:
        return f"{what}, all scored tokens kept for the backward: nothing is recomputed"
    share = work.kept_rows / work.scored
    return f"{what}, {share:.0%} of the scored tokens kept within the budget; the others are recomputed"


def gemms(cost: Cost, work: Work) -> float:
    """FLOPs in GEMMs over the scored tokens."""
    return cost.flops / (2 * work.scored * work.hidden * work.columns)


def fits(work: Work, free: int) -> bool:
    """Whether the head and the loss fit into so many bytes."""
    return ours(work).total <= free


def with_tokens(work: Work, share: float) -> Work:
    """The work on a share of the tokens."""
    tokens = max(1, int(work.tokens * share))
    return work._replace(tokens=tokens, scored=max(1, min(tokens, int(work.scored * share))))


def smallest_tp(work: Work, free: int) -> Optional[int]:
    """The smallest power of two of ranks for which the sharded vocabulary fits, or None."""
    tp = 2
    while tp <= MOST_RANKS and tp < work.vocab:
        if tp > work.tp and fits(work._replace(tp=tp), free):
            return tp
        tp *= 2
    return None


def largest_budget(work: Work, free: int) -> Optional[int]:
    """The largest budget that fits, up to that of the work, in whole MiB; None if even a budget of 0 does not fit."""
    if not fits(work._replace(budget=0), free):
        return None
    low, high = 0, work.budget >> 20
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(work._replace(budget=middle << 20), free) else (low, middle - 1)
    return low << 20


def tokens_that_fit(work: Work, free: int) -> int:
    """The number of tokens that fit at a time, found by halving the batch; 0 if none fit."""
    share = 1.0
    while share * work.tokens >= 1:
        if fits(with_tokens(work, share), free):
            return with_tokens(work, share).tokens
        share /= 2
    return 0


def advice(work: Work, device: Device, free: int, size) -> list[str]:
    """What to change, most important first. size: a function that formats bytes."""
    cost, sizes, lines = ours(work), Sizes(work), []
    if cost.total > free:
        lines.append(f"does not fit: {size(cost.total)} needed, {size(free)} available")
        budget, tp, tokens = largest_budget(work, free), smallest_tp(work, free), tokens_that_fit(work, free)
        if work.kept_rows and budget is not None:
            lines.append(f"--budget {budget >> 20}MiB fits: tokens beyond it are recomputed, which adds up to one GEMM")
        if tp:
            lines.append(f"--tp {tp} fits: each rank then has {-(-work.vocab // tp)} rows of the head")
        if tokens:
            lines.append(f"{tokens} of the {work.tokens} tokens fit at a time: accumulate gradients over fewer pairs")
        if len(lines) == 1:
            lines.append("no single change is enough: use --tp and fewer pairs, or a larger device")
    elif work.keep == "basis" and work.kept_rows < work.scored:
        whole = work._replace(budget=-(-sizes.basis_row * work.scored >> 20) << 20)
        needed = f"{whole.budget >> 20}MiB"
        if fits(whole, free):
            saved = times_of(cost, work, device).total - times_of(ours(whole), whole, device).total
            lines.append(f"--budget {needed} keeps all tokens and fits: saves {saved * 1e3:.3g} ms per step")
        else:
            other = (
                "" if work.kl_bases else "; chunked_loss recomputes nothing at any budget, but needs an fp32 [V, H] sum"
            )
            lines.append(f"keeping all tokens needs --budget {needed}, which does not fit{other}")
    tile = better_tile(work, device, free)
    if tile:
        saved = times_of(cost, work, device).total - times_of(ours(tile), tile, device).total
        lines.append(
            f"a tile has {sizes.tile_rows} rows, so reading the head for each tile limits the speed: --tile "
            f"{tile.tile_bytes >> 20}MiB fits and saves {saved * 1e3:.3g} ms per step"
        )
    return lines


def better_tile(work: Work, device: Device, free: int) -> Optional[Work]:
    """The work with larger tiles, if reading the head for each tile limits speed and larger tiles fit, else None."""
    best, time = None, times_of(ours(work), work, device).total
    larger = work
    while Sizes(larger).tile_rows < work.scored:
        larger = larger._replace(tile_bytes=2 * larger.tile_bytes)
        faster = times_of(ours(larger), larger, device).total
        if not fits(larger, free) or faster > (1 - WORTH) * time:
            break
        best, time = larger, faster
    return best


def rate_of(work: Work, device: Device) -> float:
    """FLOPs a second of the ops' products."""
    return device.flops.get(rate_name(work.plan.gemm), max(device.flops.values()))


def row_of(cost: Cost, work: Work, device: Device, free: int) -> dict:
    """The figures of one implementation or schedule."""
    return {
        "name": cost.name,
        "GEMMs": gemms(cost, work),
        "flops": cost.flops,
        "seconds": times_of(cost, work, device).total,
        "peak bytes": cost.peak,
        "total bytes": cost.total,
        "sent bytes": sum(step.sent for step in cost.steps if step.kind == "tp"),
        "fits": cost.total <= free,
        "note": cost.note,
    }


def report(work: Work, device: Device, free: int, size) -> dict:
    """The whole report as plain values."""
    cost = ours(work)
    moment, items = cost.at_peak
    times = times_of(cost, work, device)
    others = [found for found in (peer(work) for peer in (peers.eager, peers.trl, peers.liger)) if found]
    sizes = Sizes(work)
    return {
        "ranks": work.tp * work.dp,
        "rows of the head on a rank": work.columns,
        "runs": runs(work),
        "tile rows": sizes.tile_rows,
        "kept tokens": work.kept_rows,
        "held bytes": cost.held,
        "peak": {"moment": moment, "bytes": {name: value for name, value in items.items() if value}},
        "steps": [{**step._asdict(), "seconds": t} for step, t in zip(cost.steps, times.steps)],
        "schedules": [row_of(ours(w)._replace(name=name), w, device, free) for name, w in schedules(work).items()],
        "beside": [row_of(c, work, device, free) for c in (cost, *others)],
        "fits": cost.total <= free,
        "advice": advice(work, device, free, size),
    }
