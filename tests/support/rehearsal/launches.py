"""Every launch of a Triton kernel is compiled as for a GPU, then interpreted on the same memory, with checks.

Triton itself compiles the kernel from the arguments of the call: specialisation, compiler, ptxas for sm_90. So anything
that would stop a kernel on a GPU before it runs stops it here. A second copy of the kernels, loaded for Triton's
interpreter, then computes the result, while checks.py checks every access.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from interpreter_speed import prepare_once
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import LazyDict
from triton.language import standard
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from . import approximate, checks
from .device import on_cpu

PACKAGE = "fused_po.kernels.triton"
TWINS = "rehearsal_twins"
STANDARD = "triton.language.rehearsal_standard"
ARCHITECTURE = int(os.environ.get("FUSED_PO_REHEARSAL_ARCH", "90"))
WARP = 32
MAX_WARPS = 32
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # the largest shared memory of a block in bytes

_one_at_a_time = threading.RLock()  # the interpreter swaps functions of triton.language while a kernel runs
_compile = JITFunction.run


class Driver:
    """The parts of a driver that Triton uses for compilation. It launches nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, WARP)

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def set_current_device(self, device: int) -> None:
        torch.cuda.set_device(device)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.get_current_device())

    def get_device_interface(self) -> ModuleType:
        return torch.cuda


@contextlib.contextmanager
def interpreting(on: bool) -> Iterator[None]:
    """Set or unset TRITON_INTERPRET, which Triton reads when a kernel is defined or compiled."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    if on:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def load_interpreted(name: str, path: Path) -> ModuleType:
    """Load a module, or a package by its __init__.py, a second time under another name, for the interpreter."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with interpreting(True):
        spec.loader.exec_module(module)
    return module


def interpreted_copy(kernel: JITFunction) -> Any:
    """The interpreted copy of a kernel, from a copy of its module, or of the package for fused_po's kernels."""
    module, name = kernel.fn.__module__, kernel.fn.__name__
    if module.startswith(PACKAGE):
        if TWINS not in sys.modules:
            load_interpreted(TWINS, Path(sys.modules[PACKAGE].__file__))
        return getattr(sys.modules[TWINS + module.removeprefix(PACKAGE)], name)
    copy = sys.modules.get(f"{module}_rehearsed")
    return getattr(copy or load_interpreted(f"{module}_rehearsed", Path(sys.modules[module].__file__)), name)


@contextlib.contextmanager
def interpreted_language() -> Iterator[None]:
    """Patch triton.language for the interpreter and restore it afterwards, which the interpreter itself does not do.

    tl.sum, tl.max and similar functions are kernels themselves, so they have interpreted copies too.
    """
    copies = sys.modules.get(STANDARD) or load_interpreted(STANDARD, Path(standard.__file__))
    core, math = tl.core, tl.math
    holders = [tl, core, math, core.tensor, core.dtype, core.base_value, core.range, core.static_range]
    before = [(holder, dict(vars(holder))) for holder in holders]
    tl.standard = copies  # functions by which the interpreter recognises a sum or a maximum
    for name, copy in vars(copies).items():
        if isinstance(copy, InterpretedFunction) and hasattr(tl, name):
            setattr(tl, name, copy)
    try:
        yield
    finally:
        for holder, names in before:
            now = vars(holder)
            for name in [name for name in now if name not in names]:
                delattr(holder, name)
            for name in [name for name, value in names.items() if now.get(name) is not value]:
                setattr(holder, name, names[name])


def check_resources(name: str, grid: tuple[int, ...], compiled: Any) -> None:
    """The checks of a driver at a launch."""
    if not 0 < grid[0] < 2**31 or any(not 0 < size <= 65535 for size in grid[1:]):
        raise checks.Fault(f"{name}: a grid of {grid}; allowed are 2^31 - 1 by 65,535 by 65,535")
    limit = SHARED.get(ARCHITECTURE, SHARED[90])
    if compiled.metadata.shared > limit:
        raise checks.Fault(f"{name}: {compiled.metadata.shared} bytes of shared memory, sm_{ARCHITECTURE} has {limit}")
    if compiled.metadata.num_warps > MAX_WARPS:
        raise checks.Fault(f"{name}: {compiled.metadata.num_warps} warps, a block has at most {MAX_WARPS}")


def interpret(kernel: JITFunction, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
    """Compute the kernel's result with its interpreted copy, in the memory of the tensors."""
    name = kernel.fn.__name__
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, torch.Tensor) and argument.device.type != "cuda":
            raise checks.Fault(f"{name}: a tensor on {argument.device}")
    args = tuple(on_cpu(a) for a in args)
    kwargs = {key: on_cpu(a) for key, a in kwargs.items()}
    quiet = numpy.errstate(all="ignore")  # a GPU does not warn about log2(0), and tests turn warnings into errors
    with checks.watching(name, (*args, *kwargs.values())), interpreted_language(), quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a NumPy warning in Triton 3.6's interpreter
        interpreted_copy(kernel)[grid](*args, **kwargs)


def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """Replaces JITFunction.run: compile, check, interpret. Returns the compiled kernel, like Triton's own run.

    In fused_po's kernels no error is an Exception: fused_po would fall back to the next backend, and tests would pass.
    """
    name = kernel.fn.__name__
    with _one_at_a_time, _disable_current_modes():
        try:
            with interpreting(False):
                compiled = _compile(kernel, *args, grid=grid, warmup=True, **kwargs)
            if not warmup:
                size = tuple(grid(kwargs) if callable(grid) else grid)
                check_resources(name, size, compiled)
                if (hook := knobs.runtime.launch_enter_hook) is not None:
                    hook(LazyDict({"name": compiled.name, "function": None, "stream": 0}))
                interpret(kernel, size, args, kwargs)
        except Exception as error:
            ours = kernel.fn.__module__.startswith(PACKAGE)
            kind = checks.Fault if ours else NotImplementedError
            raise kind(f"{name}: {type(error).__name__}: {error}") from error
        return compiled


def install() -> None:
    """Replace Triton's driver and its launches in this process."""
    driver.set_active(Driver())
    prepare_once()
    checks.install()
    if os.environ.get("FUSED_PO_REHEARSAL_APPROXIMATE") == "1":
        approximate.install()
    JITFunction.run = run
