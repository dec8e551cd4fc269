"""Dropout switched off, of whatever kind: a policy in training and its reference in evaluation are then one model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from common import fail
from torch import Tensor, nn

from fused_po.integrations import probe

NAMES = ("drop", "jitter")  # parts of the names of rates: attention_dropout, attn_pdrop, layerdrop, router_jitter_noise
KEPT = "_rates_of_dropout"  # the attribute of a model with what its configurations had


def rates(owner) -> list[str]:
    """The names of an object's own rates. owner: a module, or a configuration."""
    kind = "drop" in type(owner).__name__.lower()  # nn.Dropout and its like, whose rate is called p
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value
        if any(part in name.lower() for part in NAMES) or (kind and isinstance(value, float))
    ]


def configurations(model: nn.Module) -> list:
    """All the configurations that a model's modules look at, and those in them."""
    from transformers import PreTrainedConfig

    found, left = {}, [value for module in model.modules() for value in vars(module).values()]
    while left:
        value = left.pop()
        if isinstance(value, PreTrainedConfig) and id(value) not in found:
            found[id(value)] = value
            left += vars(value).values()
    return list(found.values())


def switch_off(model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    """Every rate becomes 0, in modules and in the configurations that they read; then it is measured.

    run: ids [1, T] -> hidden states.
    """
    for module in model.modules():
        for name in rates(module):
            setattr(module, name, type(getattr(module, name))())
    kept = [(config, name, getattr(config, name)) for config in configurations(model) for name in rates(config)]
    setattr(model, KEPT, kept)
    for config, name, value in kept:
        setattr(config, name, type(value)())
    ids, states = probe.text_ids(model, model.get_input_embeddings().weight.shape[0]).repeat(1, 4), []
    devices = [torch.device(ids.device)] if ids.is_cuda else []
    with probe.evaluating(model), torch.random.fork_rng(devices=devices):
        model.train()
        for seed in range(3):
            torch.manual_seed(seed)
            states.append(run(ids))
    for other in states[1:]:
        if (other - states[0]).abs().max() > 1e-3 * states[0].abs().max():
            fail(
                f"--model: {type(model).__name__} draws random numbers in training though its dropout rates are 0; "
                "give --keep-dropout to train it so"
            )


@contextlib.contextmanager
def as_loaded(model: nn.Module) -> Iterator[None]:
    """Inside, the configurations have the rates that they came with: for saving."""
    kept = vars(model).get(KEPT, [])
    for config, name, value in kept:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, value in kept:
            setattr(config, name, type(value)())
