"""Measure the scale and softcap of a model's logits: a hook on the head injects known logits into the forward."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

LARGE = 1e4  # saturates any softcap, and fits in float16
TOKENS = 4
NAMED = re.compile("logit|soft_?cap|lm_head|output_multiplier")  # names of settings that concern logits


class Processing(NamedTuple):
    """z = softcap * tanh(raw * logit_scale / softcap), or raw * logit_scale without a softcap."""

    logit_scale: float
    softcap: Optional[float]

    def apply(self, raw: Tensor) -> Tensor:
        """Apply scale and softcap to logits."""
        z = raw * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable gradients and dropout; afterwards restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.clear_autocast_cache()  # older torch would reuse casts made in here, which have no gradients


def measure(
    model: nn.Module, head: nn.Module, n_cols: int, forward: Callable
) -> tuple[Processing, Tensor, Tensor, float]:
    """Run `forward` once and measure its processing of logits.

    Args:
        n_cols: the vocabulary size of the head. forward: the model's plain forward.

    Returns:
        (processing, token ids [1, 4], log-probs [3] of the last three tokens, the allowed error of these log-probs).

    Raises:
        TypeError: the model does something to its logits that Processing cannot describe.
    """
    ids, seen = text_ids(model, n_cols), []

    def swap(head: nn.Module, args: tuple, raw: Tensor) -> Tensor:
        """Replace the head's logits by known ones: two constant rows and two ramps."""
        ramp = torch.linspace(-100, 100, raw.shape[-1], device=raw.device, dtype=torch.float64)
        known = torch.stack([torch.full_like(ramp, LARGE), torch.ones_like(ramp), ramp, ramp.flip(0)])
        known = known.to(torch.float64 if raw.device.type in ("cpu", "cuda") else torch.float32)
        seen.extend((raw, known))
        return known[None]

    hook = head.register_forward_hook(swap)
    try:
        processed = forward(input_ids=ids, return_dict=True).logits[0]
    finally:
        hook.remove()
    if processed.is_meta:
        raise ValueError("model: it is on the meta device; pass logit_scale (1.0 if it has none) and softcap")
    if not seen:
        raise TypeError(f"model: {type(model).__name__}'s forward does not call its lm_head, and cannot be fused")
    raw, known = seen
    processing = fit(known, processed, numbers(model))
    z = processing.apply(raw[0, :-1].double())
    plain = z.log_softmax(-1).gather(1, ids[0, 1:, None].to(z.device))[:, 0]
    return processing, ids, plain, 8 * torch.finfo(raw.dtype).eps * float(z.abs().max()) + 1e-5


def text_ids(model: nn.Module, n_cols: int) -> Tensor:
    """[1, 4] ids of ordinary text tokens."""
    ids = plain_ids(model, min(n_cols, model.get_input_embeddings().weight.shape[0]))
    device = model.device if model.device.type != "meta" else torch.device("cpu")  # offloaded: its hooks move them
    return torch.tensor([(ids[-TOKENS:] * TOKENS)[:TOKENS]], device=device)


def plain_ids(model: nn.Module, n_ids: int) -> list[int]:
    """The token ids below n_ids and below 1000 that are not special tokens in the config."""
    special = set()
    for config in (model.config, model.config.get_text_config()):
        special |= {v for k, v in config.to_dict().items() if isinstance(v, int) and k.endswith(("_id", "_index"))}
    return [i for i in range(min(n_ids, 1000)) if i not in special]


def numbers(model: nn.Module) -> list[float]:
    """All numbers of a config and their inverses. They are exact, while a measured scale is rounded."""
    found = [1.0]
    for config in (model.config, model.config.get_text_config()):
        values = [v for v in config.to_dict().values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        found += [n for v in values if v > 0 and math.isfinite(v) for n in (float(v), 1 / v)]
    return found


def places(model: nn.Module) -> tuple[object, ...]:
    """The objects whose attributes may hold the scale or softcap of a model's logits."""
    return model.config, model.config.get_text_config(), model, model.base_model


def settings(model: nn.Module, processing: Processing) -> dict[tuple[int, str], object]:
    """The settings that may affect the logits: (index in `places`, name) -> value.

    These are numbers whose name mentions logits, or that equal the measured scale or softcap.
    """
    known = {processing.logit_scale, 1 / processing.logit_scale, processing.softcap} - {1.0, None}

    def counts(name: str, value: object) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (value is None or number) and bool(NAMED.search(name) or value in known)

    owners = enumerate(places(model))
    return {(place, name): v for place, owner in owners for name, v in vars(owner).items() if counts(name, v)}


def fit(known: Tensor, processed: Tensor, exact_numbers: list[float]) -> Processing:
    """The scale and softcap that map the known logits [4, V] to the processed ones."""
    z, eps = processed.double(), torch.finfo(processed.dtype).eps

    def exact(value: float) -> float:
        near = min(exact_numbers, key=lambda n: abs(n - value))
        return near if abs(near - value) <= 8 * eps * abs(value) else value

    large, one = (float(z[i].median()) for i in (0, 1))
    scale, cap = one, None
    if abs(large - LARGE * one) > 8 * eps * abs(large):
        cap = exact(large)
        scale = cap * math.atanh(one / cap) if abs(one) < abs(cap) else math.nan
    found = Processing(exact(scale), cap)
    expected = found.apply(known.double())
    if not (found.logit_scale > 0 and (z - expected).abs().le(16 * eps * expected.abs() + eps).all()):
        raise TypeError(
            "model: it cannot be fused, since it changes its logits by more than a scale > 0 and a softcap; it maps "
            f"1 to {one:.6g} and {LARGE:g} to {large:.6g} (medians over the vocabulary)"
        )
    return found
