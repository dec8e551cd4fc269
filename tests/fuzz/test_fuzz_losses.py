"""Every row of the zoo: values and gradients, and that both are finite far from the reference."""

from __future__ import annotations

import torch
from fuzzing import copies_like, count, fuzz, generator_of, judge
from hypothesis import strategies as st
from problems import SEEDS, laid_out
from zoo import TABLE, Row, backward

COPIES = 64
NAMES = {row.id: row for row in TABLE}
EXTREME = {row.id: row for row in TABLE if row.extremes}


def inputs_of(row: Row, size: float, seed: int) -> list[list[torch.Tensor]]:
    """fp32 inputs of this row and of copies; numbers are `size` times the row's own."""
    torch.manual_seed(seed)
    generator = generator_of(seed)
    drawn = []
    for value in row.sample():
        if not value.is_floating_point():
            drawn.append([value] * COPIES)
            continue
        base = (value.detach() * size).float().double()
        # A relative change, so that signs stay.
        noise = copies_like(torch.zeros_like(base), 1 / 64, COPIES, generator, torch.float64).cpu().clamp(-0.5, 0.5)
        drawn.append(list((base * (1 + noise)).float()))
    return [list(one) for one in zip(*drawn)]


def named(value: torch.Tensor, grads: list, which: tuple[int, ...]) -> dict[str, torch.Tensor]:
    found = {"losses": value}
    for i in which:
        found[f"d {i}"] = torch.zeros_like(value) if grads[i] is None else grads[i]
    return found


def strided(value: torch.Tensor) -> torch.Tensor:
    """The same numbers, not adjacent in memory."""
    if value.ndim == 1:
        return laid_out(value[None], "every other column")[0]
    return laid_out(value, "transposed") if value.ndim == 2 else value


def check_loss(name: str, size: float, lay: bool, seed: int) -> None:
    row, many = NAMES[name], inputs_of(NAMES[name], size, seed)
    theirs: dict[str, list[torch.Tensor]] = {}
    exact = None
    for i, inputs in enumerate(many):
        plain = named(*backward(row, row.oracle, inputs), row.grads)
        true = named(
            *backward(row, row.oracle, [v.double() if v.is_floating_point() else v for v in inputs]), row.grads
        )
        exact = true if i == 0 else exact
        for key, value in true.items():
            error = (plain[key].double() - value)[value.isfinite()].abs().nan_to_num(nan=0.0)
            theirs.setdefault(key, []).append(error.flatten())
    first = [strided(v) if lay and v.is_floating_point() else v for v in many[0]]
    value, grads = backward(row, row.run, first)
    for i, grad in enumerate(grads):
        assert i in row.grads or grad is None or not grad.any(), f"input {i} must get no gradient"
    judge("losses", named(value, grads, row.grads), {key: torch.cat(errors) for key, errors in theirs.items()}, exact)


test_losses = fuzz(0.1, st.sampled_from(sorted(NAMES)), st.sampled_from((0.5, 1.0, 1.0, 2.0)), st.booleans(), SEEDS)(
    check_loss
)


def check_far(name: str, distance: float) -> None:
    row = EXTREME[name]
    value, grads = backward(row, row.run, row.extremes(distance))
    assert value.isfinite().all(), value
    assert all(grads[i].isfinite().all() for i in row.grads), grads
    count("losses, far from the reference", 0.0)


DISTANCES = st.floats(-1e4, 1e4, allow_subnormal=False) | st.floats(-200, 200, allow_subnormal=False)


test_far_from_the_reference = fuzz(0.14, st.sampled_from(sorted(EXTREME)), DISTANCES)(check_far)
