"""Switches off dropout of every kind, so that the policy in training mode is the same function as its reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fused_po.integrations import probe

from .errors import fail

NAMES = ("drop", "jitter")  # in the names of rates: attention_dropout, attn_pdrop, layerdrop, router_jitter_noise
KEPT = "_rates_of_dropout"  # the attribute of a model that keeps the original rates of its configurations


def rates(owner) -> list[str]:
    """The names of the dropout rates of a module or configuration that are not 0."""
    kind = "drop" in type(owner).__name__.lower()  # nn.Dropout and similar modules name their rate p
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value
        if any(part in name.lower() for part in NAMES) or (kind and isinstance(value, float))
    ]


def configurations(model: nn.Module) -> list:
    """All configurations that the model's modules refer to, nested ones included."""
    from transformers import PreTrainedConfig

    found, left = {}, [value for module in model.modules() for value in vars(module).values()]
    while left:
        value = left.pop()
        if isinstance(value, PreTrainedConfig) and id(value) not in found:
            found[id(value)] = value
            left += vars(value).values()
    return list(found.values())


def switch_off(model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    """Set every dropout rate to 0, in the modules and their configurations, then verify that training is deterministic.

    Args:
        run: token ids [1, T] -> hidden states.
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
                "give --keep-dropout to train it with them"
            )


@contextlib.contextmanager
def as_loaded(model: nn.Module) -> Iterator[None]:
    """Inside, the configurations have their original rates, so that these are what is saved."""
    kept = vars(model).get(KEPT, [])
    for config, name, value in kept:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, value in kept:
            setattr(config, name, type(value)())
