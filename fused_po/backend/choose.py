"""Select the backend for an op, and handle backends that do not run on this machine."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from fused_po import kernels, reference
from fused_po.backend import interface

NAMES = (*kernels.NAMES, "reference")
ALWAYS_REFERENCE = ("cpu",)  # devices where backend=None never selects Triton: its interpreter is slow

CACHE_ERRORS = {"triton": (OSError, ValueError)}  # a cache folder that cannot be written, or truncated files

_interpreting = threading.Lock()  # Triton's interpreter replaces functions of the language while a kernel runs


# Arguments, by name, whose strides the kernels read; only their last dimension must be contiguous. `scale` checks its
# gradient itself. All other tensors are made contiguous, so what a function writes must have one of these names.
STRIDED = ("logits", "ref_logits", "basis", "out", "parts")
AS_THEY_ARE = ("grad",)


def _as_kernels_read(name: str, value: object) -> object:
    """Make an argument of a launcher, or each tensor of a tuple, contiguous if its kernel needs that."""
    if isinstance(value, tuple):
        tensors = any(isinstance(v, torch.Tensor) for v in value)
        return tuple(_as_kernels_read(name, v) for v in value) if tensors else value
    if not isinstance(value, torch.Tensor) or name in AS_THEY_ARE:
        return value
    if name not in STRIDED:
        return value.contiguous()
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"{name}: got stride {value.stride(-1)} in the last dimension, expected 1; copy it first")
    return value


def _launcher(name: str, function: Callable) -> Callable:
    """Wrap a backend's function: make arguments contiguous, and launch on the device of the first one.

    Arguments are made contiguous only here, so callers may pass any strides.
    """
    names, cache_errors = tuple(inspect.signature(function).parameters), CACHE_ERRORS.get(name, ())

    @functools.wraps(function)
    def launch(tensor: torch.Tensor, *arguments, **options):
        alone = _interpreting if tensor.device.type == "cpu" else contextlib.nullcontext()
        given = [_as_kernels_read(*pair) for pair in zip(names, (tensor, *arguments))]
        options = {key: _as_kernels_read(key, value) for key, value in options.items()}
        try:
            with alone, torch.cuda.device_of(tensor):
                return function(*given, **options)
        except cache_errors as error:
            raise RuntimeError(
                f"fused_po: backend {name!r} cannot compile or load a kernel ({type(error).__name__}: {error}). If its "
                "cache is damaged or cannot be written, delete the cache, or set TRITON_CACHE_DIR to another folder; "
                "backend='reference' does not need it"
            ) from error

    return launch


class _Launchers:
    """A backend's functions. For a missing one, the backend's module raises its own error."""

    def __init__(self, name: str) -> None:
        self.module = kernels.load(name)
        for function in self.module.__all__:
            if function != "unsupported":
                setattr(self, function, _launcher(name, getattr(self.module, function)))

    def __getattr__(self, function: str) -> Callable:
        return getattr(self.module, function)


@functools.cache
def get(name: str) -> ModuleType | _Launchers:
    """The functions of a backend that `resolve` has named."""
    return reference if name == "reference" else _Launchers(name)


def unsupported(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend does not support tensors of this device and dtype, or None if it does."""
    if name == "reference":
        return reference.unsupported(device, dtype)
    return kernels.unsupported(name, device, dtype)


_tried: dict[tuple[str, torch.device], str | None] = {}  # (backend, device) -> why it does not run there
_trying = threading.Lock()


def _try(name: str, device: torch.device) -> str | None:
    """Try a backend on a supported device with one row of eight logits, once per process. Why it fails, or None.

    This finds a missing compiler, an old driver or a cache that cannot be written before the first result is computed.
    A failure warns once.
    """
    if type(torch.empty(0)) is not torch.Tensor:  # fake tensors: nothing runs now
        return None
    with _trying:
        if (name, device) not in _tried:
            try:
                score = get(name).statistics
                score(
                    torch.zeros(1, 1, 8, device=device),
                    torch.zeros(1, device=device).long(),
                    1.0,
                    None,
                    -100,
                    interface.LOGPS,
                )
            except torch.OutOfMemoryError:
                return None  # not a problem of the backend; the op reports it
            except Exception as error:  # a compiler, a driver or a file system may raise anything
                _tried[name, device] = reason = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"fused_po: backend {name!r} does not run on {device}, another one is used ({reason}). "
                    f"backend={name!r} raises the full error; `python -m fused_po info` shows which backends run",
                    stacklevel=4,
                )
            else:
                _tried[name, device] = None
        return _tried[name, device]


def _best(device: torch.device, dtype: torch.dtype) -> str:
    """The first backend that supports such tensors and runs."""
    if device.type in ALWAYS_REFERENCE:
        return "reference"
    names = [name for name in kernels.NAMES if name not in kernels.BY_NAME]
    for name in names:
        if kernels.unsupported(name, device, dtype) is None and _try(name, device) is None:
            return name
    if device.type == "cuda" and all(kernels.missing(name) for name in names):
        for name in names:  # a GPU, and nothing to run on it
            _try(name, device)
    return "reference"


def resolve(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend for such tensors. A backend that is requested by name runs or raises."""
    backend = _best(device, dtype) if backend is None else backend
    if backend not in NAMES:
        raise ValueError(f"backend: got {backend!r}, allowed are {', '.join(map(repr, NAMES))}, or None")
    if backend != "reference" and kernels.missing(backend):
        raise ValueError(f"backend: {backend!r} is not available: {kernels.missing(backend)}")
    reason = unsupported(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run on {reason}; backend=None selects one that can")
    return backend


# The attribute that torch.compiler.assume_constant_result sets: torch.compile treats the name as a constant and does
# not trace the import of a backend. The decorator would import the compiler: one more second for `import fused_po`.
resolve._dynamo_marked_constant = True


def cannot_run(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend requested by name does not run on such tensors, or None. Does not warn."""
    reason = unsupported(name, device, dtype)
    if (
        reason is not None
        or name == "reference"
        or device.type == "cpu"
        or "statistics" not in kernels.load(name).__all__
    ):
        return reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _try(name, device)


def _device(device: object) -> torch.device:
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: got {type(device).__name__}, expected a str, a torch.device or None")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected one such as 'cpu', 'cuda' or 'cuda:1'") from error


def backends(device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """For each backend, whether it runs on tensors of this device and dtype, and if not, why.

    device: default: the GPU if there is one, else the CPU.

    >>> fused_po.backends("cpu")
    {'triton': 'no: a cpu tensor (...)', 'cuda': 'no: a cpu tensor (...)', 'reference': 'yes, chosen by backend=None'}
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = _device(device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {type(dtype).__name__}, expected a torch.dtype such as torch.bfloat16")
    chosen = resolve(None, device, dtype)
    answers = {}
    for name in NAMES:
        reason = unsupported(name, device, dtype) or _tried.get((name, device))
        by_name = ", only by name: it has not been measured on a GPU" if name in kernels.BY_NAME else ", by name"
        yes = "yes, chosen by backend=None" if name == chosen else f"yes{by_name}"
        answers[name] = f"no: {reason}" if reason else yes
    return answers
