"""Forward and backward of `linear_kl`: two heads, a tile of logits of each at a time, as head.py does with one.

With D = d KL / d raw of one token, a row of V numbers, and D' = d logp / d raw: d hidden = (g D + g' D') W and so on,
the same sums as in head.py. Both bases are formed while both tiles are there; the reference's is then overwritten.

    keep        forward                          backward
    "nothing"   2: both projections              as over the budget
    "product"   3: and D W (4 with labels)       0
    "basis"     2: D kept, with labels D' too    2: D W, D^T (g hidden)
    over the budget: 2                           4: both projections again, then the same

The unit is a GEMM of the policy's head over all tokens that count; the reference's counts as one if it is as wide. A
gradient of the entropy comes from D' (without a softcap, which makes it project again).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from fused_po.ops import backend as backends
from fused_po.ops.gemm import back_project, gemm_dtype, head_block, operand, project, spans, take
from fused_po.ops.head import Buffers, Head, clear_unused, guarded, in_turns, take_rows
from fused_po.ops.head_backward import HeadBackward, Incoming, counted, empty_gradients
from fused_po.parallel import row_passes
from fused_po.reference import stats_dtype
from fused_po.reference.divergence import ENTROPY, LOGP, NORM, SHIFT, TOKEN_FIELDS


class Other(NamedTuple):
    """The reference's side, and what is asked of both. The fields are scalar arguments of the ops, behind Head's."""

    outer: float
    inner: Optional[float]
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    direction: str
    js_weight: float
    with_labels: bool

    @property
    def form(self) -> Union[str, float]:
        """The direction as a backend takes it."""
        return self.js_weight if self.direction == "js" else self.direction

    @property
    def bases(self) -> int:
        """How many bases a token has: of the KL, and with labels of its log-prob."""
        return 1 + self.with_labels

    def gemm(self, device: torch.device) -> torch.dtype:
        """The dtype of the GEMM's factors."""
        return gemm_dtype(device, self.compute_dtype, self.logits_dtype)


class Side(NamedTuple):
    """What one of the two heads projects."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Optional[Tensor]  # [V]

    def at(self, rows: Optional[Tensor], compute_dtype: torch.dtype, gemm: torch.dtype) -> Side:
        """With some rows of hidden, in the GEMM's dtype."""
        return self._replace(hidden=operand(take_rows(self.hidden, rows), compute_dtype, gemm))


def empty_kept(head: Head, other: Other, hidden: Tensor, n_rows, weight: Tensor) -> Tensor:
    """Room [bases, rows, padded V or H] for what is kept of n_rows scored tokens among hidden [N, H]."""
    shape, dtype = head._replace(budget=head.budget // other.bases).kept_like(hidden, n_rows, weight)
    return hidden.new_empty(other.bases, *shape, dtype=dtype)


class _Tiles:
    """Tiles of both sides' logits, and of the bases that overwrite them where dtypes allow."""

    def __init__(self, head: Head, other: Other, policy: Side, reference: Side, n_rows: int, n_cols: int) -> None:
        self.head, self.other, self.policy, self.reference = head, other, policy, reference
        self.own = Buffers(head, policy.hidden, n_rows, n_cols)
        self.theirs = Buffers(head._replace(logits_dtype=other.logits_dtype), policy.hidden, n_rows, n_cols)

    def project(self, some: slice, columns: slice, weight: Tensor, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logits [rows, columns] of both; weight: the policy's columns, in compute_dtype or to be rounded to it."""
        shape = some.stop - some.start, columns.stop - columns.start
        logits, ref_logits = self.own.logits(*shape), self.theirs.logits(*shape)
        for side, part, compute, out in (
            (self.policy, weight, compute_dtype, logits),
            (self.reference, take(self.reference.weight, columns), self.other.compute_dtype, ref_logits),
        ):
            bias = None if side.bias is None else take(side.bias, columns)
            block = head_block(side.hidden.shape[0], *side.weight.shape, self.head.tile_bytes)
            project(take(side.hidden, some), part, bias, compute, out, block)
        return logits, ref_logits

    def bases(
        self, logits: Tensor, ref_logits: Tensor, labels: Tensor, tokens: Tensor, kept: Optional[Tensor]
    ) -> list[Tensor]:
        """D and, with labels, D' [n, V], written into kept[bases, n, V], or over the tiles: the reference's first."""
        head, other = self.head, self.other
        run = row_passes(backends.get(head.backend), head.shards)
        scaling = head.outer, head.inner
        out = [kept[0] if kept is not None else self.theirs.basis(*logits.shape)]
        both, grads = (logits[None], ref_logits[None]), unit_gradients(tokens[0], 0)
        theirs = other.outer, other.inner
        run.kl_gradient(*both, labels, tokens, grads, scaling, theirs, other.form, False, out[0][None])
        if other.with_labels:
            out.append(kept[1] if kept is not None else self.own.basis(*logits.shape))
            saved = saved_of(tokens)
            run.gradient(logits[None], labels, saved, tokens[ENTROPY], None, None, None, *scaling, out[1][None])
        return out


def tile_rows(head: Head, other: Other, n_cols: int, device: torch.device) -> int:
    """Rows of a tile: logits of both sides, and what is formed of them, within tile_bytes."""
    halves = head._replace(tile_bytes=head.tile_bytes // 2)
    theirs = halves._replace(logits_dtype=other.logits_dtype)
    return min(side.tile_rows(n_cols, device) for side in (halves, theirs))


def saved_of(tokens: Tensor) -> Tensor:
    """What a backend's `gradient` reads of the policy's rows, from the tokens of its `kl`."""
    return torch.stack([tokens[i] for i in (SHIFT, NORM, LOGP)])


def unit_gradients(like: Tensor, which: int) -> Tensor:
    """[3, n] incoming gradients: 1 of the KL (0), of the log-prob (1) or of the entropy (2), none of the others."""
    grads = like.new_zeros(3, like.numel())
    grads[which] = 1
    return grads


class Tile(NamedTuple):
    """A tile of both sides that has been projected, and whose scoring has begun."""

    some: slice  # its rows
    tiles: _Tiles
    logits: tuple[Tensor, Tensor]
    tokens: Callable[[], Tensor]


class _Forward:
    """One forward: tiles are begun, then finished, where other ranks have a part in it one tile later."""

    def __init__(
        self, head: Head, other: Other, policy: Side, reference: Side, labels: Tensor, rows: Optional[Tensor],
        kept: Tensor, n_all: int,
    ) -> None:  # fmt: skip
        """Both sides and labels of the rows that count; kept: of n_all rows."""
        self.head, self.other, self.policy, self.labels, self.rows = head, other, policy, labels, rows
        self.kept, self.n_all = kept, n_all
        self.tokens: Optional[Tensor] = None
        n_cols, device = policy.weight.shape[0], labels.device
        self.step = tile_rows(head, other, head.shards.widest(n_cols), device)
        both = head, other, policy, reference, min(self.step, labels.numel()), n_cols
        self.in_flight = 1 if head.group else 0  # a tile that other ranks are at lies beside the next one
        self.tiles = [_Tiles(*both) for _ in range(1 + self.in_flight)]
        self.run = row_passes(backends.get(head.backend), head.shards)

    def results(self) -> Tensor:
        """The tokens [9, N] of all rows, once every tile is in them."""
        in_turns(self, spans(0, self.labels.numel(), self.step), self.tiles)
        return self.unscored() if self.tokens is None else self.tokens

    def unscored(self) -> Tensor:
        """Tokens of all rows before any tile is in them."""
        wide = stats_dtype(self.head.logits_dtype)
        tokens = self.policy.hidden.new_zeros(TOKEN_FIELDS, self.n_all, dtype=wide)
        tokens[NORM] = torch.inf
        return tokens

    def begin(self, some: slice, tiles: _Tiles) -> Tile:
        """Project some rows of both sides, and begin to compare them."""
        head, other, weight = self.head, self.other, self.policy.weight
        logits = tiles.project(some, slice(0, weight.shape[0]), weight, head.compute_dtype)
        how = (head.outer, head.inner), (other.outer, other.inner), other.form, other.with_labels
        return Tile(some, tiles, logits, self.run.begin_kl(*(v[None] for v in logits), take(self.labels, some), *how))

    def finish(self, tile: Tile) -> None:
        """Store a tile's results, and what is kept of it."""
        (some, tiles, logits, tokens), head, weight = tile, self.head, self.policy.weight
        tokens, part = tokens(), take(self.labels, some)
        where = some if self.rows is None else take(self.rows, some)
        if self.rows is None and part.numel() == self.n_all:
            self.tokens = tokens
        else:
            self.tokens = self.unscored() if self.tokens is None else self.tokens
            self.tokens[:, where] = tokens
        if head.keep == "product":
            for i, d in enumerate(tiles.bases(*logits, part, tokens, None)):
                product = self.kept.new_empty(len(part), self.kept.shape[2])
                block = head_block(self.labels.numel(), *weight.shape, head.tile_bytes)
                back_project(d, weight, head.compute_dtype, product, block)
                self.kept[i, where] = product
        elif head.keep == "basis" and some.start < self.kept.shape[1]:
            within = self.kept[:, some.start : some.stop, : weight.shape[0]]
            n = within.shape[1]
            if n < part.numel():
                logits, part, tokens = [v[:n] for v in logits], part[:n], tokens[:, :n].contiguous()
            tiles.bases(*logits, part, tokens, within)


@guarded
def forward(
    head: Head, hidden: Tensor, other: Other, policy: Side, reference: Side, labels: Tensor, rows: Optional[Tensor],
    n_room: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(tokens [9, N], kept) of labels [N], below 0 where a token does not count; hidden is the policy's.

    rows [n]: numbers of the rows that count, None for all. n_room: at least n, rows to hold room for in `kept`.
    """
    device = hidden.device
    kept = empty_kept(head, other, hidden, n_room, policy.weight)
    n_rows = labels.numel() if rows is None else rows.numel()
    if head.keep == "basis":
        clear_unused(kept, n_rows, policy.weight.shape[0])
    elif rows is not None:
        kept.zero_()
    policy = policy.at(rows, head.compute_dtype, head.gemm(device))
    reference = reference.at(rows, other.compute_dtype, other.gemm(device))
    run = _Forward(head, other, policy, reference, take_rows(labels, rows), rows, kept, labels.numel())
    return run.results(), kept


class _Backward(HeadBackward):
    """The backward over rows whose first n_kept have their bases kept; the rest project both sides again."""

    def __init__(
        self, head: Head, other: Other, policy: Side, reference: Side, labels: Tensor, tokens: Tensor, grads: Tensor,
        active: list[bool], kept: Tensor, index: Optional[Tensor], n_kept: int,
    ) -> None:  # fmt: skip
        """grads [3, N], of which `active` come in at all; labels [N], tokens [9, N] like it."""
        multiples = sum(active) == 1 and not active[2]
        # Multiples of a basis read nothing of the policy's rows.
        rows = Incoming(labels, tokens if multiples else saved_of(tokens), tokens[ENTROPY], *[None] * 3)
        super().__init__(head, policy.hidden, policy.weight, policy.bias, rows, kept[0], index, n_kept)
        self.other, self.policy, self.reference = other, policy, reference
        self.tokens, self.grads, self.active = tokens, grads, active
        self.multiples, self.which = multiples, active.index(True)
        self.factors = grads[self.which]
        self.all_kept = kept[:, :, : policy.weight.shape[0]]
        self.kept = self.all_kept[self.which if self.multiples else 0]

    def tile_rows(self, n_cols: int) -> int:
        """Rows of a tile of n_cols columns."""
        return tile_rows(self.head, self.other, n_cols, self.weight.device)

    def buffers(self, n_rows: int, n_cols: int) -> Buffers:
        """Room for a tile of the policy; the reference's is made beside it."""
        self.tiles = _Tiles(self.head, self.other, self.policy, self.reference, n_rows, n_cols)
        return self.tiles.own

    def tile(self, some: slice, columns: slice, weight: Tensor, buffers: Buffers) -> Tensor:
        """The gradient [rows, columns] in the raw logits; the basis, where each row's gradient is a multiple of it."""
        if self.multiples or some.stop > self.n_kept:
            return super().tile(some, columns, weight, buffers)
        shape = some.stop - some.start, columns.stop - columns.start
        out, room = buffers.basis(*shape), self.tiles.theirs.basis(*shape)
        d, d_logp = (
            kept[some, columns]
            if self.kept_as_is
            else torch.index_select(kept[:, columns], 0, self.index[some], out=to)
            for kept, to in zip(self.all_kept, (room, out))
        )
        g_kl, *others = (g[some].contiguous() for g in self.grads)
        rows = self.rows.at(some)
        if self.active[2]:  # there is no softcap then: see `backward`
            how = rows.labels, rows.saved, rows.logps, rows.entropy, *others, None, self.head.outer, out
            self.run.from_basis(d_logp, *how, first_col=columns.start)
        else:
            torch.mul(d_logp, others[0][:, None], out=out)
        return out.addcmul_(d, g_kl[:, None])

    def recompute(self, some: slice, columns: slice, weight: Tensor, logits: Tensor, out: Tensor) -> Tensor:
        """The gradient, or the one basis asked for, from both projections anew."""
        head, other = self.head, self.other
        compute = head.compute_dtype if weight is self.weight else weight.dtype
        logits, ref_logits = self.tiles.project(some, columns, weight, compute)
        labels, tokens = self.rows.labels[some], self.tokens[:, some].contiguous()
        how = (head.outer, head.inner), (other.outer, other.inner), other.form, other.with_labels
        if len(weight) == len(self.weight) and not head.group:  # whole rows: score them anew
            tokens = self.run.begin_kl(logits[None], ref_logits[None], labels, *how)()
        grads = unit_gradients(tokens[0], self.which) if self.multiples else self.grads[:, some].contiguous()
        both = logits[None], ref_logits[None]
        self.run.kl_gradient(*both, labels - columns.start, tokens, grads, *how, out[None])
        return out


class Saved(NamedTuple):
    """What a backward gets of its forward."""

    policy: Side
    reference: Side
    labels: Tensor  # [N], below 0 where a token does not count
    rows: Optional[Tensor]  # [n]
    tokens: Tensor  # [9, N]
    kept: Tensor

    @property
    def hidden(self) -> Tensor:
        """The policy's."""
        return self.policy.hidden


@guarded
def backward(
    head: Head, saved: Saved, other: Other, grads: list[Optional[Tensor]], needs: list[bool], skip_zero_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the policy's hidden, weight, bias; without elements where not needed.

    grads: of KL, log-prob and entropy, each [N] or None.
    """
    (hidden, weight, bias), reference, labels, rows, tokens, kept = saved
    active = [g is not None for g in grads]
    valid = labels >= 0
    zero = torch.zeros_like(tokens[0])
    grads = torch.where(valid, torch.stack([zero if g is None else g for g in grads]), 0)
    from_kept = head.inner is None or not active[2]  # the softcap's slope does not come back from the basis
    if head.keep == "product" and not active[2]:
        product = head.shards.sum_of_rows(sum(g[:, None] * u for g, u in zip(grads, kept)), rows)
        return product.to(hidden.dtype), *empty_gradients((None, weight, bias), [False] * 3)[1:]
    labels, tokens, grads = (v if rows is None else v[..., rows] for v in (labels, tokens, grads))
    live = grads.any(0)
    n_kept = min(live.numel(), kept.shape[1]) if head.keep == "basis" and from_kept else 0
    kept, index = kept if n_kept == kept.shape[1] else kept[:, :n_kept], None
    if skip_zero_rows or hidden.device.type == "cpu":
        n_live, n_kept = counted(live, n_kept)
        if n_live < live.numel():
            index = torch.nonzero_static(live, size=n_live).squeeze(1)
            labels, tokens, grads = (v[..., index].contiguous() for v in (labels, tokens, grads))
            rows = index if rows is None else rows[index]
    policy = Side(hidden, weight, bias).at(rows, head.compute_dtype, head.gemm(hidden.device))
    reference = reference.at(rows, other.compute_dtype, other.gemm(hidden.device))
    wide = stats_dtype(head.logits_dtype)
    sum_hidden = hidden.new_empty((labels.numel(), hidden.shape[1]) if needs[0] else 0, dtype=wide)
    out = empty_gradients((None, weight, bias), needs)[1:]
    run = _Backward(head, other, policy, reference, labels, tokens, grads, active, kept, index, n_kept)
    run.fill((sum_hidden, *out), needs, False)
    if needs[0] and rows is not None:
        sum_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format).index_copy_(
            0, rows, sum_hidden.to(hidden.dtype)
        )
    return sum_hidden.to(hidden.dtype), *out
