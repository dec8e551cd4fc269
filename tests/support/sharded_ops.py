"""Replace the ops by their vocabulary-parallel versions, to run tests that were written for the unsplit ops.

Every rank draws the whole problem, passes its own columns to the op, and gets its share of the gradient; the shares are
summed over ranks. The results of an op must be bitwise equal on all ranks.
"""

import contextlib
import importlib
import inspect
import itertools
import random
import sys

import torch
import torch.distributed as dist
from repository import SUPPORT

import fused_po

OPS = ("logps_from_logits", "linear_logps", "kl_from_logits", "linear_kl")


class SumOverRanks(torch.autograd.Function):
    """A tensor that is equal on all ranks. The backward sums its gradient over the ranks."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        dist.all_reduce(g)
        return g


def sizes_of(v: int, how: str) -> tuple[int, ...]:
    """The number of columns per rank: "chunk" (like torch.chunk), "uneven", or "empty" (the last rank has none)."""
    n = dist.get_world_size()
    if how == "chunk":
        most = -(-v // n)
        return tuple(max(0, min(most, v - most * rank)) for rank in range(n))
    ranks = n - (how == "empty")
    cuts = sorted(random.Random(v).randrange(v + 1) for _ in range(ranks - 1))
    ends = [0, *cuts, v]
    return tuple(b - a for a, b in itertools.pairwise(ends)) + (0,) * (n - ranks)


def group_of(sizes: tuple[int, ...]):
    """The value of process_group=: only the group where all sizes are equal, else the group with the sizes."""
    return dist.group.WORLD if len(set(sizes)) == 1 else fused_po.VocabParallel(dist.group.WORLD, sizes)


def own(value, sizes, dim=0):
    """This rank's part, along `dim`, of a tensor of the whole vocabulary; None for None."""
    if value is None:
        return None
    at = sum(sizes[: dist.get_rank()])
    return SumOverRanks.apply(value).narrow(dim, at, sizes[dist.get_rank()])


def same_everywhere(*values) -> None:
    """Fail unless these tensors are bitwise equal on all ranks."""
    for value in values:
        if value is None:
            continue
        bits = value.detach().contiguous().view(torch.uint8) if value.dtype != torch.bool else value.to(torch.uint8)
        everyone = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, bits)
        assert all(torch.equal(other, bits) for other in everyone), "ranks got different results"


def watched(hidden):
    """A view of hidden whose gradient must be equal on all ranks."""
    if not hidden.requires_grad:
        return hidden
    hidden = hidden.view_as(hidden)
    hidden.register_hook(same_everywhere)
    return hidden


@contextlib.contextmanager
def ops(how: str):
    """Replace the ops by their vocabulary-parallel versions inside the context."""
    whole = {name: getattr(fused_po, name) for name in OPS}

    def logps_from_logits(logits, labels, **options):
        sizes = sizes_of(logits.shape[-1], how)
        return whole["logps_from_logits"](own(logits, sizes, -1), labels, process_group=group_of(sizes), **options)

    def kl_from_logits(logits, ref_logits, *others, **options):
        sizes = sizes_of(logits.shape[-1], how)
        both = own(logits, sizes, -1), own(ref_logits, sizes, -1)
        return whole["kl_from_logits"](*both, *others, process_group=group_of(sizes), **options)

    def linear_logps(hidden, weight, labels, bias=None, *, low_rank=None, **options):
        sizes = sizes_of(weight.shape[0], how)
        if low_rank is not None:
            options["low_rank"] = low_rank[0], own(low_rank[1], sizes)
        head = own(weight, sizes), labels, own(bias, sizes)
        return whole["linear_logps"](watched(hidden), *head, process_group=group_of(sizes), **options)

    def linear_kl(hidden, weight, ref_hidden, ref_weight, *others, bias=None, ref_bias=None, **options):
        sizes = sizes_of(weight.shape[0], how)
        options |= {"bias": own(bias, sizes), "ref_bias": own(ref_bias, sizes), "process_group": group_of(sizes)}
        both = watched(hidden), own(weight, sizes), ref_hidden, own(ref_weight, sizes)
        return whole["linear_kl"](*both, *others, **options)

    def compared(run):
        def wrapper(*arguments, **options):
            results = run(*arguments, **options)
            same_everywhere(*results)
            return results

        return wrapper

    mine = dict(zip(OPS, (logps_from_logits, linear_logps, kl_from_logits, linear_kl)))
    try:
        for name in OPS:
            setattr(fused_po, name, compared(mine[name]))
        yield
    finally:
        for name in OPS:
            setattr(fused_po, name, whole[name])


def run(how: str, seed: int, module: str, name: str, options: dict) -> None:
    """Run a test function of tests/<module>.py with the vocabulary-parallel ops."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill uninitialised memory with NaN
    folder, _, file = module.rpartition("/")
    with_path = str(SUPPORT.parent / folder)
    if with_path not in sys.path:
        sys.path.insert(0, with_path)
    test = getattr(importlib.import_module(file), name)
    fixtures = {"seed": seed, "poison": None}
    try:
        with ops(how):
            test(**options, **{key: fixtures[key] for key in inspect.signature(test).parameters if key in fixtures})
    finally:
        torch.use_deterministic_algorithms(False)
