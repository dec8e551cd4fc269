"""AdamW with its learning rate schedule, and one optimizer step with gradient accumulation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import parallel
from .errors import fail


class Learner(NamedTuple):
    """What an optimizer step needs: the engine around the model, the model itself, its optimizer and schedule."""

    engine: parallel.Engine
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


def learner(engine: parallel.Engine, lr: float, steps: int) -> Learner:
    """AdamW on the parameters that require a gradient.

    The learning rate rises linearly over a tenth of the steps, then falls to a tenth of `lr` along a cosine.
    """
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / max(1, steps))))

    return Learner(engine, engine.module, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))


def take_step(learner: Learner, rows: list, loss_of: Callable, args) -> dict[str, float]:
    """One optimizer step over `rows`, --micro-batch-size of them per forward and backward pass.

    Args:
        loss_of: some of the rows -> (loss, metrics), 0-dim tensors. Each is divided by the counts (pairs, answers or
            tokens) of all rows, so that the sum over micro-batches is the value of the whole batch.

    Returns:
        The metrics of the whole step as numbers, with loss, grad_norm and learning_rate.
    """
    ranks, total = parallel.data_ranks(args)[1], {}
    for part, weight, last in parallel.parts(rows, args):
        with learner.engine.accumulate(last):
            loss, report = learner.engine(functools.partial(loss_of, part))
            (loss * (weight * ranks)).backward()  # DDP and FSDP average over ranks; these losses must be added
        for name, value in ({"loss": loss} | report).items():
            total[name] = total.get(name, 0) + value.detach() * weight
    total = parallel.total(total, args)
    trained = [p for group in learner.optimizer.param_groups for p in group["params"]]
    norm = parallel.clip_grad_norm(trained, args.max_grad_norm)
    if not torch.isfinite(norm):
        fail(f"loss {total['loss']}, gradient norm {float(norm)}: the weights were not changed; lower --lr")
    rate = learner.schedule.get_last_lr()[0]
    learner.optimizer.step()
    learner.schedule.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return total | {"grad_norm": float(norm), "learning_rate": rate}
