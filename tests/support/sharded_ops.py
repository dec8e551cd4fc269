"""The ops with the vocabulary cut over ranks, in the places of the whole ones, for tests written for those.

Every rank draws the whole problem, passes its own columns, and gets its share of the gradient back, which the ranks add
up. What an op returns on one rank must be bitwise what it returns on the others.
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
    """The same tensor on all ranks, which get different parts of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        dist.all_reduce(g)
        return g


def sizes_of(v: int, how: str) -> tuple[int, ...]:
    """Columns of each rank: "chunk" as torch.chunk has them, "uneven", or "empty", where the last rank has none."""
    n = dist.get_world_size()
    if how == "chunk":
        most = -(-v // n)
        return tuple(max(0, min(most, v - most * rank)) for rank in range(n))
    ranks = n - (how == "empty")
    cuts = sorted(random.Random(v).randrange(v + 1) for _ in range(ranks - 1))
    ends = [0, *cuts, v]
    return tuple(b - a for a, b in itertools.pairwise(ends)) + (0,) * (n - ranks)


def group_of(sizes: tuple[int, ...]):
    """What process_group= is given: the group alone where it can guess the sizes."""
    return dist.group.WORLD if len(set(sizes)) == 1 else fused_po.VocabParallel(dist.group.WORLD, sizes)


def own(value, sizes, dim=0):
    """This rank's part of a tensor of the whole vocabulary along `dim`, or None."""
    if value is None:
        return None
    at = sum(sizes[: dist.get_rank()])
    return SumOverRanks.apply(value).narrow(dim, at, sizes[dist.get_rank()])


def same_everywhere(*values) -> None:
    """Fail unless these are bitwise the same on all ranks."""
    for value in values:
        if value is None:
            continue
        bits = value.detach().contiguous().view(torch.uint8) if value.dtype != torch.bool else value.to(torch.uint8)
        everyone = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, bits)
        assert all(torch.equal(other, bits) for other in everyone), "ranks got different results"


def watched(hidden):
    """hidden, whose gradient must be the same on all ranks."""
    if not hidden.requires_grad:
        return hidden
    hidden = hidden.view_as(hidden)
    hidden.register_hook(same_everywhere)
    return hidden


@contextlib.contextmanager
def ops(how: str):
    """The cut ops in the places of the whole ones."""
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
    """A test of another file, tests/<module>.py, by its function's name, with the cut ops."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is full of NaN
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
