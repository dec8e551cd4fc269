"""What every op has in common towards autograd: one derivative, in reverse mode.

A public function is marked `public`: it refuses forward-mode AD, and takes tensors made under inference_mode. An op
gets its formula by `differentiable`: a second derivative is an error, and torch.func's reverse-mode transforms work.
What a backward reads is saved in tensors that no caller gets, so that any result may be edited in place.

An op is a `torch.library.custom_op`, which compilers, modes and subclasses see. Its dispatch costs 50 to 250
microseconds of Python a call. Where nothing but autograd could see the op, `direct` runs its function at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")  # the arguments and the result of a decorated function, for type checkers
R = TypeVar("R")

INSTEAD = "compute these log-probs with torch.log_softmax where you need them"
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
    """The error for a tangent."""
    raise NotImplementedError(
        f"{function}: {name} has a forward-mode tangent (torch.func.jvp, jacfwd or hessian, or "
        "torch.autograd.forward_ad), and fused_po has reverse-mode derivatives only; use torch.autograd.grad, "
        f"torch.func.vjp or jacrev, detach what is constant, or {INSTEAD}"
    )


PLAIN = (Tensor, torch.nn.Parameter)


class Op(NamedTuple):
    """What is known of a custom op of this package."""

    name: str
    function: Callable
    tensors: list[int]  # which arguments are tensors, or None
    mutated: list[int]  # which it writes


registered: dict[Callable, Op] = {}  # by the custom op


def unseen(arguments: tuple, tensors: Sequence[int]) -> bool:
    """Whether nothing but autograd can see an op of these arguments: no compiler, mode, transform, tracer, profiler.

    tensors: which arguments may be tensors. Plain ones alone: subclasses, fake and meta tensors have rules of their own
    in PyTorch's dispatcher.
    """
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    for i in tensors:
        value = arguments[i]
        if value is not None and (type(value) not in PLAIN or value.is_meta):
            return False
    return True


def direct(op: Callable) -> Callable:
    """A custom op as a function that skips PyTorch's dispatcher where nothing would see the op. No derivative."""
    _, function, tensors, mutated = registered[op]

    def call(*arguments):
        if not unseen(arguments, tensors):
            return op(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # as the dispatcher calls it
            results = function(*arguments)
        for i in mutated:
            torch.autograd.graph.increment_version(arguments[i])
        return results

    return call


def custom_op(name: str, mutates_args: tuple[str, ...]) -> Callable:
    """`torch.library.custom_op` of a function that refuses forward-mode tangents.

    `public` refuses them too, but a graph compiled earlier calls the op alone, and PyTorch drops tangents there.
    """

    def register(function: Callable):
        parameters = inspect.signature(function, eval_str=True).parameters
        names = tuple(parameters)

        @functools.wraps(function)
        def run(*arguments):
            if forward_ad._current_level >= 0:
                with forward_ad._set_fwd_grad_enabled(True):
                    for argument, value in zip(names, arguments):
                        if isinstance(value, Tensor) and has_tangent(value):
                            refuse_forward_mode(name, argument)
            return function(*arguments)

        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        op = torch.library.custom_op(name, run, mutates_args=mutates_args, schema=schema)
        tensors = [i for i, p in enumerate(parameters.values()) if p.annotation in (Tensor, Optional[Tensor])]
        registered[op] = Op(name, function, tensors, [names.index(argument) for argument in mutates_args])
        return op

    return register


def no_tangent(function: str, name: str, run: Callable[[], Tensor]) -> Tensor:
    """What run returns, refused if it has a tangent, also where an autograd.Function has switched forward mode off."""
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


transform_in_graph._dynamo_marked_constant = True  # asked once, while tracing: see `resolve` in ops/backend.py


def check_graph(function: str) -> None:
    """Refuse what torch.compile cannot trace: forward mode, and reverse mode by torch.func."""
    transform = transform_in_graph()
    if transform == "jvp":
        refuse_forward_mode(function, "an argument")
    if transform == "grad":
        raise NotImplementedError(
            f"{function}: torch.func.grad, vjp and jacrev do not run inside torch.compile here; put torch.compile "
            "inside them, or call backward() on the compiled function's loss"
        )


def usable(value: Tensor) -> Tensor:
    """A tensor that autograd can save: one made under inference_mode becomes a normal tensor over the same memory."""
    if not value.is_inference() or torch.is_inference_mode_enabled() or value.requires_grad:
        return value
    if type(value) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return value
    place = value.storage_offset(), value.size(), value.stride()
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage(), *place)


def made_in_inference(value: object) -> bool:
    """Whether a value is, or holds, a tensor that was made under inference_mode."""
    if isinstance(value, Tensor):
        return value.is_inference()
    return isinstance(value, tuple) and any(isinstance(v, Tensor) and v.is_inference() for v in value)


def public(function: Callable[P, R]) -> Callable[P, R]:
    """A public function over ops: see the top of this file."""
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
        if forward_ad._current_level < 0 and not any(map(made_in_inference, (*arguments, *options.values()))):
            return function(*arguments, **options)
        arguments = [prepared(name, v) for name, v in zip(names, arguments)] + list(arguments[len(names) :])
        return function(*arguments, **{name: prepared(name, v) for name, v in options.items()})

    return call


class _Once(torch.autograd.Function):
    """A gradient as it is; differentiating it is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(SECOND)


def once(grads: tuple[Optional[Tensor], ...], inputs: tuple[Optional[Tensor], ...]) -> tuple[Optional[Tensor], ...]:
    """Gradients of an op; under create_graph=True they depend on the inputs, in a way that cannot be differentiated."""
    inputs = tuple(v for v in inputs if isinstance(v, Tensor) and v.requires_grad)
    if not torch.is_grad_enabled() or not inputs:
        return grads
    return tuple(_Once.apply(g, *inputs) if isinstance(g, Tensor) else g for g in grads)


def each_alone(run: Callable, info, in_dims: tuple, *arguments) -> tuple:
    """vmap's rule for an op: run on each element of the batch, results stacked."""
    results = []
    for i in range(info.batch_size):
        results.append(run(*(v.select(d, i) if isinstance(d, int) else v for v, d in zip(arguments, in_dims))))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])


def differentiable(op: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """Give a custom op its autograd formula; what is returned is called in place of the op."""
    name, function, tensors, _ = registered[op]

    def first_only(ctx, *grads):
        inputs = (*ctx.saved_tensors, *grads) if torch.is_grad_enabled() else ()
        with torch.no_grad():
            found = backward(ctx, *grads)
        return once(found, inputs)

    def setup(ctx, inputs, output) -> None:
        setup_context(ctx, inputs, output)

    op.register_autograd(first_only, setup_context=setup)

    def call(*arguments):
        if unseen(arguments, tensors):
            return alone.apply(*arguments) if torch.is_grad_enabled() else without_graph(*arguments)
        return functional.apply(*arguments) if transforms_active() else op(*arguments)

    def without_graph(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return function(*arguments)

    def with_graph(ctx, *arguments):
        results = without_graph(*arguments)
        setup_context(ctx, arguments, results)
        return results

    # torch.func's transforms do not take the formula of a custom op, but that of an autograd.Function.
    functional = _function(
        f"Functional_{call.__name__}",
        forward=call, setup_context=setup, backward=first_only, vmap=functools.partial(each_alone, call),
    )  # fmt: skip
    alone = _function(name.replace("::", "_"), forward=with_graph, backward=first_only)
    return call


def _function(name: str, **methods: Callable) -> type:
    """An autograd.Function of these methods."""
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
