"""The launch shapes of all kernels over rows of logits, in one table for all launchers.

Nothing is tuned at run time: a user's first step compiles one shape of each kernel. `benchmarks/launch_shapes.py` times
the candidates on a GPU and prints the entries of this table that should change.
"""

import functools
from typing import NamedTuple

import torch

import triton

MAX_AXIS = 65535  # programs on the second axis of a grid


class Shape(NamedTuple):
    """block: columns a program takes at once; warps: of such a block; turns: blocks a program takes, 0 for all."""

    block: int
    warps: int
    turns: int = 0


# Per kernel: the shape by architecture, None for every other one. No entry has been measured on a GPU yet: they follow
# from `benchmarks/aot.py` (registers, bytes in flight, instructions outside of loops).
SHAPES: dict[str, dict[str | None, Shape]] = {
    "statistics": {None: Shape(4096, 8)},
    "statistics_all": {None: Shape(4096, 16)},  # beyond log-probs, entropy and lse: half as many columns a thread
    "pair_statistics": {None: Shape(4096, 8)},
    "policy": {None: Shape(4096, 8)},
    "gradient": {None: Shape(4096, 8, 4)},
    "dpo_gradient": {None: Shape(4096, 8, 4)},
    "from_basis": {None: Shape(4096, 8, 4)},
    "scale": {None: Shape(4096, 8, 16)},
    "kl": {None: Shape(2048, 4)},
    "mixture": {None: Shape(2048, 8)},
    "kl_gradient": {None: Shape(4096, 8, 4)},
}


def shape_for(kernel: str, arch: str | None) -> Shape:
    """The table's entry of a kernel for an architecture ("sm_90")."""
    entries = SHAPES[kernel]
    return entries.get(arch, entries[None])


@functools.cache
def architecture(device: torch.device) -> str | None:
    """ "sm_90", say; None for interpreted kernels."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def launch_shape(kernel: str, n_cols: int, itemsize: int, device: torch.device) -> dict:
    """The shape for rows of n_cols columns: BLOCK, GROUP (columns of 16 bytes), num_warps; TURNS where it has any."""
    block, warps, turns = shape_for(kernel, architecture(device))
    used = min(block, max(256, triton.next_power_of_2(n_cols)))
    shape = {"BLOCK": used, "GROUP": 16 // itemsize, "num_warps": max(1, warps * used // block)}
    return shape | ({"TURNS": turns} if turns else {})


def row_programs(n_cols: int, block: int, turns: int) -> int:
    """Programs for one row, on the grid's second axis; each goes on until the row ends."""
    return min(triton.cdiv(n_cols, block * turns), MAX_AXIS)
