"""What a model does to its logits, measured: known ones go in at the head by a hook, the processed ones come out."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

LARGE = 1e4  # saturates any softcap, and no float16
TOKENS = 4
NAMED = re.compile("logit|soft_?cap|lm_head|output_multiplier")  # settings of logits


class Processing(NamedTuple):
    """z = softcap * tanh(raw * logit_scale / softcap), or raw * logit_scale without a softcap."""

    logit_scale: float
    softcap: Optional[float]

    def apply(self, raw: Tensor) -> Tensor:
        """The processed logits."""
        z = raw * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout, and every module in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.clear_autocast_cache()  # older torch would go on with casts made in here, which have no gradients


def measure(
    model: nn.Module, head: nn.Module, n_cols: int, forward: Callable
) -> tuple[Processing, Tensor, Tensor, float]:
    """(what the model does to its logits, ids [1, 4], log-probs [3] of the last three, the error these may have).

    n_cols: the head's vocabulary. forward: the model's plain forward, run once.

    Raises:
        TypeError: it does something else than Processing can say.
    """
    ids, seen = text_ids(model, n_cols), []

    def swap(head: nn.Module, args: tuple, raw: Tensor) -> Tensor:
        """Known logits in place of the head's: two constants, and two ramps."""
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
        raise ValueError("model: is on the meta device; give logit_scale (1.0 if it has none) and softcap")
    if not seen:
        raise TypeError(f"model: {type(model).__name__}'s forward does not call its lm_head, and cannot be fused")
    raw, known = seen
    processing = fit(known, processed, numbers(model))
    z = processing.apply(raw[0, :-1].double())
    plain = z.log_softmax(-1).gather(1, ids[0, 1:, None].to(z.device))[:, 0]
    return processing, ids, plain, 8 * torch.finfo(raw.dtype).eps * float(z.abs().max()) + 1e-5


def text_ids(model: nn.Module, n_cols: int) -> Tensor:
    """[1, 4] token ids that stand for nothing but text."""
    ids = plain_ids(model, min(n_cols, model.get_input_embeddings().weight.shape[0]))
    device = model.device if model.device.type != "meta" else torch.device("cpu")  # offloaded: its hooks move them
    return torch.tensor([(ids[-TOKENS:] * TOKENS)[:TOKENS]], device=device)


def plain_ids(model: nn.Module, n_ids: int) -> list[int]:
    """Of the first 1000 token ids below n_ids, those that the configuration gives no other meaning."""
    special = set()
    for config in (model.config, model.config.get_text_config()):
        special |= {v for k, v in config.to_dict().items() if isinstance(v, int) and k.endswith(("_id", "_index"))}
    return [i for i in range(min(n_ids, 1000)) if i not in special]


def numbers(model: nn.Module) -> list[float]:
    """The numbers of a config and their inverses, which are exact where a measured one is rounded."""
    found = [1.0]
    for config in (model.config, model.config.get_text_config()):
        values = [v for v in config.to_dict().values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        found += [n for v in values if v > 0 and math.isfinite(v) for n in (float(v), 1 / v)]
    return found


def places(model: nn.Module) -> tuple[object, ...]:
    """Where a model keeps the numbers that it works on its logits with."""
    return model.config, model.config.get_text_config(), model, model.base_model


def settings(model: nn.Module, processing: Processing) -> dict[tuple[int, str], object]:
    """The numbers that the logits may depend on, by place and name: named after logits, or equal to what was found."""
    known = {processing.logit_scale, 1 / processing.logit_scale, processing.softcap} - {1.0, None}

    def counts(name: str, value: object) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (value is None or number) and bool(NAMED.search(name) or value in known)

    owners = enumerate(places(model))
    return {(place, name): v for place, owner in owners for name, v in vars(owner).items() if counts(name, v)}


def fit(known: Tensor, processed: Tensor, exact_numbers: list[float]) -> Processing:
    """The scale and softcap that make the known logits [4, V] the processed ones."""
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
            "model: it does something to its logits that is neither a scale > 0 nor a softcap, and cannot be fused; "
            f"for 1 it gave {one:.6g}, for {LARGE:g} {large:.6g} (medians over the vocabulary)"
        )
    return found
