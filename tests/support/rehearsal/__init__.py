"""A rehearsal of the CUDA path on a machine without a GPU. README.md explains how it works and what it cannot show.

`start` prepares a process so that torch and Triton work as on a GPU. build.py provides the environment variables and
writes the .pth file through which Python calls `start` when it starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function after a module has been imported, without importing anything earlier than usual."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then, self.searching = name, then, False

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = exec_module
        return spec


def after_torch() -> None:
    from . import device

    device.install()


def after_triton() -> None:
    from . import launches

    launches.install()


def start() -> None:
    """Prepare this process if FUSED_PO_REHEARSAL is 1 and the device is visible. Python may read a .pth file twice."""
    if os.environ.get("FUSED_PO_REHEARSAL") != "1" or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport("torch", after_torch))
        sys.meta_path.insert(0, AfterImport("triton", after_triton))
