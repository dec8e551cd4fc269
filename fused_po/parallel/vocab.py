"""How a vocabulary is sharded over the ranks of a process group (tensor parallelism).

row_passes.py has the row passes for a sharded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import torch.distributed as dist
from torch import Tensor

from fused_po import checks


@dataclass(frozen=True)
class VocabParallel:
    """How the rows of a head, or the columns of logits, are sharded over the ranks of a process group.

    group: the torch.distributed.ProcessGroup. Rank 0 has the first part of the vocabulary, and so on. Hidden states and
        labels are the same on all ranks.
    sizes: the number of rows on each rank, in order. None: equal numbers. For a padded vocabulary, the last rank passes
        its rows without the padding, and sizes gives their number.
    sequence_dim: for sequence parallelism: the dimension of hidden that is sharded in equal parts over the ranks, while
        the labels are those of all tokens. hidden is gathered, and its gradient is reduce-scattered.
    partial_grad: return this rank's partial sum as the gradient of hidden, for code that adds the parts itself, such as
        Megatron's gather_from_sequence_parallel_region.
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
            checks.whole_number("sequence_dim", self.sequence_dim)
        checks.flags(partial_grad=self.partial_grad)


ProcessGroupLike = Union[None, "dist.ProcessGroup", VocabParallel]


class Shards(NamedTuple):
    """How a vocabulary is sharded, as plain values that an op can take. Without a group it is not sharded."""

    group: str = ""  # the process group's name
    sizes: Sequence[int] = ()  # columns of each rank
    partial: bool = False  # the gradient of hidden is this rank's partial sum

    @property
    def process_group(self):
        """The group itself."""
        return dist.distributed_c10d._resolve_process_group(self.group)

    def n_cols(self, own: int) -> int:
        """The size of the whole vocabulary, of which this rank has `own` columns."""
        return sum(self.sizes) if self.group else own

    def widest(self, own: int) -> int:
        """The largest number of columns on any rank. All ranks use it, so that their tiles have the same rows."""
        return max(self.sizes) if self.group else own

    def start(self) -> int:
        """The vocabulary index of this rank's first column."""
        return sum(self.sizes[: self.process_group.rank()]) if self.group else 0

    @property
    def adds_up(self) -> bool:
        """Whether this package sums the gradient of hidden over the ranks."""
        return bool(self.group) and not self.partial

    def add_up(self, part: Tensor):
        """Start an in-place all-reduce of a gradient and return its work handle."""
        return dist.all_reduce(part, group=self.process_group, async_op=True)

    def sum_of_rows(self, part: Tensor, rows: Optional[Tensor]) -> Tensor:
        """The sum of [N, H] over the ranks, where only `rows` are nonzero; unchanged if there is nothing to sum."""
        if not self.adds_up:
            return part
        some = part if rows is None else part[rows]
        self.add_up(some).wait()
        return some if rows is None else part.index_copy_(0, rows, some)


WHOLE = Shards()


def vocab_parallel(process_group: ProcessGroupLike) -> Optional[VocabParallel]:
    """The argument as a VocabParallel."""
    if process_group is None or isinstance(process_group, VocabParallel):
        return process_group
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        got = type(process_group).__name__
        raise TypeError(f"process_group: got {got}, expected a torch.distributed.ProcessGroup or a VocabParallel")
    return VocabParallel(process_group)


def shards_of(cut: Optional[VocabParallel], own: int, name: str) -> Shards:
    """The shards of a vocabulary. `own`: the entries that argument `name` has on this rank."""
    if cut is None:
        return WHOLE
    sizes = cut.sizes or (own,) * cut.group.size()
    if sizes[cut.group.rank()] != own:
        expected = f"{sizes[cut.group.rank()]}, this rank's size"
        raise ValueError(f"{name}: got {own} entries of the vocabulary, expected {expected}")
    if cut.group.size() == 1:
        return WHOLE
    return Shards(cut.group.group_name, sizes, cut.partial_grad or cut.sequence_dim is not None)


def local_head(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], process_group: ProcessGroupLike, name: str = "weight"
) -> tuple[Tensor, Tensor, Optional[Tensor], Shards]:
    """(hidden of all tokens, weight and bias of this rank, shards), with DTensors converted to plain tensors.

    name: the name of the argument weight, for errors.
    """
    if hasattr(weight, "device_mesh"):
        if process_group is not None:
            raise ValueError(f"process_group: got a group with {name} as a DTensor, which has its own; leave it None")
        return local_dtensors(hidden, weight, bias, name)
    for value in (hidden, bias):
        if hasattr(value, "device_mesh"):
            raise TypeError(f"{name}: got a plain tensor with a DTensor; pass all as DTensors, or none (to_local())")
    if process_group is None:
        return hidden, weight, bias, WHOLE
    cut = vocab_parallel(process_group)
    if checks.floating(name, weight).ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected [V, H], this rank's rows of the head")
    if cut.sequence_dim is not None and cut.group.size() > 1:
        from torch.distributed._functional_collectives import all_gather_tensor_autograd

        dim = checks.dimension("sequence_dim", cut.sequence_dim, hidden.ndim - 1)
        hidden = all_gather_tensor_autograd(hidden.contiguous(), dim, cut.group)
    return hidden, weight, bias, shards_of(cut, weight.shape[0], name)


def local_dtensors(hidden: Tensor, weight: Tensor, bias: Optional[Tensor], name: str) -> tuple:
    """`local_head` for a DTensor head, such as that of parallelize_module with ColwiseParallel."""
    from torch.distributed.tensor import Partial, Replicate

    mesh, places = weight.device_mesh, weight.placements
    cut = [i for i, place in enumerate(places) if place.is_shard(0)]
    if len(cut) > 1 or any(not place.is_replicate() for i, place in enumerate(places) if i not in cut):
        raise ValueError(
            f"{name}: got a DTensor with placements {places}, allowed are Shard(0) on one dimension of the mesh and "
            "Replicate() on others; use a head that FSDP shards inside the module's forward, where it is gathered"
        )
    if bias is not None and getattr(bias, "placements", None) != places:
        raise ValueError(
            f"bias: got {getattr(bias, 'placements', 'a plain tensor')}, expected {places}, the placements of {name}"
        )
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
