"""Calls timed in turns: in each turn all run once, in a new order, so that drift affects all equally."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

WARM, ROUNDS = 2, 9


def turns(
    calls: dict[str, Callable[[], object]],
    device: str,
    before: dict[str, Callable[[], object]] | None = None,
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Seconds of each call in each round, by the clock of the GPU. before: runs first and is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for round_number in range(WARM + rounds):
        shuffle(order)
        for name in order:
            if before and name in before:
                before[name]()
            taken = seconds_of(calls[name], device)
            if round_number >= WARM:
                times[name].append(taken)
    return times


def seconds_of(call: Callable[[], object], device: str) -> float:
    """The time of one call: between two events on a GPU; otherwise, or if events have no time, by the host's clock."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    if device != "cuda":
        call()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    host = time.perf_counter() - begin
    return first.elapsed_time(last) / 1e3 or host
