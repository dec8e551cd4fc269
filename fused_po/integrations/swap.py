"""Names of other packages put in another's place, and given back."""

from __future__ import annotations

import importlib
import sys
from typing import Any


class Swap:
    """What was put where, with what stood there before.

    A function is replaced in the module that defines it and in every module that has imported it by then, under
    whatever name; who imports it later finds it in the module that defines it.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, object]] = []

    def __bool__(self) -> bool:
        return bool(self._before)

    def put(self, module: str, name: str, value: object) -> None:
        """module.name = value, wherever it has been imported.

        Raises:
            ImportError: there is no such module.
            RuntimeError: it has no such name.
        """
        home = importlib.import_module(module)
        if not hasattr(home, name):
            raise RuntimeError(f"{module} has no {name!r}, which was to be replaced: a version that was never tested")
        old, package = getattr(home, name), module.split(".")[0]
        for holder in [m for n, m in sys.modules.items() if n.split(".")[0] == package and m is not None]:
            for alias in [key for key, held in vars(holder).items() if held is old]:
                self._before.append((holder, alias, old))
                setattr(holder, alias, value)

    def undo(self) -> None:
        """Everything as it was."""
        while self._before:
            setattr(*self._before.pop())
