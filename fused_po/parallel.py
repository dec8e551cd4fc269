"""Heads and logits whose vocabulary is cut over the ranks of a process group.

Each rank scores its own columns with the same row passes as ever. What it found goes into one record a token (shift,
norm, log-prob of the label, and what the outputs need), one all_gather tells every rank all records, and a merge in
rank order, the same on every rank, gives the whole row's statistics. From then on nothing is missing: the basis and the
gradient of a rank's columns need the row's statistics alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from fused_po import checks
from fused_po.reference import stats_dtype
from fused_po.reference.divergence import (
    CENTER,
    ENTROPY,
    KL,
    LOGP,
    NORM,
    REF_LOGP,
    REF_NORM,
    REF_SHIFT,
    SHIFT,
    TOKEN_FIELDS,
)

KL_FIELDS = [KL, SHIFT, NORM, REF_SHIFT, REF_NORM, LOGP, REF_LOGP, ENTROPY]  # of a record; five without labels


@dataclass(frozen=True)
class VocabParallel:
    """How the rows of a head, or the columns of logits, lie over the ranks of a process group.

    group: the torch.distributed.ProcessGroup. Rank 0 holds the first part of the vocabulary, and so on. Hidden states
        and labels are the same on all its ranks.
    sizes: the rows of each rank, in order; None: the same number on all. A padded vocabulary is one whose last rank
        passes its rows without the padding, and says so here.
    sequence_dim: sequence parallelism: hidden holds this rank's share of the tokens, of this dimension, equal on all
        ranks; the labels are all tokens'. hidden is gathered, and its gradient reduce-scattered.
    partial_grad: the gradient of hidden stays this rank's part of the sum, for code that adds the parts up itself, as
        Megatron's gather_from_sequence_parallel_region does.
    """

    group: Any
    sizes: Optional[tuple[int, ...]] = None
    sequence_dim: Optional[int] = None
    partial_grad: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(f"group: got {type(self.group).__name__}, expected a torch.distributed.ProcessGroup")
        if self.sizes is not None:
            if not isinstance(self.sizes, (tuple, list)):
                raise TypeError(
                    f"sizes: got {type(self.sizes).__name__}, expected a tuple of ints, the rows of each rank"
                )
            sizes, ranks = tuple(self.sizes), self.group.size()
            if len(sizes) != ranks or not all(isinstance(n, int) and n >= 0 for n in sizes) or not any(sizes):
                raise ValueError(f"sizes: got {sizes}, expected the rows of each of the group's {ranks} ranks")
            object.__setattr__(self, "sizes", sizes)
        if self.sequence_dim is not None:
            checks.whole("sequence_dim", self.sequence_dim)
        checks.flags(partial_grad=self.partial_grad)


ProcessGroupLike = Union[None, "dist.ProcessGroup", VocabParallel]


class Shards(NamedTuple):
    """Where a vocabulary lies, as the ops take it: plain values. No group: all of it here."""

    group: str = ""  # the process group's name
    sizes: tuple[int, ...] = ()  # columns of each rank
    partial: bool = False  # the gradient of hidden stays this rank's part of the sum

    @property
    def process_group(self):
        """The group itself."""
        return dist.distributed_c10d._resolve_process_group(self.group)

    def n_cols(self, own: int) -> int:
        """The vocabulary's size, of which `own` columns are here."""
        return sum(self.sizes) if self.group else own

    def widest(self, own: int) -> int:
        """The most columns a rank has: tiles of rows must be cut alike on all ranks."""
        return max(self.sizes) if self.group else own

    def start(self) -> int:
        """The vocabulary index of this rank's first column."""
        return sum(self.sizes[: self.process_group.rank()]) if self.group else 0

    @property
    def adds_up(self) -> bool:
        """Whether the ranks' parts of hidden's gradient are added up here."""
        return bool(self.group) and not self.partial

    def add_up(self, part: Tensor):
        """The sum of every rank's part of a gradient, in place, once what is returned has been waited for."""
        return dist.all_reduce(part, group=self.process_group, async_op=True)

    def sum_of_rows(self, part: Tensor, rows: Optional[Tensor]) -> Tensor:
        """The sum of the ranks' parts [N, H], of which all but `rows` are 0; as it is where nothing is to add up."""
        if not self.adds_up:
            return part
        some = part if rows is None else part[rows]
        self.add_up(some).wait()
        return some if rows is None else part.index_copy_(0, rows, some)


WHOLE = Shards()


def given(process_group: ProcessGroupLike) -> Optional[VocabParallel]:
    """The argument as a VocabParallel."""
    if process_group is None or isinstance(process_group, VocabParallel):
        return process_group
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        got = type(process_group).__name__
        raise TypeError(f"process_group: got {got}, expected a torch.distributed.ProcessGroup or a VocabParallel")
    return VocabParallel(process_group)


def shards_of(cut: Optional[VocabParallel], own: int, name: str) -> Shards:
    """The shards of a vocabulary of which argument `name` has `own` entries here."""
    if cut is None:
        return WHOLE
    sizes = cut.sizes or (own,) * cut.group.size()
    if sizes[cut.group.rank()] != own:
        expected = f"{sizes[cut.group.rank()]}, this rank's size"
        raise ValueError(f"{name}: has {own} entries of the vocabulary, expected {expected}")
    if cut.group.size() == 1:
        return WHOLE
    return Shards(cut.group.group_name, sizes, cut.partial_grad or cut.sequence_dim is not None)


def placed(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], process_group: ProcessGroupLike, name: str = "weight"
) -> tuple[Tensor, Tensor, Optional[Tensor], Shards]:
    """(hidden of all tokens, weight and bias of this rank, where the vocabulary lies); DTensors as plain tensors.

    name: of the argument weight.
    """
    if hasattr(weight, "device_mesh"):
        if process_group is not None:
            raise ValueError(f"process_group: got one with {name} as a DTensor, which knows its own; leave it None")
        return placed_dtensors(hidden, weight, bias, name)
    for value in (hidden, bias):
        if hasattr(value, "device_mesh"):
            raise TypeError(f"{name}: got a plain tensor beside a DTensor; pass all as DTensors, or none (to_local())")
    cut = given(process_group)
    if cut is None:
        return hidden, weight, bias, WHOLE
    if checks.floating(name, weight).ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected [V, H], this rank's rows of the head")
    if cut.sequence_dim is not None and cut.group.size() > 1:
        from torch.distributed._functional_collectives import all_gather_tensor_autograd

        dim = checks.dimension("sequence_dim", cut.sequence_dim, hidden.ndim - 1)
        hidden = all_gather_tensor_autograd(hidden.contiguous(), dim, cut.group)
    return hidden, weight, bias, shards_of(cut, weight.shape[0], name)


def placed_dtensors(hidden: Tensor, weight: Tensor, bias: Optional[Tensor], name: str) -> tuple:
    """`placed` for a head whose DTensor says how it is cut, as parallelize_module with ColwiseParallel leaves it."""
    from torch.distributed.tensor import Partial, Replicate

    mesh, places = weight.device_mesh, weight.placements
    cut = [i for i, place in enumerate(places) if place.is_shard(0)]
    if len(cut) > 1 or any(not place.is_replicate() for i, place in enumerate(places) if i not in cut):
        raise ValueError(
            f"{name}: got a DTensor with placements {places}, allowed are Shard(0) on one dimension of the mesh and "
            "Replicate() on others; a head that FSDP shards must be used inside the module's forward, where it is whole"
        )
    if bias is not None and getattr(bias, "placements", None) != places:
        raise ValueError(f"bias: got {getattr(bias, 'placements', 'a plain tensor')}, expected {places}, as {name} is")
    partial = False
    if hasattr(hidden, "device_mesh"):
        partial = bool(cut) and not hidden.placements[cut[0]].is_replicate()  # cut along the sequence
        whole = [Replicate()] * hidden.device_mesh.ndim
        grads = [Partial() if partial and i == cut[0] else Replicate() for i in range(len(whole))]
        hidden = hidden.redistribute(placements=whole).to_local(grad_placements=grads)
    n_cols, bias = weight.shape[0], None if bias is None else bias.to_local()
    if not cut:
        return hidden, weight.to_local(), bias, WHOLE
    group = mesh.get_group(cut[0])
    most = -(-n_cols // group.size())  # as torch.chunk cuts
    sizes = tuple(max(0, min(most, n_cols - most * rank)) for rank in range(group.size()))
    shards = shards_of(VocabParallel(group, sizes), weight.to_local().shape[0], name)
    return hidden, weight.to_local(), bias, shards._replace(partial=partial and bool(shards.group))


@functools.lru_cache
def ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[ranks] where each rank's columns end."""
    return torch.tensor(sizes, device=device).cumsum(0)


class Sharded:
    """A backend's row passes over this rank's columns, with the results of whole rows."""

    def __init__(self, run: ModuleType, shards: Shards) -> None:
        self.run, self.shards, self.group = run, shards, shards.process_group
        self.first_col = shards.start()

    def owners(self, labels: Tensor, scored: Tensor) -> Tensor:
        """[N]: the rank that has the label's column, -1 where a row is not scored."""
        return torch.where(scored, torch.searchsorted(ends(self.shards.sizes, labels.device), labels, right=True), -1)

    def local(self, labels: Tensor, owner: Tensor) -> Tensor:
        """Labels counted from the first column here, 0 for another rank's, -1 where a row is not scored."""
        here = torch.where(owner == self.group.rank(), labels - self.first_col, 0)
        return torch.where(owner < 0, -1, here)

    def gather(self, record: Tensor, tag: Tensor) -> Callable[[], Tensor]:
        """All ranks' records [ranks, fields, N], once the function returned is called; this rank's is [fields, N].

        tag: a whole number in which the ranks must agree. It travels as one more column.
        """
        record = torch.cat([record, tag.to(record.dtype).expand(len(record), 1)], 1)
        everyone = record.new_empty(self.group.size() * len(record), record.shape[1])
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
        work = all_gather(everyone, record, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return checked(everyone.view(-1, *record.shape))

        return finish

    def begin_score(
        self, logits: Tensor, labels: Tensor, outer: float, inner: Optional[float], ignore_index: int, outputs: int,
        basis: Optional[Tensor],
    ) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
        """A backend's `score` of whole rows: this rank's part now, the rest when the function returned is called."""
        owner = self.owners(labels, labels != ignore_index)
        record = self.record(logits, self.local(labels, owner), outer, inner, outputs)
        gathered = self.gather(record, fingerprint(labels))

        def finish() -> tuple[Tensor, ...]:
            results = self.run.merge_scores(gathered(), owner, sum(self.shards.sizes), outputs)
            if basis is not None:
                self.gradient(logits, labels, results[4], results[1], None, None, None, outer, inner, basis)
            return results

        return finish

    def record(self, logits: Tensor, labels: Tensor, outer: float, inner: Optional[float], outputs: int) -> Tensor:
        """What the others must know of these columns [O, I, V]: see the backends' `merge_scores`."""
        n_cols = logits.shape[2]
        if not n_cols:
            n_fields = 3 + sum(bool(outputs & bit) for bit in (2, 8, 16, 32))
            return no_columns(logits, labels, n_fields, (0, 1))
        _, entropy, _, aux, saved = self.run.statistics(logits, labels, outer, inner, -1, outputs & ~5)
        some = [aux[i, None] * (n_cols if i == 0 else 1) for i in range(3) if outputs >> 3 + i & 1]
        return torch.cat([saved, *([entropy[None]] if outputs & 2 else ()), *some])

    def begin_kl(
        self, logits: Tensor, ref_logits: Tensor, labels: Tensor, scaling: tuple, ref_scaling: tuple,
        direction: Union[str, float], with_labels: bool,
    ) -> Callable[[], Tensor]:  # fmt: skip
        """A backend's `kl` of whole rows, in the same two steps; the Jensen-Shannon divergence gathers once more."""
        owner, tag = self.owners(labels, labels >= 0), fingerprint(labels)
        how = scaling, ref_scaling, direction if isinstance(direction, str) else "reverse", with_labels
        if logits.shape[2]:
            tokens = self.run.kl(logits, ref_logits, self.local(labels, owner), *how)
        else:
            tokens = no_columns(logits, labels, TOKEN_FIELDS, (SHIFT, NORM, REF_SHIFT, REF_NORM))
        gathered = self.gather(tokens[KL_FIELDS[: 8 if with_labels else 5]], tag)

        def finish() -> Tensor:
            merged = self.run.merge_kl(gathered(), owner, direction)
            if not isinstance(direction, str):
                own = self.run.mixture(logits, ref_logits, merged, scaling, ref_scaling, direction)
                of_p, of_q = self.gather(own, tag)().sum(0)
                merged[CENTER], merged[KL] = of_p, (direction * of_q + (1 - direction) * of_p).clamp_(min=0)
            return merged

        return finish

    def gradient(self, *arguments, first_col: int = 0) -> None:
        """A backend's `gradient`, with columns counted from the first one here."""
        self.run.gradient(*arguments, first_col + self.first_col)

    def from_basis(self, *arguments, first_col: int = 0) -> None:
        """A backend's `from_basis`, likewise."""
        self.run.from_basis(*arguments, first_col + self.first_col)

    def kl_gradient(self, logits: Tensor, ref_logits: Tensor, labels: Tensor, *others) -> None:
        """A backend's `kl_gradient`, likewise: a label below its first column is not among them."""
        self.run.kl_gradient(logits, ref_logits, labels - self.first_col, *others)


def no_columns(logits: Tensor, labels: Tensor, n_fields: int, lowest: tuple[int, ...]) -> Tensor:
    """The record [fields, N] of a rank without columns: shifts and norms of -inf."""
    record = logits.new_zeros(n_fields, labels.numel(), dtype=stats_dtype(logits.dtype))
    record[list(lowest)] = -torch.inf
    return record


def fingerprint(labels: Tensor) -> Tensor:
    """A whole number below 2^20 that other labels, or these in another order, hardly share."""
    return (labels * torch.arange(1, labels.numel() + 1, device=labels.device)).sum() % (1 << 20)


def checked(everyone: Tensor) -> Tensor:
    """Records [ranks, fields, N] without the last column, in which all ranks must agree; or NaN, on CPU an error."""
    tags = everyone[:, 0, -1]
    agree = (tags == tags[0]).all()
    if checks.looked_at(tags):
        if not bool(agree):
            raise ValueError(
                "process_group: its ranks were given different labels; hidden states and labels must be the same on "
                "all ranks over which the vocabulary is cut: give them the same batch (and, with dropout, one seed)"
            )
        return everyone[:, :, :-1]
    return everyone[:, :, :-1].where(agree, torch.nan)


class Alone:
    """A backend's row passes where all columns are here: the face of `Sharded`."""

    def __init__(self, run: ModuleType) -> None:
        self.run = run

    def __getattr__(self, name: str) -> Callable:
        """What needs no other rank is the backend's own."""
        return getattr(self.run, name)

    def begin_score(self, *arguments) -> Callable[[], tuple[Tensor, ...]]:
        """A backend's `score`, done when asked for."""
        return functools.partial(self.run.score, *arguments)

    def begin_kl(self, *arguments) -> Callable[[], Tensor]:
        """A backend's `kl`, likewise."""
        return functools.partial(self.run.kl, *arguments)


def row_passes(run: ModuleType, shards: Shards) -> Union[Alone, Sharded]:
    """The row passes of a backend, for all columns or for a rank's."""
    return Sharded(run, shards) if shards.group else Alone(run)
