"""What a model's LM head multiplies by: weight, bias, and the parts of a LoRA adapter on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

# Packages whose hooks move, gather, cut or recompute a head's weights, and change nothing else. Ours do nothing outside
# their own call; PEFT's modules_to_save copies the head together with the hook on it.
ENGINES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "fused_po")
# A module's hooks that see logits or their gradients: forward hooks first.
AFTER = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class HeadParts(NamedTuple):
    """raw = hidden @ weight.T + bias, plus u @ low.T for low_rank = (u, low): what `linear_logps` takes."""

    weight: Tensor  # [V, H]
    bias: Optional[Tensor]  # [V]
    low_rank: Optional[tuple[Tensor, Tensor]]  # ([..., r], [V, r])


def read_head(head: nn.Module, hidden: Tensor) -> HeadParts:
    """The parts of an LM head for these hidden states [..., H].

    head: an nn.Linear, or what PEFT makes of one: LoRA (any number of active adapters, with dropout; merged or not) or
        a copy trained in full (modules_to_save). The weight is never merged, copied or cast.

    Raises:
        TypeError: a head whose forward is something else, such as DoRA or a quantised layer.
    """
    if type(head).__module__.startswith("peft."):
        return _read_adapter(head, hidden)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"lm_head: got {_name(head)}, expected torch.nn.Linear, alone or under PEFT's LoRA or modules_to_save; "
            "leave out fused=True for this model, or unfuse_lm_head(model)"
        )
    return HeadParts(_whole(head.weight), None if head.bias is None else _whole(head.bias), None)


def changes_of(head: nn.Module, measured: bool = False, called: bool = True) -> list[Callable]:
    """The hooks and replaced forwards on a head, and on the layers under an adapter, that work on its logits.

    Hooks of ENGINES are left out. So are forward pre-hooks on the head itself: a fused call honours them.

    measured: without backward hooks, which no forward shows.
    called: False for a head whose weight is read and that is never called, not even without rows: then pre-hooks count,
        also those of torch.nn.utils, which recompute the weight.
    """
    names = AFTER[:1] if measured else AFTER
    found = [hook for name in names for hook in getattr(every_module, "_global" + name).values()]
    for module in head.modules():
        found += [hook for name in names for hook in getattr(module, name).values()]
        if module is not head or is_sharded(head) or not called:  # called without rows, or twice, or not
            found += module._forward_pre_hooks.values()
        if "forward" in vars(module):
            found.append(vars(module)["forward"])
    if not called:
        found += every_module._global_forward_pre_hooks.values()
    return [hook for hook in found if not all(_of_engine(part, called) for part in _parts(hook))]


def called(hook: Callable) -> str:
    """A hook's name, for a message."""
    part = next((part for part in _parts(hook) if not _of_engine(part)), hook)
    return f"{getattr(part, '__qualname__', type(part).__qualname__)} of {_module(part)}"


def _parts(hook: Callable) -> list[Callable]:
    """The functions that a hook is made of: in a partial, a bound method, decorators."""
    inner = [getattr(hook, name) for name in ("func", "__func__", "__wrapped__") if hasattr(hook, name)]
    own = [] if isinstance(hook, partial | MethodType) else [hook]
    return own + [part for each in inner for part in _parts(each)]


def _module(function: Callable) -> str:
    """The module that a function, or the class of a callable object, was written in, whatever decorators say."""
    return getattr(function, "__globals__", {"__name__": type(function).__module__}).get("__name__", "")


def _of_engine(function: Callable, weights: bool = True) -> bool:
    """weights: those count that recompute a weight."""
    name = _module(function)
    return name.split(".")[0] in ENGINES and (weights or not name.startswith("torch.nn.utils."))


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _whole(weight: Tensor) -> Tensor:
    """The parameter, if ZeRO-3 has gathered it. A DTensor, cut by tensor parallelism, `linear_logps` takes as it is."""
    if hasattr(weight, "ds_id") and not weight.numel():
        raise TypeError(
            "lm_head: its parameters are sharded, and nothing gathers them while it runs. Call the engine that "
            "deepspeed.initialize made, not the model in it; ZeRO-3 does not gather a head under LoRA or "
            "modules_to_save: leave lm_head out of them, or use ZeRO-2"
        )
    return weight


def is_sharded(head: nn.Module) -> bool:
    """Whether an engine cut the head's own parameters and gathers them as its forward runs: fully_shard, ZeRO-3."""
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
        raise TypeError(f"lm_head: got {_name(head)}, expected PEFT's LoRA or modules_to_save on the head, or none")
    base = read_head(head.base_layer, hidden)
    active = (
        [] if head.disable_adapters or head.merged else [name for name in head.active_adapters if name in head.lora_A]
    )
    if head.disable_adapters and head.merged:
        raise TypeError("lm_head: its LoRA is merged and disabled at once; call unmerge_adapter() first")
    if any(name in head.lora_variant for name in active):
        raise TypeError(f"lm_head: got a variant of LoRA ({_name(head)}: DoRA or the like), expected plain LoRA")
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
    """function(hidden) with the head's weights at hand, wherever they are kept.

    A head that is sharded by itself runs it as its own forward: the engine's hooks gather the weights around it, and
    again for the backward, whose gradients they reduce.
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
    """Run what accelerate hooked to the head (device_map): weights kept elsewhere are brought in meanwhile."""
    hooked = [module for module in head.modules() if hasattr(module, "_hf_hook")]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            module._hf_hook.post_forward(module, None)
