"""A causal LM without its logits: the input and the parameters of its LM head, and the router loss.

For training loops that call `linear_logps`, `linear_dpo` or `linear_kl` directly. The model's own forward runs, so the
hidden states are exactly those that its head gets, and a router loss is the one that the model would add.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from fused_po.integrations import probe
from fused_po.integrations.heads import read_head
from fused_po.integrations.probe import Processing
from fused_po.integrations.transformers import STATE
from fused_po.lm_head.logps import linear_logps
from fused_po.ops.logps import shift_labels

MEASURED = "_fused_po_lm_head"  # the attribute of a measured model
_replacing = threading.RLock()  # held while a model has another loss_function


class LMHead(NamedTuple):
    """Arguments of `linear_logps`: z = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # [V, H]
    bias: Optional[Tensor]  # [V]
    logit_scale: float
    softcap: Optional[float]


class HeadInput(NamedTuple):
    """hidden: [B, T, H], the input of the head. added_loss: 0-dim, such as a router loss; None if there is none."""

    hidden: Tensor
    added_loss: Optional[Tensor]


class _Measured(NamedTuple):
    processing: Processing
    takes_labels: bool  # its forward calls `loss_function`, so that the rest of its loss can be isolated
    adds_loss: bool


def lm_head(model: nn.Module) -> LMHead:
    """The LM head of a transformers causal LM, alone or in a PeftModel. Scale and softcap are measured once per model.

    Raises:
        TypeError: the model is not a causal LM, or its head does not have this form.
    """
    base, head = _parts(model)
    processing = _measured(base, head).processing
    parts = _read(base, head)
    return LMHead(parts.weight, parts.bias, *processing)


def head_input(model: nn.Module, **inputs: Any) -> HeadInput:
    """Run the model's forward without computing logits.

    If gradients are enabled, the result includes what the forward adds to its loss: router losses, times the
    coefficient in the config.

    Args:
        inputs: the model's inputs, by name: input_ids [B, T], and attention_mask or position_ids.

    Raises:
        TypeError: as for `lm_head`.
    """
    base, head = _parts(model)
    measured = _measured(base, head)
    return _run(base, head, measured.takes_labels and measured.adds_loss and torch.is_grad_enabled(), inputs)


def adds_loss(model: nn.Module) -> bool:
    """Whether the model's forward adds a term to its loss, such as a router loss over all tokens."""
    return _measured(*_parts(model)).adds_loss


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(the model without PEFT, its head)."""
    base = model.get_base_model() if type(model).__module__.startswith("peft.") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise TypeError(f"model: {type(base).__name__} has no LM head; expected a causal LM")
    return base, head


def _read(base: nn.Module, head: nn.Module):
    like = next(head.parameters(), torch.empty(0))
    parts = read_head(head, like.new_empty(0, getattr(head, "in_features", 0)))
    if parts.low_rank is not None:
        raise TypeError(f"lm_head: the head of {type(base).__name__} has adapters; merge them, or exclude the head")
    return parts


def _run(base: nn.Module, head: nn.Module, labeled: bool, inputs: dict[str, Any]) -> HeadInput:
    """Run the forward; with `labeled`, pass labels and make the language modeling loss 0."""
    seen: list[Tensor] = []
    caller = threading.get_ident()

    def divert(head: nn.Module, args: tuple) -> Optional[tuple]:
        """Keep the head's input, and pass the head 0 rows (1 if it is a DTensor). Ignore calls of other threads."""
        if threading.get_ident() != caller:
            return None
        if seen or not args:
            raise TypeError(f"model: {type(base).__name__} calls its lm_head more than once in a forward")
        seen.append(args[0])
        rows = int(any(hasattr(p, "device_mesh") for p in head.parameters()))
        return (args[0][..., :rows, :], *args[1:])

    hook = head.register_forward_pre_hook(divert, prepend=True)
    called: list[bool] = []
    try:
        with _loss_of_zero(base, called) if labeled else contextlib.nullcontext():
            more = {"labels": inputs["input_ids"]} if labeled else {}
            more |= {"fused": False} if STATE in vars(base) else {}  # a model fused with always=True would score them
            result = base(**inputs, **more, use_cache=False, return_dict=True)
    finally:
        hook.remove()
    if not seen:
        raise TypeError(f"model: {type(base).__name__}'s forward does not call its lm_head")
    if labeled and not called:
        raise TypeError(f"model: {type(base).__name__}'s forward does not call its loss_function")
    return HeadInput(seen[0], result.loss.float() if labeled else None)


@contextlib.contextmanager
def _loss_of_zero(base: nn.Module, called: list[bool]) -> Iterator[None]:
    """Replace `loss_function` by one that returns 0. The loss of the forward is then what the model adds."""
    caller = threading.get_ident()

    def zero(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if threading.get_ident() != caller:
            return own(logits, *args, **kwargs)
        called.append(True)
        return torch.zeros((), device=logits.device)

    with _replacing:
        own, before = base.loss_function, vars(base).get("_loss_function")
        base.loss_function = zero
        try:
            yield
        finally:
            if before is None:
                del base._loss_function
            else:
                base._loss_function = before


def _measured(base: nn.Module, head: nn.Module) -> _Measured:
    if MEASURED not in vars(base):
        devices = {p.device for p in base.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)), probe.evaluating(base):
            setattr(base, MEASURED, _measure(base, head))
    return vars(base)[MEASURED]


def _measure(base: nn.Module, head: nn.Module) -> _Measured:
    name, parts = type(base).__name__, _read(base, head)
    try:
        processing, ids, plain, allowed = probe.measure(base, head, len(parts.weight), base)
    except (ValueError, RuntimeError, IndexError) as error:
        raise TypeError(f"model: the scale and softcap of {name}'s logits cannot be measured ({error})") from error
    try:
        added, takes_labels = _run(base, head, True, {"input_ids": ids}).added_loss, True
    except (TypeError, ValueError, RuntimeError, IndexError):
        added, takes_labels = None, False
    if not takes_labels and getattr(base.config.get_text_config(), "output_router_logits", False):
        raise TypeError(
            f"model: {name} has a router loss that cannot be computed without logits; set its "
            "config.output_router_logits to False"
        )
    adds = added is not None and bool(added != 0)
    try:
        hidden = _run(base, head, False, {"input_ids": ids}).hidden
    except (ValueError, RuntimeError, IndexError) as error:
        raise TypeError(f"model: {name} cannot run without logits ({error})") from error
    labels = shift_labels(ids).to(hidden.device)
    ours = linear_logps(hidden, parts.weight, labels, parts.bias, **processing._asdict()).logps[0, :-1]
    if not (ours.to(plain.device) - plain).abs().max() <= allowed:
        raise TypeError(
            f"model: log-probs computed from the input of its head are {ours.tolist()}, but {name}'s logits give "
            f"{plain.tolist()}; its head does not compute hidden @ weight.T + bias"
        )
    return _Measured(processing, takes_labels, adds)
