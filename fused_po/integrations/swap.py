"""Replace attributes of other packages' modules and classes, and restore them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from functools import partial


def _replace_references(package: str, old: object, new: object) -> None:
    """Set every module attribute of the package that is `old` to `new`, whatever its name."""
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == package and m is not None]:
        for alias in [key for key, value in vars(module).items() if value is old]:
            setattr(module, alias, new)


class Swap:
    """A set of replaced attributes; true while it is not empty."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def put(self, owner: object, name: str, value: object) -> None:
        """Set owner.name = value, for a module or a class, until `undo`."""
        exists = name in vars(owner)
        self._undo.append(partial(setattr, owner, name, vars(owner)[name]) if exists else partial(delattr, owner, name))
        setattr(owner, name, value)

    def replace(self, places: Iterable[tuple[str, str, object]]) -> None:
        """Set module.name = value for each (module, name, value), and all references to the old value in its package.

        If one of them fails, none is replaced. Does nothing if this Swap is not empty. `undo` also restores references
        that were imported after the replacement.

        Raises:
            ImportError: a module does not exist.
            RuntimeError: a module does not have the name.
        """
        if self:
            return
        try:
            for module, name, value in places:
                owner, package = importlib.import_module(module), module.split(".")[0]
                if not hasattr(owner, name):
                    raise RuntimeError(f"{module} has no {name!r} to replace: this version of {package} is not tested")
                old = getattr(owner, name)
                self._undo.append(partial(_replace_references, package, value, old))
                _replace_references(package, old, value)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Restore everything."""
        while self._undo:
            self._undo.pop()()
