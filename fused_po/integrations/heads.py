"""The parameters of a model's LM head: weight, bias, and the matrices of a LoRA adapter on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

# Packages whose hooks only move, gather, shard or recompute a head's weights. Our own hooks do nothing outside a fused
# call; PEFT's modules_to_save copies the head together with the hook on it.
ENGINES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "fused_po")
# The kinds of module hooks that see logits or their gradients, forward hooks first.
AFTER = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class HeadParts(NamedTuple):
    """Arguments of `linear_logps`: logits = hidden @ weight.T + bias, plus u @ low.T for low_rank = (u, low)."""

    weight: Tensor  # [V, H]
    bias: Optional[Tensor]  # [V]
    low_rank: Optional[tuple[Tensor, Tensor]]  # ([..., r], [V, r])


def read_head(head: nn.Module, hidden: Tensor) -> HeadParts:
    """The parts of an LM head for these hidden states [..., H].

    head: an nn.Linear, or PEFT's wrapper of one: LoRA (any number of active adapters, with dropout; merged or not) or
        a fully trained copy (modules_to_save). The weight is never merged, copied or cast.

    Raises:
        TypeError: the forward of the head is something else, such as DoRA or a quantized layer.
    """
    if type(head).__module__.startswith("peft."):
        return _read_adapter(head, hidden)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"lm_head: got {_name(head)}, expected torch.nn.Linear, alone or with PEFT's LoRA or modules_to_save; "
            "do not pass fused=True for this model, or call unfuse_lm_head(model)"
        )
    return HeadParts(_whole(head.weight), None if head.bias is None else _whole(head.bias), None)


def changes_of(head: nn.Module, measured: bool = False, called: bool = True) -> list[Callable]:
    """The hooks and replaced forwards that change the logits, on a head and on the layers inside an adapter.

    Hooks of ENGINES are not included. Nor are forward pre-hooks on the head itself, because a fused call runs them.

    measured: exclude backward hooks, whose effect a measured forward does not show.
    called: False for a head whose forward is never called, not even with 0 rows, because only its weight is read. Then
        pre-hooks are included too, also those of torch.nn.utils, which recompute the weight.
    """
    names = AFTER[:1] if measured else AFTER
    found = [hook for name in names for hook in getattr(every_module, "_global" + name).values()]
    for module in head.modules():
        found += [hook for name in names for hook in getattr(module, name).values()]
        if module is not head or is_sharded(head) or not called:  # their pre-hooks do not run exactly once
            found += module._forward_pre_hooks.values()
        if "forward" in vars(module):
            found.append(vars(module)["forward"])
    if not called:
        found += every_module._global_forward_pre_hooks.values()
    return [hook for hook in found if not all(_of_engine(part, called) for part in _parts(hook))]


def hook_name(hook: Callable) -> str:
    """The name of a hook, for messages."""
    part = next((part for part in _parts(hook) if not _of_engine(part)), hook)
    return f"{getattr(part, '__qualname__', type(part).__qualname__)} of {_module(part)}"


def _parts(hook: Callable) -> list[Callable]:
    """The functions inside a hook: of partials, bound methods and decorators."""
    inner = [getattr(hook, name) for name in ("func", "__func__", "__wrapped__") if hasattr(hook, name)]
    own = [] if isinstance(hook, partial | MethodType) else [hook]
    return own + [part for each in inner for part in _parts(each)]


def _module(function: Callable) -> str:
    """The module that defines a function or the class of a callable object; decorators cannot hide it."""
    return getattr(function, "__globals__", {"__name__": type(function).__module__}).get("__name__", "")


def _of_engine(function: Callable, weights: bool = True) -> bool:
    """Whether a function belongs to ENGINES. weights: whether to include torch.nn.utils, which recomputes weights."""
    name = _module(function)
    return name.split(".")[0] in ENGINES and (weights or not name.startswith("torch.nn.utils."))


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _whole(weight: Tensor) -> Tensor:
    """Return the parameter if ZeRO-3 has gathered it. `linear_logps` accepts a DTensor of tensor parallelism."""
    if hasattr(weight, "ds_id") and not weight.numel():
        raise TypeError(
            "lm_head: its parameters are sharded and not gathered. Call the engine that deepspeed.initialize returns "
            "instead of the model inside it. ZeRO-3 does not gather a head with LoRA or modules_to_save: exclude "
            "lm_head from them, or use ZeRO-2"
        )
    return weight


def is_sharded(head: nn.Module) -> bool:
    """Whether an engine shards the head's own parameters and gathers them in its forward: fully_shard, ZeRO-3."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(head, FSDPModule) or any(hasattr(p, "ds_id") for p in head.parameters(recurse=False))


def _read_adapter(head: nn.Module, hidden: Tensor) -> HeadParts:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        own = bool(active) and all(name in head.modules_to_save for name in active)
        return read_head(head.modules_to_save[active[0]] if own else head.original_module, hidden)
    if not isinstance(head, LoraLinear):
        raise TypeError(f"lm_head: got {_name(head)}, expected a plain head or one with PEFT's LoRA or modules_to_save")
    base = read_head(head.base_layer, hidden)
    active = (
        [] if head.disable_adapters or head.merged else [name for name in head.active_adapters if name in head.lora_A]
    )
    if head.disable_adapters and head.merged:
        raise TypeError("lm_head: its LoRA is merged and also disabled; call unmerge_adapter() first")
    if any(name in head.lora_variant for name in active):
        raise TypeError(f"lm_head: got a variant of LoRA such as DoRA ({_name(head)}), expected plain LoRA")
    if not active:
        return base
    us, lows, bias = [], [], base.bias
    for name in active:
        a, b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        us.append(a(head.lora_dropout[name](hidden.to(a.weight.dtype))).to(hidden.dtype) * scaling)
        lows.append(b.weight.to(hidden.dtype))
        if b.bias is not None:
            bias = b.bias * scaling if bias is None else bias + b.bias * scaling
    return HeadParts(base.weight, bias, (torch.cat(us, -1), torch.cat(lows, -1)))


def call_as(head: nn.Module, function: Callable, hidden: Tensor) -> Any:
    """Call function(hidden) while the head's weights are loaded.

    If the head itself is sharded, the function temporarily replaces its forward, so that the engine's hooks gather the
    weights before it and before the backward, and reduce the gradients.
    """
    if not is_sharded(head):
        with _loaded(head):
            return function(hidden)
    own = vars(head).get("forward")
    head.forward = function
    try:
        return head(hidden)
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


@contextlib.contextmanager
def _loaded(head: nn.Module) -> Iterator[None]:
    """Run accelerate's hooks on the head (device_map), which load offloaded weights for the duration of the block."""
    hooked = [module for module in head.modules() if hasattr(module, "_hf_hook")]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            module._hf_hook.post_forward(module, None)
