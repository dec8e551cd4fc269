"""What our ops cost: the GEMMs, passes and allocations of ops/head.py and ops/kl_head.py, without running them.

Sizes of tiles, blocks and what is kept come from the ops' own functions. tests/planner/test_planned_costs.py holds
FLOPs to the counted ones exactly, and bytes up to what grows with the number of tokens alone.
"""

from __future__ import annotations

from fused_po.ops import kl_head
from fused_po.ops.gemm import head_block, padded
from fused_po.planner.communication import steps_of as collectives
from fused_po.planner.work import Cost, Step, Work

TOKEN_BYTES = 64  # labels, statistics, masks and incoming gradients of a token, about


def tiles_of(rows: int, at_once: int) -> int:
    """How many tiles hold the rows."""
    return -(-rows // max(1, at_once))


def gemm(name: str, shape: tuple[int, int, int], times_read: int, sizes: tuple[int, int, int]) -> Step:
    """[m, k] @ [k, n]; times_read: how often the second factor is read; sizes: of an element of both and the result."""
    m, k, n = shape
    a, b, out = sizes
    return Step(name, "gemm", 2 * m * k * n, m * k * a + times_read * k * n * b + m * n * out, count=max(1, times_read))


class Plan:
    """The sizes all figures below are made of."""

    def __init__(self, work: Work) -> None:
        self.work, self.head = work, work.head
        w, head = work, work.head
        self.factor = head.gemm(w.device).itemsize  # bytes of a number in the GEMMs' factors and in the basis
        self.logit = head.logits_dtype.itemsize
        self.kl = w.kl_bases > 0
        self.tile_rows = self.rows_at_once(w.columns)
        self.cast = w.dtype != head.gemm(w.device)
        self.subset = w.scored < w.tokens
        self.block = head_block(w.scored, w.columns, w.hidden, head.tile_bytes)
        self.kept = w.kept_rows
        whole = self.kept == w.scored and w.kl_bases < 2 and not w.entropy  # one GEMM makes the head's gradient
        as_wide = w.dtype.itemsize == self.logit
        self.own_sums = not w.needs[1] or as_wide or (whole and not self.cast)
        self.columns_at_once = w.columns if self.own_sums else self.block
        self.back_rows = max(1, min(self.rows_at_once(self.columns_at_once), w.scored))
        self.blocks = tiles_of(w.columns, self.columns_at_once)
        # Where a row's gradient is no multiple of one basis, a tile is made of the kept ones too.
        self.multiples = not w.entropy and w.kl_bases < 2

    @property
    def basis_row(self) -> int:
        """Bytes of what a budget keeps of a token."""
        columns = padded(self.work.columns, self.head.gemm(self.work.device))
        return max(1, self.work.kl_bases) * columns * self.factor

    def rows_at_once(self, columns: int) -> int:
        """Rows of a tile of so many columns."""
        if self.kl:
            return kl_head.tile_rows(self.head, self.work.other, columns, self.work.device)
        return self.head.tile_rows(columns, self.work.device)

    def tiles(self, rows: int, columns: int, bases: int, logits: bool = True) -> dict[str, int]:
        """Bytes of the buffers for a tile: of the logits (of both sides for the KL), and of `bases` of other dtype."""
        wide, narrow = (
            rows * padded(columns, d) * d.itemsize for d in (self.head.logits_dtype, self.head.gemm(self.work.device))
        )
        found = {"tile: logits": wide * (1 + self.kl)} if logits else {}
        if bases and (self.factor != self.logit or not logits):
            found["tile: basis"] = narrow * bases
        return found


def forward_steps(plan: Plan) -> list[Step]:
    """GEMMs and row passes of a forward."""
    w, n, read = plan.work, plan.work.scored, tiles_of(plan.work.scored, plan.tile_rows)
    columns, own, f, l = w.columns, w.dtype.itemsize, plan.factor, plan.logit
    steps = [gemm("scores", (n, w.hidden, columns), read, (f, own, l))]
    if plan.kl:
        steps.append(gemm("reference's scores", (n, w.ref_hidden, columns), read, (f, own, l)))
    sides, bases = 1 + plan.kl, max(1, w.kl_bases)
    formed = {"nothing": 0, "product": n, "basis": plan.kept}[w.keep]
    again = plan.kl * sides * formed * l  # the KL's bases are formed by a pass after that of the statistics
    moved = columns * (sides * n * l + bases * formed * f + again)
    steps.append(Step("statistics and basis" if formed else "statistics", "pass", 0, moved, count=read))
    if w.keep == "product":
        steps += [gemm("basis x head", (n, columns, w.hidden), read, (f, own, l)) for _ in range(bases)]
    return steps


def backward_steps(plan: Plan) -> list[Step]:
    """GEMMs and row passes of a backward from kept bases, and of what is computed again."""
    w, n, kept = plan.work, plan.work.scored, plan.kept
    columns, own, f, l = w.columns, w.dtype.itemsize, plan.factor, plan.logit
    anew = n - kept
    again, sides = tiles_of(anew, plan.back_rows), 1 + plan.kl
    pieces = again + (1 if plan.multiples else tiles_of(kept, plan.back_rows)) * (kept > 0)
    steps = []
    if anew:
        steps.append(gemm("scores again", (anew, w.hidden, columns), again, (f, own, l)))
        if plan.kl:
            steps.append(gemm("reference's scores again", (anew, w.ref_hidden, columns), again, (f, own, l)))
        steps.append(Step("basis again", "pass", 0, columns * anew * (sides * l + f), count=again * plan.blocks))
    if kept and not plan.multiples:
        steps.append(Step("gradient from bases", "pass", 0, columns * kept * f * (1 + max(1, w.kl_bases))))
    if w.needs[0]:
        step = gemm("hidden's gradient", (n, columns, w.hidden), pieces, (f, own, l))
        steps.append(step._replace(moved=step.moved + 2 * (plan.blocks - 1) * n * w.hidden * l))
    if w.needs[1]:
        steps.append(gemm("head's gradient", (columns, n, w.hidden), 1, (f, f, own if plan.own_sums else l)))
        if w.bias:
            steps.append(gemm("bias's gradient", (columns, n, 1), 1, (f, f, l)))
    return steps


def forward_moments(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes allocated in the forward, and in the reference's of its own, which runs while what is kept is there."""
    w, n, work_rows = plan.work, plan.work.scored, min(plan.tile_rows, plan.work.scored)
    wide, keep = plan.logit, w.keep
    lasting = {"tokens": w.tokens * TOKEN_BYTES}
    if keep == "product":
        lasting["kept: basis x head, fp32"] = max(1, w.kl_bases) * w.tokens * w.hidden * wide
    elif plan.kept:
        lasting["kept: basis"] = plan.kept * plan.basis_row
    copies = (plan.subset or plan.cast) * n * plan.factor
    passing = {"hidden, scored tokens": copies * (w.hidden + plan.kl * w.ref_hidden)}
    in_place = keep == "basis" and plan.kept == n and plan.factor == wide and not plan.kl
    if not in_place:
        bases = {"product": max(1, w.kl_bases), "basis": 0, "nothing": 0}[keep]
        # Where other ranks have a part in it, a tile that is not done yet lies beside the next one.
        turns = 1 + (w.tp > 1 and (keep != "nothing" or plan.kl) and plan.tile_rows < n)
        passing |= {name: turns * size for name, size in plan.tiles(work_rows, w.columns, bases).items()}
    if keep == "product" and (plan.subset or plan.kl):
        passing["tile: basis x head"] = work_rows * w.hidden * wide
    passing["head, cast block"] = plan.cast * plan.block * w.hidden * plan.factor
    moments = {"forward": lasting | passing}
    if w.live_reference:
        moments["reference's forward"] = forward_moments(Plan(w.reference))["forward"] | lasting
    return moments


def backward_moments(plan: Plan, lasting: dict[str, int]) -> dict[str, dict[str, int]]:
    """Bytes allocated at the start of the backward, in the middle and at its end, with what the forward left."""
    w, n, wide, own = plan.work, plan.work.scored, plan.logit, plan.work.dtype.itemsize
    if w.keep == "nothing":
        return {}
    d_hidden = w.tokens * w.hidden * own * w.needs[0]
    narrower = own != wide
    if w.keep == "product":
        one = w.tokens * w.hidden * wide
        if plan.kl:  # g u of each basis, and their sum so far
            return {"backward": lasting | {"hidden's gradient, fp32": (1 + w.kl_bases) * one}}
        return {
            "backward": lasting | {"hidden's gradient, fp32": one, "result: hidden's gradient": narrower * d_hidden}
        }
    start = lasting | {
        "hidden, scored tokens": (plan.subset or plan.cast) * n * plan.factor * w.hidden,
        "result: head's gradient": w.needs[1] * w.columns * (w.hidden + w.bias) * own,
        "hidden's gradient, fp32": w.needs[0] * n * w.hidden * wide,
    }
    scaled = w.needs[1] * plan.multiples * n * w.hidden
    tiles = {}
    if plan.kept < n:
        both = plan.kl and plan.kept and not plan.multiples  # the kept ones' bases have a tile each
        tiles = plan.tiles(plan.back_rows, plan.columns_at_once, 1 + bool(both))
    elif not plan.multiples:
        tiles = plan.tiles(plan.back_rows, plan.columns_at_once, 1 + plan.kl, logits=False)
    if plan.kl:
        tiles["reference's hidden"] = (plan.subset or plan.cast) * n * plan.factor * w.ref_hidden
    middle = start | tiles | {"hidden x incoming gradient": scaled * plan.factor}
    middle["head, cast block"] = plan.cast * plan.block * w.hidden * plan.factor
    if not plan.own_sums:
        middle["head's gradient, fp32 block"] = plan.block * w.hidden * wide
        if plan.kl and plan.kept < n:  # it lies beside the policy's
            middle["reference's head, cast block"] = plan.cast * plan.block * w.ref_hidden * plan.factor
    end = start | {"result: hidden's gradient": (plan.subset or narrower) * d_hidden}
    if plan.kl:  # what the backward of both sides holds, it holds to its end
        end |= tiles
    if plan.subset and narrower:
        end["hidden's gradient, scored tokens"] = w.needs[0] * n * w.hidden * own
    begun = start | {"hidden x incoming gradient": scaled * (wide + (plan.factor != wide) * plan.factor)}
    return {"backward, start": begun, "backward": middle, "backward, end": end}


def held_by(work: Work) -> dict[str, int]:
    """Bytes that are there whoever computes: heads and inputs. The gradients count among what is allocated."""
    size, columns = work.dtype.itemsize, work.columns
    head = columns * (work.hidden + work.bias) * size
    held = {"head": head}
    if work.dp_mode != "ddp" and work.dp > 1:
        held["head, this rank's shard"] = -(-head // work.dp)
    held["hidden"] = work.tokens * work.hidden * size
    if work.live_reference or work.kl_bases:
        held["reference's head"] = columns * work.ref_hidden * size
        held["reference's hidden"] = work.tokens * work.ref_hidden * size
    return held


def ours(work: Work) -> Cost:
    """What fused_po costs on the rank that has most rows of the head."""
    plan = Plan(work)
    steps = forward_steps(plan)
    if work.live_reference:
        steps += [step._replace(name=f"reference's {step.name}") for step in forward_steps(Plan(work.reference))]
    if work.keep == "basis":
        steps += backward_steps(plan)
    moments = forward_moments(plan)
    lasting = {key: value for key, value in moments["forward"].items() if key.startswith(("kept", "tokens"))}
    moments |= backward_moments(plan, lasting)
    return Cost("fused_po", steps + collectives(work, plan.tile_rows), held_by(work), moments)
