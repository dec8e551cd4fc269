"""Communication of the ranks for the head: bytes sent per rank, by the formulas of ring collectives."""

from __future__ import annotations

from fused_po.planner.work import Step, Work

FIELDS = 3  # of a token's record: shift, norm and the label's log-prob; one more for each other output
KL_FIELDS = {1: 5, 2: 8}  # the same of both sides and the divergence, by the bases kept of a token


def all_gather_bytes(rows: int, tile_rows: int, fields: int, ranks: int) -> int:
    """Bytes a rank sends for the statistics of `rows` tokens: of each tile of n fp32 [fields, n + 1] to all others.

    The last column is a number in which the ranks must agree.
    """
    tiles = -(-rows // tile_rows)
    return (ranks - 1) * 4 * fields * (rows + tiles)


def all_reduce_bytes(size: int, ranks: int) -> int:
    """Bytes a rank sends to sum `size` bytes over a ring: a reduce-scatter and an all-gather."""
    return 2 * scatter_bytes(size, ranks)


def scatter_bytes(size: int, ranks: int) -> int:
    """Bytes a rank sends to reduce-scatter `size` bytes, or to gather its own and the others' shards of them."""
    return (ranks - 1) * -(-size // ranks) if ranks > 1 else 0


def data_parallel_steps(work: Work, columns: int) -> list[Step]:
    """Gradients and shards of the head among data-parallel ranks; `columns` rows of the head on each."""
    if work.dp == 1:
        return []
    size = columns * (work.hidden + work.bias) * work.dtype.itemsize
    sent, steps = scatter_bytes(size, work.dp), []
    gathers = {"ddp": 0, "fsdp": 1, "zero3": 2}[work.dp_mode]
    if gathers:
        steps.append(Step("head gathered", "dp", sent=gathers * sent, count=gathers))
    if work.needs[1] and work.dp_mode == "ddp":
        steps.append(Step("head's gradient summed", "dp", sent=2 * sent, rounds=2))
    elif work.needs[1]:
        steps.append(Step("head's gradient summed and scattered", "dp", sent=sent))
    return steps


def steps_of(work: Work, tile_rows: int) -> list[Step]:
    """The collectives of one step: statistics of each tile, hidden's gradient, and what data parallelism sends."""
    steps = []
    if work.tp > 1:
        tiles = -(-work.scored // tile_rows)
        fields = KL_FIELDS.get(work.kl_bases, FIELDS + work.entropy)
        sent = all_gather_bytes(work.scored, tile_rows, fields, work.tp)
        steps.append(Step("statistics gathered", "tp", sent=sent, count=tiles, hidden_by="scores" if tiles > 1 else ""))
        if work.live_reference:
            sent = all_gather_bytes(work.scored, tile_rows, FIELDS, work.tp)
            steps.append(Step("reference's statistics gathered", "tp", sent=sent, count=tiles))
        if work.needs[0]:
            sent = all_reduce_bytes(work.scored * work.hidden * 4, work.tp)
            under = "head's gradient" if work.needs[1] else ""
            steps.append(Step("hidden's gradient summed", "tp", sent=sent, rounds=2, hidden_by=under))
    return steps + data_parallel_steps(work, work.columns)
