"""The cost of other implementations for the same work: eager PyTorch, TRL's built-in head, Liger's DPO.

Their GEMMs and allocations as their own code makes them, held to counted figures by
tests/planner/test_planned_costs.py. None of them shards the vocabulary: under tensor parallelism eager gathers the
logits (transformers' plan for lm_head), the others the head.
"""

from __future__ import annotations

from typing import Optional

from fused_po.planner.communication import data_parallel_steps, scatter_bytes
from fused_po.planner.cost import TOKEN_BYTES, gemm, held_by
from fused_po.planner.work import Cost, Step, Work

TRL_ROWS, TRL_COLUMNS = 4096, 32768  # of TRL's tile
LIGER_LOGIT = 12  # bytes of each logit of a pair at Liger's peak; with a live reference's REF_LOGIT more
REF_LOGIT = 4


def products(work: Work, rows: int, columns: int, times: tuple[int, int, int], accumulated: int) -> list[Step]:
    """Scores, hidden's gradient and the head's, each so many times; accumulated: bytes of the sums of a gradient."""
    size, (n, h, v) = work.dtype.itemsize, (rows, work.hidden, columns)
    shapes = {"scores": (n, h, v), "hidden's gradient": (n, v, h), "head's gradient": (v, n, h)}
    steps = [gemm(name, shape, 1, (size, size, size)) for name, shape in shapes.items()]
    steps = [s._replace(flops=s.flops * k, moved=s.moved * k, count=k) for s, k in zip(steps, times) if k]
    if accumulated and any(times[1:]):
        steps.append(Step("sums of gradients", "pass", moved=accumulated))
    return steps


def whole(work: Work) -> Work:
    """The same work with the whole head on each rank; tensor-parallel ranks then share nothing of it."""
    return work._replace(tp=1)


def gathered_head(work: Work) -> list[Step]:
    """Each tensor-parallel rank gathers the whole head, and gives back the others' part of its gradient."""
    if work.tp == 1:
        return []
    sent = scatter_bytes(work.vocab * work.hidden * work.dtype.itemsize, work.tp)
    times = 1 + any(work.needs) + work.live_reference
    return [Step("head gathered by tensor-parallel ranks", "tp", sent=times * sent, count=times)]


def eager(work: Work) -> Cost:
    """The whole matrix of logits, of its fp32 copy and of its log-softmax; ignored tokens too."""
    n, v, size, bases = work.tokens, work.vocab, work.dtype.itemsize, work.kl_bases
    logits = n * v
    trains = any(work.needs)
    sides = 1 + (bases > 0) + work.live_reference
    steps = products(work, n, work.columns, (1, *work.needs), 0)
    if sides > 1:
        steps.append(gemm("reference's scores", (n, work.ref_hidden, work.columns), 1, (size,) * 3))
    moved = sides * (8 + (size < 4) * (size + 4)) + trains * (4 + 12 + (size < 4) * (size + 4))
    moved += (bases > 0) * (16 + 24 * trains)  # p (log p - log q), and back
    steps.append(Step("log-softmax and its gradient", "pass", moved=moved * logits))
    if work.tp > 1:
        sent = sides * scatter_bytes(logits * size, work.tp)
        steps.append(Step("logits gathered", "tp", sent=sent, count=sides))
    wide = 4 * logits
    moments = {"forward": {"fp32 [tokens, vocab]": (5 if bases else 2) * wide, "tokens": n * TOKEN_BYTES}}
    if trains:
        fp32 = 5 if bases or work.entropy else 3
        moments["gradient of the log-softmax"] = {"fp32 [tokens, vocab]": fp32 * wide, "tokens": n * TOKEN_BYTES}
        moments["products"] = {
            "gradient of the logits": logits * size,
            "result: head's gradient": work.needs[1] * work.columns * work.hidden * size,
            "result: hidden's gradient": work.needs[0] * n * work.hidden * size,
        }
    note = "all tokens, ignored ones too"
    return Cost("eager PyTorch", steps + data_parallel_steps(work, work.columns), held_by(work), moments, note)


def trl(work: Work) -> Optional[Cost]:
    """TRL 1.16's head on a GPU: it drops ignored tokens, scores again in the backward, adds up in fp32."""
    if work.kl_bases:
        return None
    n, v, h, size = work.scored, work.vocab, work.hidden, work.dtype.itemsize
    trains = any(work.needs)
    tiles, chunks = -(-n // TRL_ROWS), -(-v // TRL_COLUMNS)
    sums = 8 * (work.needs[0] * n * h * chunks + work.needs[1] * v * h * tiles)
    steps = products(work, n, v, (1 + trains, *work.needs), sums)
    steps.append(Step("statistics and gradients", "pass", moved=(1 + 2 * trains) * n * v * size))
    if work.live_reference:
        steps += [s._replace(name=f"reference's {s.name}") for s in products(work, n, v, (1, 0, 0), 0)]
        steps.append(Step("reference's statistics", "pass", moved=n * v * size))
    dropped = (work.scored < work.tokens) * n * h * size
    lasting = {"tokens": work.tokens * TOKEN_BYTES, "hidden, scored tokens": dropped}
    tile = {"tile": min(n, TRL_ROWS) * TRL_COLUMNS * size}
    moments = {"forward": lasting | tile}
    if trains:
        wide = {"gradients, fp32": 4 * (work.needs[0] * n * h + work.needs[1] * v * h)}
        cast = {"gradients, cast": (size < 4) * (work.needs[0] * n * h + work.needs[1] * v * h) * size}
        moments |= {"backward": lasting | tile | wide | cast}
        if dropped:
            moments["backward, end"] = {  # the copy of hidden is gone by then
                "tokens": lasting["tokens"],
                "result: head's gradient": work.needs[1] * v * h * size,
                "result: hidden's gradient": work.needs[0] * work.tokens * h * size,
                "hidden's gradient, scored tokens": work.needs[0] * n * h * size,
            }
    steps += gathered_head(work) + data_parallel_steps(work, v)
    return Cost("TRL 1.16", steps, held_by(whole(work)), moments, "scored tokens; an fp32 [V, H] sum")


def liger(work: Work) -> Optional[Cost]:
    """Liger 0.8.5's DPO: one pair at a time, gradients in the forward, all tokens; it sums the head's in its dtype."""
    if work.loss != "dpo":
        return None
    n, v, h, size = work.tokens, work.vocab, work.hidden, work.dtype.itemsize
    pairs = max(1, work.sequences // 2)
    trains = any(work.needs)
    steps = products(work, n, v, (1, *work.needs), work.needs[1] * 3 * v * h * size * pairs)
    steps.append(gemm("reference's scores", (n, work.ref_hidden, v), pairs, (size,) * 3))
    passes = 2 * (8 + (size < 4) * (size + 4)) + trains * (4 + 12 + (size < 4) * (size + 4))
    steps.append(Step("log-softmax and its gradient", "pass", moved=passes * n * v))
    moment = {
        "logits of a pair": -(-n // pairs) * v * (LIGER_LOGIT + REF_LOGIT),
        "head's gradient, sum and summand": 2 * work.needs[1] * v * h * size,
        "hidden's gradient": 2 * work.needs[0] * n * h * size,
        "tokens": n * TOKEN_BYTES,
    }
    steps += gathered_head(work) + data_parallel_steps(work, v)
    note = "all tokens; memory as counted without torch.compile, within a third"
    return Cost("Liger 0.8.5", steps, held_by(whole(work)), {"one pair": moment}, note)
