"""CUDA's operators computed on the CPU, over the memory of the stand-in runtime (runtime.c).

Every operator that torch registers for CUDA gets a kernel that views its tensors as CPU tensors, runs the CPU's
operator, and returns CUDA tensors. Everything above the operators is unchanged: autograd, fake tensors, the caching
allocator and its counters, random seeds, and all checks of devices and dtypes. mm and addmm with an out_dtype, which
CPUs do not have, keep CUDA's own checks.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, empty, empty_strided

LIBRARIES: list[torch.library.Library] = []  # registrations end when these objects are collected
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

# These need no computation: torch's own kernels only create or reshape tensors.
KEPT = frozenset((
    "_cudnn_init_dropout_state", "_efficientzerotensor", "_pin_memory",
    "_reshape_alias", "_to_sparse", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_strided",
    "is_pinned", "is_same_size", "is_set_to", "record_stream", "resize_", "set_", "unfold", "view", "view_as_complex",
    "view_as_real",
))  # fmt: skip
# Operators of libraries without a CPU counterpart. A call fails with CUDA's error.
LEFT_OUT = (
    "_cslt",
    "_cudnn",
    "_efficient",
    "_flash",
    "_nested",
    "_scaled_dot",
    "_sparse",
    "cudnn",
    "miopen",
    "quantize",
    "sparse",
)
# These take CPU and GPU tensors together.
BETWEEN_DEVICES = ("_copy_from", "copy_", "index", "_index", "_unsafe_index", "_foreach_copy_", "_assert_async")


def on_cpu(tensor: Any) -> Any:
    """The same memory as a CPU tensor; anything that is not a CUDA tensor is returned unchanged."""
    if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    view = empty(0, dtype=tensor.dtype)  # not torch.empty, which a test may replace
    view.set_(whole, tensor.storage_offset(), tensor.size(), tensor.stride())
    if tensor.is_conj():
        view = view.conj()
    return view._neg_view() if tensor.is_neg() else view


def on_cuda(tensor: Any) -> Any:
    """A CUDA tensor with the values and strides of a CPU tensor."""
    if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
        return tensor
    dense = not tensor.numel() or all(stride > 0 for stride, size in zip(tensor.stride(), tensor.shape) if size > 1)
    strides = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
    made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cuda")
    if tensor.numel():
        torch.ops.aten.copy_.default.redispatch(CPU, on_cpu(made), tensor)
    return made


def cpu_generator(generator: torch.Generator | None) -> torch.Generator:
    """A CPU generator for one call, seeded from the CUDA generator, whose state advances."""
    if generator is None:
        generator = torch.cuda.default_generators[0]
    if generator.device.type == "cpu":
        return generator
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed(hash((generator.initial_seed(), offset)) % 2**63)


def lowered(argument: Any) -> Any:
    """Convert an argument of a CUDA operator for the CPU's operator."""
    if isinstance(argument, Tensor):
        return on_cpu(argument)
    if isinstance(argument, torch.device):
        return torch.device("cpu") if argument.type == "cuda" else argument
    if type(argument) in (list, tuple):
        return type(argument)(lowered(item) for item in argument)
    return argument


def raised(result: Any) -> Any:
    """Convert a result of the CPU's operator to that of the CUDA operator."""
    if isinstance(result, (list, tuple)):
        return [raised(item) for item in result]
    return on_cuda(result)


def dtype_of_number(number: bool | int | float, beside: list) -> torch.dtype:
    """The dtype of a tensor that replaces a number: wide if the other tensors have dimensions, else their dtype."""
    if not isinstance(number, float):
        return torch.bool if isinstance(number, bool) else torch.int64
    floating = [a for a in beside if isinstance(a, Tensor) and a.is_floating_point()]
    if any(tensor.dim() for tensor in floating):
        return torch.float64
    return floating[0].dtype if floating else torch.get_default_dtype()


class Emulated:
    """The CUDA kernel of one operator, which runs the CPU's operator on the same memory."""

    def __init__(self, operator: torch._ops.OpOverload) -> None:
        self.operator, self.schema = operator, operator._schema
        self.written = {  # alias set -> (position, name) of the argument that is written to
            name: (i, argument.name)
            for i, argument in enumerate(self.schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for name in argument.alias_info.before_set
        }
        self.tensors = [i for i, a in enumerate(self.schema.arguments) if str(a.type) == "Tensor"]
        self.mixed = self.schema.name.removeprefix("aten::").startswith(BETWEEN_DEVICES)
        self.draws = torch.Tag.nondeterministic_seeded in operator.tags
        generators = [i for i, a in enumerate(self.schema.arguments) if str(a.type) == "Optional[Generator]"]
        self.generator = generators[0] if generators else None

    def wrapped(self, args: list) -> list:
        """Convert numbers to tensors without dimensions, which do not affect the result's dtype."""
        for i in self.tensors:
            if i < len(args) and isinstance(args[i], (bool, int, float)):
                args[i] = torch.scalar_tensor(args[i], dtype=dtype_of_number(args[i], args))
        return args

    def argument(self, place: tuple[int, str], args: list, kwargs: dict) -> Any:
        position, name = place
        return args[position] if position < len(args) else kwargs.get(name)

    def call(self, args: list, kwargs: dict) -> Any:
        """Run the CPU's operator, with random numbers from the CUDA generator's seed."""
        if not self.draws:
            return self.operator(*args, **kwargs)
        if self.generator is not None:
            name = self.schema.arguments[self.generator].name
            if self.generator < len(args):
                args[self.generator] = cpu_generator(args[self.generator])
            else:
                kwargs[name] = cpu_generator(kwargs.get(name))
            return self.operator(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(cpu_generator(None).initial_seed())
            return self.operator(*args, **kwargs)

    def check_devices(self, arguments: Iterable) -> None:
        """Raise CUDA's error if a CPU tensor with dimensions is passed together with CUDA tensors."""
        for argument in arguments:
            if isinstance(argument, (list, tuple)):
                self.check_devices(argument)
            elif isinstance(argument, Tensor) and argument.device.type == "cpu" and argument.dim():
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"(in {self.operator})"
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.mixed:
            self.check_devices((*args, *kwargs.values()))
        low, low_kwargs = self.wrapped([lowered(a) for a in args]), {name: lowered(a) for name, a in kwargs.items()}
        found = self.call(low, low_kwargs)
        for place in self.written.values():  # an out= tensor that the operator resized
            theirs, ours = self.argument(place, args, kwargs), self.argument(place, low, low_kwargs)
            if isinstance(theirs, Tensor) and theirs.shape != ours.shape:
                theirs.resize_(ours.shape)
                on_cpu(theirs).copy_(ours)
        returns = self.schema.returns
        if not returns:
            return None
        results = []
        for kind, value in zip(returns, found if len(returns) > 1 else (found,)):
            if kind.alias_info is not None and kind.alias_info.is_write:
                name = next(n for n in kind.alias_info.before_set | kind.alias_info.after_set if n in self.written)
                results.append(self.argument(self.written[name], args, kwargs))
            else:
                results.append(raised(value))
        return tuple(results) if len(returns) > 1 else results[0]


def check_product(a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor | None = None) -> None:
    """CUDA's checks of mm and addmm with an out_dtype."""
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected mat1 and mat2 to have the same dtype, but got: {a.dtype} != {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({tuple(a.shape)} and {tuple(b.shape)})")
    if out_dtype != a.dtype and not (out_dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16)):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    if out is not None and out.dtype != out_dtype:
        raise RuntimeError("out_dtype must be the same as the dtype of the provided out tensor")
    if out is not None and out.shape != (a.shape[0], b.shape[1]):
        raise RuntimeError(f"the out tensor has shape {tuple(out.shape)}, expected {(a.shape[0], b.shape[1])}")


def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A GEMM like on a GPU: products are summed in fp32 and rounded to out_dtype at the end."""
    wide = torch.float32 if a.dtype in (torch.float16, torch.bfloat16) else a.dtype
    return (on_cpu(a).to(wide) @ on_cpu(b).to(wide)).to(out_dtype)


def mm_dtype(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    check_product(a, b, out_dtype)
    return on_cuda(product(a, b, out_dtype))


def mm_dtype_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    check_product(a, b, out_dtype, out)
    on_cpu(out).copy_(product(a, b, out_dtype))
    return out


def addmm_dtype_out(
    c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    check_product(a, b, out_dtype, out)
    if c.dtype not in (out_dtype, a.dtype):
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")
    wide = product(a, b, torch.promote_types(out_dtype, torch.float32)) * alpha
    on_cpu(out).copy_(wide if beta == 0 else on_cpu(c).to(wide.dtype) * beta + wide)
    return out


def addmm_dtype(
    c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device="cuda")
    return addmm_dtype_out(c, a, b, out_dtype, beta=beta, alpha=alpha, out=out)


SPECIAL: dict[str, Callable] = {
    "mm.dtype": mm_dtype,
    "mm.dtype_out": mm_dtype_out,
    "addmm.dtype": addmm_dtype,
    "addmm.dtype_out": addmm_dtype_out,
}


def install() -> None:
    """Register a kernel for every CUDA operator. torch must see the device of the stand-in runtime."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device: the stand-in runtime is not preloaded (see rehearsal/README.md)")
    torch.cuda._sleep = lambda cycles: None  # a kernel that only waits
    torch.backends.cuda.enable_flash_sdp(False)  # attention then uses plain operators
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel.*")
    library = torch.library.Library("aten", "IMPL")
    LIBRARIES.append(library)
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    for full in sorted({*registered, "aten::copy_", "aten::_copy_from_and_resize"}):
        space, _, name = full.partition("::")
        base, _, overload = name.partition(".")
        if space != "aten" or base in KEPT or base.startswith(LEFT_OUT):
            continue
        operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if operator is not None:
            library.impl(name, SPECIAL.get(name) or Emulated(operator), "CUDA")
