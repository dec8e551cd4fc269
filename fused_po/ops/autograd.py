"""Checks of the public functions for autograd: forward mode, torch.func inside a graph, inference tensors.

Every op has first derivatives, in reverse mode: see register.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Optional, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)
P = ParamSpec("P")  # the arguments and the result of a decorated function, for type checkers
R = TypeVar("R")

INSTEAD = "use torch.log_softmax for these log-probs"
SECOND = (
    "fused_po: second derivatives are not implemented (create_graph=True, or a gradient penalty, through fused "
    f"log-probs); {INSTEAD}"
)


def transforms_active() -> bool:
    """Whether the call is inside torch.func's grad, vjp, jacrev or vmap."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def has_tangent(value: Tensor) -> bool:
    """Whether forward-mode AD has a tangent for a tensor, below torch.func's other transforms too."""
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

    functorch = torch._C._functorch
    if not functorch.is_functorch_wrapped_tensor(value):
        return forward_ad.unpack_dual(value).tangent is not None
    top = functorch.peek_interpreter_stack()
    if top.level() == functorch.maybe_get_level(value):
        jvp = functorch.TransformType.Jvp
        if top.key() == jvp and forward_ad.unpack_dual(value).tangent is not None:
            return True
        value = functorch.get_unwrapped(value)
    with temporarily_pop_interpreter_stack():
        return has_tangent(value)


def refuse_forward_mode(function: str, name: str) -> None:
    """Raise the error for a forward-mode tangent."""
    raise NotImplementedError(
        f"{function}: {name} has a forward-mode tangent (torch.func.jvp, jacfwd or hessian, or "
        "torch.autograd.forward_ad), but fused_po supports only reverse mode; use torch.autograd.grad, torch.func.vjp "
        f"or jacrev, detach constants, or {INSTEAD}"
    )


def no_tangent(function: str, name: str, run: Callable[[], Tensor]) -> Tensor:
    """Call run, and refuse a result with a tangent, even where an autograd.Function has disabled forward mode."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return run()
    with forward_ad._set_fwd_grad_enabled(True):
        value = run()
        if isinstance(value, Tensor) and has_tangent(value):
            refuse_forward_mode(function, name)
    return value


def transform_in_graph() -> Optional[str]:
    """Which of torch.func's transforms torch.compile is tracing a call in: "jvp", "grad" or neither."""
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    kinds = torch._C._functorch.TransformType
    active = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    if forward_ad._current_level >= 0 or kinds.Jvp in active:
        return "jvp"
    return "grad" if kinds.Grad in active else None


transform_in_graph._dynamo_marked_constant = True  # asked once, while tracing: see `resolve` in backend/choose.py


def check_graph(function: str) -> None:
    """Raise for what torch.compile cannot trace here: forward mode, and torch.func's reverse mode."""
    transform = transform_in_graph()
    if transform == "jvp":
        refuse_forward_mode(function, "an argument")
    if transform == "grad":
        raise NotImplementedError(
            f"{function}: torch.func.grad, vjp and jacrev are not supported inside torch.compile; call torch.compile "
            "inside them, or call backward() on the loss of the compiled function"
        )


def usable(value: Tensor) -> Tensor:
    """A tensor that autograd can save: an inference tensor becomes a normal tensor that shares its memory."""
    if not value.is_inference() or torch.is_inference_mode_enabled() or value.requires_grad:
        return value
    if type(value) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return value
    place = value.storage_offset(), value.size(), value.stride()
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage(), *place)


def any_made_in_inference(values: Iterable[object]) -> bool:
    """Whether one of the values is, or is a tuple with, a tensor that was made under inference_mode."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_inference():
                return True
        elif isinstance(value, tuple) and any_made_in_inference(value):
            return True
    return False


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for public functions: see the module docstring."""
    names = tuple(inspect.signature(function).parameters)

    def prepared(name: str, value: object) -> object:
        if isinstance(value, tuple):
            return tuple(prepared(name, v) if isinstance(v, Tensor) else v for v in value)
        if not isinstance(value, Tensor):
            return value
        if forward_ad._current_level >= 0 and has_tangent(value):
            refuse_forward_mode(function.__name__, name)
        return usable(value)

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            check_graph(function.__name__)
            return function(*arguments, **options)
        if forward_ad._current_level < 0 and not any_made_in_inference((*arguments, *options.values())):
            return function(*arguments, **options)
        arguments = [prepared(name, v) for name, v in zip(names, arguments)] + list(arguments[len(names) :])
        return function(*arguments, **{name: prepared(name, v) for name, v in options.items()})

    return call
