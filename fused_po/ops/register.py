"""Register functions as PyTorch ops: schema, fake, derivative, and calls that skip the dispatcher.

The function of an op takes tensors first, then settings: numbers, names, and NamedTuples of them. PyTorch's schemas are
flat, so a NamedTuple is flattened to its fields in the schema; the code of this package uses the NamedTuple.

An op is a `torch.library.custom_op`, which compilers, modes and tensor subclasses can see. Its dispatch costs 50 to 250
microseconds of Python per call. Where nothing but autograd would see the op, its function is called directly.

Every op has first derivatives, in reverse mode. Second derivatives are an error; torch.func's reverse-mode transforms
work. Tensors that a backward reads are never returned to callers, so that callers may modify any result in place.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_po.ops.autograd import SECOND, has_tangent, refuse_forward_mode, transforms_active

PLAIN = (Tensor, torch.nn.Parameter)


class Field(NamedTuple):
    """One argument of an op: a value, or a NamedTuple of such."""

    name: str
    annotation: object
    fields: tuple[Field, ...] = ()  # of a NamedTuple

    def flat(self) -> list[tuple[str, object]]:
        """(name, annotation) of each value in the schema."""
        if not self.fields:
            return [(self.name, self.annotation)]
        return [(f"{self.name}_{name}", annotation) for field in self.fields for name, annotation in field.flat()]


def field_of(name: str, annotation: object) -> Field:
    """The field of an annotated argument."""
    if not (isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")):
        return Field(name, annotation)
    hints = typing.get_type_hints(annotation)
    return Field(name, annotation, tuple(field_of(name, hints[name]) for name in annotation._fields))


def flatten(values: tuple, fields: tuple[Field, ...]) -> list:
    """Flatten NamedTuples to their fields, as in the schema."""
    flat = []
    for value, field in zip(values, fields):
        if field.fields:
            flat.extend(flatten(value, field.fields))
        else:
            flat.append(value)
    return flat


def unflatten(flat: Iterator, fields: tuple[Field, ...]) -> list:
    """The inverse of `flatten`; lists come back as tuples."""
    values = []
    for field in fields:
        if field.fields:
            values.append(field.annotation(*unflatten(flat, field.fields)))
        else:
            value = next(flat)
            values.append(tuple(value) if type(value) is list else value)
    return values


def only_autograd_sees(arguments: tuple, tensors: Sequence[int]) -> bool:
    """Whether nothing but autograd can see an op of these arguments: no compiler, mode, transform, tracer, profiler.

    tensors: which arguments may be tensors. Only plain ones: subclasses, fake and meta tensors have rules of their own
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


class Op:
    """A function of tensors and settings, registered as a custom op. Calling it skips the dispatcher where it can."""

    def __init__(self, name: str, function: Callable, mutates_args: tuple[str, ...]) -> None:
        self.name, self.function = name, function
        signature = inspect.signature(function, eval_str=True)
        self.fields = tuple(field_of(p.name, p.annotation) for p in signature.parameters.values())
        self.settings_are_flat = not any(field.fields for field in self.fields)
        names = [field.name for field in self.fields]
        self.tensors = [i for i, f in enumerate(self.fields) if f.annotation in (Tensor, Optional[Tensor])]
        self.mutated = [names.index(argument) for argument in mutates_args]
        if self.tensors != list(range(len(self.tensors))):
            raise TypeError(f"{name}: tensors must come before settings, got {names}")
        self.result = signature.return_annotation  # a Tensor, None, or a NamedTuple of tensors
        self.definition = self._define(mutates_args)

    def _define(self, mutates_args: tuple[str, ...]) -> Callable:
        """The custom op, whose flat function refuses forward-mode tangents.

        The public functions refuse them too, but a graph compiled earlier calls the op alone, and PyTorch drops
        tangents there.
        """
        flat = [pair for field in self.fields for pair in field.flat()]
        self.schema_length = len(flat)
        n_results = len(getattr(self.result, "_fields", ()))

        def run(*values):
            if forward_ad._current_level >= 0:
                with forward_ad._set_fwd_grad_enabled(True):
                    for (name, _), value in zip(flat, values):
                        if isinstance(value, Tensor) and has_tangent(value):
                            refuse_forward_mode(self.name, name)
            return self._plain(self.function(*self.packed(values)))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        run.__signature__ = inspect.Signature(
            [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in flat],
            return_annotation=tuple[(Tensor,) * n_results] if n_results else self.result,
        )
        run.__name__ = run.__qualname__ = self.name.replace("::", "_")
        schema = torch.library.infer_schema(run, mutates_args=mutates_args)
        return torch.library.custom_op(self.name, run, mutates_args=mutates_args, schema=schema)

    @staticmethod
    def _plain(results):
        """Results as PyTorch takes them: a tensor, None, or a tuple of the very type tuple."""
        return tuple(results) if isinstance(results, tuple) else results

    def packed(self, values: tuple) -> tuple:
        """Arguments from those of the schema."""
        return values if self.settings_are_flat else tuple(unflatten(iter(values), self.fields))

    def flattened(self, arguments: tuple) -> tuple:
        """Arguments as the schema has them."""
        return arguments if self.settings_are_flat else tuple(flatten(arguments, self.fields))

    def results(self, values):
        """What an op has returned, under its names."""
        return self.result._make(values) if isinstance(values, tuple) else values

    def register_fake(self, function: Callable) -> Callable:
        """Shapes and dtypes of the results; takes the op's arguments."""
        self.definition.register_fake(lambda *values: self._plain(function(*self.packed(values))))
        return function

    def __call__(self, *arguments):
        """Run without a derivative."""
        if not only_autograd_sees(arguments, self.tensors):
            return self.results(self.definition(*self.flattened(arguments)))
        results = self.without_graph(*arguments)
        for i in self.mutated:
            torch.autograd.graph.increment_version(arguments[i])
        return results

    def without_graph(self, *arguments):
        """Run the function as the dispatcher runs it: below autograd."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.function(*arguments)


registered: list[Op] = []


def custom_op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], Op]:
    """Register the decorated function as an op."""

    def register(function: Callable) -> Op:
        registered.append(Op(name, function, mutates_args))
        return registered[-1]

    return register


class _NoSecondDerivative(torch.autograd.Function):
    """Returns a gradient unchanged; differentiating it is an error."""

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


def no_second_derivative(
    grads: tuple[Optional[Tensor], ...], inputs: tuple[Optional[Tensor], ...]
) -> tuple[Optional[Tensor], ...]:
    """The gradients of an op. With create_graph=True they depend on the inputs, but differentiating them raises."""
    inputs = tuple(v for v in inputs if isinstance(v, Tensor) and v.requires_grad)
    if not torch.is_grad_enabled() or not inputs:
        return grads
    return tuple(_NoSecondDerivative.apply(g, *inputs) if isinstance(g, Tensor) else g for g in grads)


def run_each(run: Callable, info, in_dims: tuple, *arguments) -> tuple:
    """vmap's rule for an op: run on each element of the batch, stack the results."""
    results = []
    for i in range(info.batch_size):
        results.append(run(*(v.select(d, i) if isinstance(d, int) else v for v, d in zip(arguments, in_dims))))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])


def differentiable(op: Op, backward: Callable, setup_context: Callable) -> Callable:
    """The op with its derivative; what is returned is called instead of the op.

    setup_context(ctx, arguments, results) saves what backward(ctx, *grads) needs. backward returns the gradients of
    the first arguments; the others have none.
    """

    def first_only(n_arguments: int, ctx, *grads):
        inputs = (*ctx.saved_tensors, *grads) if torch.is_grad_enabled() else ()
        with torch.no_grad():
            found = backward(ctx, *grads)
        return no_second_derivative((*found, *(None,) * (n_arguments - len(found))), inputs)

    def setup(ctx, inputs, output) -> None:
        setup_context(ctx, op.packed(inputs), op.results(output))

    flat_backward = functools.partial(first_only, op.schema_length)
    op.definition.register_autograd(flat_backward, setup_context=setup)

    def flat_call(*values):
        return op._plain(call(*op.packed(values)))

    def call(*arguments):
        if only_autograd_sees(arguments, op.tensors):
            if torch.is_grad_enabled():
                return op.results(fast_path.apply(*arguments))
            return op.without_graph(*arguments)
        values = op.flattened(arguments)
        return op.results(torch_func_path.apply(*values) if transforms_active() else op.definition(*values))

    def with_graph(ctx, *arguments):
        results = op.without_graph(*arguments)
        setup_context(ctx, arguments, results)
        return op._plain(results)

    # torch.func's transforms do not take the formula of a custom op, but that of an autograd.Function.
    torch_func_path = _function(
        f"Functional_{op.name.replace('::', '_')}",
        forward=flat_call,
        setup_context=setup,
        backward=flat_backward,
        vmap=functools.partial(run_each, flat_call),
    )
    fast_path = _function(
        op.name.replace("::", "_"), forward=with_graph, backward=functools.partial(first_only, len(op.fields))
    )
    return call


def _function(name: str, **methods: Callable) -> type:
    """An autograd.Function of these methods."""
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})
