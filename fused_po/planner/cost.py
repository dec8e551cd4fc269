"""What our ops cost: the GEMMs, passes and allocations of `fused_po.lm_head`, without running them.

Sizes of tiles, blocks and what is kept come from lm_head/plan.py, by which the ops run.
tests/planner/test_planned_costs.py holds FLOPs to the counted ones exactly, and bytes up to what grows with the number
of tokens alone.
"""

from __future__ import annotations

from fused_po.lm_head.plan import BASIS, NOTHING, PRODUCT, BackwardPass, padded
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


class Sizes:
    """The sizes all figures below are made of."""

    def __init__(self, work: Work) -> None:
        self.work, self.plan = work, work.plan
        w, plan = work, work.plan
        self.factor = plan.gemm.itemsize  # bytes of a number in the GEMMs' factors and in the basis
        self.logit = plan.dtypes.logits.itemsize
        self.kl = w.kl_bases > 0
        self.tile_rows = plan.tile_rows(w.columns)
        self.cast = w.dtype != plan.gemm
        self.subset = w.scored < w.tokens
        self.block = plan.head_block(w.scored, w.columns, w.hidden)
        self.kept = w.kept_rows
        # Where a row's gradient is no multiple of one basis, a tile is made of the kept ones too.
        self.one_factor_per_row = not w.entropy and w.kl_bases < 2
        self.backward = plan.backward(
            BackwardPass(
                n_rows=w.scored,
                n_kept=self.kept,
                n_cols=w.columns,
                width=w.hidden,
                weight_dtype=w.dtype,
                grad_dtype=w.dtype,
                need_weight=w.needs[1],
                one_factor_per_row=self.one_factor_per_row,
            )
        )
        self.blocks = tiles_of(w.columns, self.backward.columns)

    @property
    def basis_row(self) -> int:
        """Bytes of what a budget keeps of a token."""
        return max(1, self.work.kl_bases) * padded(self.work.columns, self.plan.gemm) * self.factor

    def tiles(self, rows: int, columns: int, bases: int, logits: bool = True) -> dict[str, int]:
        """Bytes of the buffers for a tile: of the logits (of both sides for the KL), and of `bases` of other dtype."""
        wide, narrow = (rows * padded(columns, d) * d.itemsize for d in (self.plan.dtypes.logits, self.plan.gemm))
        found = {"tile: logits": wide * (1 + self.kl)} if logits else {}
        if bases and (self.factor != self.logit or not logits):
            found["tile: basis"] = narrow * bases
        return found


def forward_steps(sizes: Sizes) -> list[Step]:
    """GEMMs and row passes of a forward."""
    w, n, read = sizes.work, sizes.work.scored, tiles_of(sizes.work.scored, sizes.tile_rows)
    columns, own, f, l = w.columns, w.dtype.itemsize, sizes.factor, sizes.logit
    steps = [gemm("scores", (n, w.hidden, columns), read, (f, own, l))]
    if sizes.kl:
        steps.append(gemm("reference's scores", (n, w.ref_hidden, columns), read, (f, own, l)))
    sides, bases = 1 + sizes.kl, max(1, w.kl_bases)
    formed = {NOTHING: 0, PRODUCT: n, BASIS: sizes.kept}[w.keep]
    again = sizes.kl * sides * formed * l  # the KL's bases are formed by a pass after that of the statistics
    moved = columns * (sides * n * l + bases * formed * f + again)
    steps.append(Step("statistics and basis" if formed else "statistics", "pass", 0, moved, count=read))
    if w.keep == PRODUCT:
        steps += [gemm("basis x head", (n, columns, w.hidden), read, (f, own, l)) for _ in range(bases)]
    return steps


def backward_steps(sizes: Sizes) -> list[Step]:
    """GEMMs and row passes of a backward from kept bases, and of what is computed again."""
    w, n, kept = sizes.work, sizes.work.scored, sizes.kept
    columns, own, f, l = w.columns, w.dtype.itemsize, sizes.factor, sizes.logit
    anew = n - kept
    again, sides = tiles_of(anew, sizes.backward.rows), 1 + sizes.kl
    pieces = again + (1 if sizes.one_factor_per_row else tiles_of(kept, sizes.backward.rows)) * (kept > 0)
    steps = []
    if anew:
        steps.append(gemm("scores again", (anew, w.hidden, columns), again, (f, own, l)))
        if sizes.kl:
            steps.append(gemm("reference's scores again", (anew, w.ref_hidden, columns), again, (f, own, l)))
        steps.append(Step("basis again", "pass", 0, columns * anew * (sides * l + f), count=again * sizes.blocks))
    if kept and not sizes.one_factor_per_row:
        steps.append(Step("gradient from bases", "pass", 0, columns * kept * f * (1 + max(1, w.kl_bases))))
    if w.needs[0]:
        step = gemm("hidden's gradient", (n, columns, w.hidden), pieces, (f, own, l))
        steps.append(step._replace(moved=step.moved + 2 * (sizes.blocks - 1) * n * w.hidden * l))
    if w.needs[1]:
        steps.append(
            gemm("head's gradient", (columns, n, w.hidden), 1, (f, f, own if sizes.backward.written_directly else l))
        )
        if w.bias:
            steps.append(gemm("bias's gradient", (columns, n, 1), 1, (f, f, l)))
    return steps


def forward_moments(sizes: Sizes) -> dict[str, dict[str, int]]:
    """Bytes allocated in the forward, and in a forward of the reference, which runs while the basis is kept."""
    w, n, work_rows = sizes.work, sizes.work.scored, min(sizes.tile_rows, sizes.work.scored)
    wide, keep = sizes.logit, w.keep
    lasting = {"tokens": w.tokens * TOKEN_BYTES}
    if keep == PRODUCT:
        lasting["kept: basis x head, fp32"] = max(1, w.kl_bases) * w.tokens * w.hidden * wide
    elif sizes.kept:
        lasting["kept: basis"] = sizes.kept * sizes.basis_row
    copies = (sizes.subset or sizes.cast) * n * sizes.factor
    passing = {"hidden, scored tokens": copies * (w.hidden + sizes.kl * w.ref_hidden)}
    if not (keep == BASIS and sizes.plan.in_place(sizes.kept, n)):
        bases = {PRODUCT: max(1, w.kl_bases), BASIS: 0, NOTHING: 0}[keep]
        turns = sizes.plan.tiles_at_once(w.tp > 1) if sizes.tile_rows < n else 1
        passing |= {name: turns * size for name, size in sizes.tiles(work_rows, w.columns, bases).items()}
    if keep == PRODUCT and sizes.subset:
        passing["tile: basis x head"] = work_rows * w.hidden * wide
    passing["head, cast block"] = sizes.cast * sizes.block * w.hidden * sizes.factor
    moments = {"forward": lasting | passing}
    if w.live_reference:
        moments["reference's forward"] = forward_moments(Sizes(w.reference))["forward"] | lasting
    return moments


def backward_moments(sizes: Sizes, lasting: dict[str, int]) -> dict[str, dict[str, int]]:
    """Bytes allocated at the start of the backward, in the middle and at its end, with what the forward left."""
    w, n, wide, own = sizes.work, sizes.work.scored, sizes.logit, sizes.work.dtype.itemsize
    if w.keep == NOTHING:
        return {}
    d_hidden = w.tokens * w.hidden * own * w.needs[0]
    narrower = own != wide
    if w.keep == PRODUCT:
        one = w.tokens * w.hidden * wide
        if sizes.kl:  # g u of each basis, and their sum so far
            return {"backward": lasting | {"hidden's gradient, fp32": (1 + w.kl_bases) * one}}
        return {
            "backward": lasting | {"hidden's gradient, fp32": one, "result: hidden's gradient": narrower * d_hidden}
        }
    start = lasting | {
        "hidden, scored tokens": (sizes.subset or sizes.cast) * n * sizes.factor * w.hidden,
        "result: head's gradient": w.needs[1] * w.columns * (w.hidden + w.bias) * own,
        "hidden's gradient, fp32": w.needs[0] * n * w.hidden * wide,
    }
    scaled = w.needs[1] * sizes.one_factor_per_row * n * w.hidden
    tiles = {}
    if sizes.kept < n or not sizes.one_factor_per_row:  # tiles are projected again, or formed from the kept bases
        tiles = sizes.tiles(sizes.backward.rows, sizes.backward.columns, 1, logits=sizes.kept < n)
    if sizes.kl:
        tiles["reference's hidden"] = (sizes.subset or sizes.cast) * n * sizes.factor * w.ref_hidden
    middle = start | tiles | {"hidden x incoming gradient": scaled * sizes.factor}
    middle["head, cast block"] = sizes.cast * sizes.block * w.hidden * sizes.factor
    if not sizes.backward.written_directly:
        middle["head's gradient, fp32 block"] = sizes.block * w.hidden * wide
        if sizes.kl and sizes.kept < n:  # it lies beside the policy's
            middle["reference's head, cast block"] = sizes.cast * sizes.block * w.ref_hidden * sizes.factor
    end = start | {"result: hidden's gradient": (sizes.subset or narrower) * d_hidden}
    if sizes.kl:
        end["reference's hidden"] = tiles["reference's hidden"]
    if sizes.subset and narrower:
        end["hidden's gradient, scored tokens"] = w.needs[0] * n * w.hidden * own
    begun = start | {"hidden x incoming gradient": scaled * (wide + (sizes.factor != wide) * sizes.factor)}
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
    sizes = Sizes(work)
    steps = forward_steps(sizes)
    if work.live_reference:
        steps += [step._replace(name=f"reference's {step.name}") for step in forward_steps(Sizes(work.reference))]
    if work.keep == BASIS:
        steps += backward_steps(sizes)
    moments = forward_moments(sizes)
    lasting = {key: value for key, value in moments["forward"].items() if key.startswith(("kept", "tokens"))}
    moments |= backward_moments(sizes, lasting)
    return Cost("fused_po", steps + collectives(work, sizes.tile_rows), held_by(work), moments)
