"""Names of other packages put in another's place, and given back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from functools import partial


def _hand_over(package: str, old: object, new: object) -> None:
    """`new` wherever a module of the package holds `old`, under whatever name."""
    for holder in [m for name, m in sys.modules.items() if name.split(".")[0] == package and m is not None]:
        for alias in [key for key, held in vars(holder).items() if held is old]:
            setattr(holder, alias, new)


class Swap:
    """What was put in the place of something else; true while there is any."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def put(self, owner: object, name: str, value: object) -> None:
        """owner.name = value, of a module or a class, until `undo`."""
        there = name in vars(owner)
        self._undo.append(partial(setattr, owner, name, vars(owner)[name]) if there else partial(delattr, owner, name))
        setattr(owner, name, value)

    def replace(self, places: Iterable[tuple[str, str, object]]) -> None:
        """module.name = value for each (module, name, value), and wherever that was imported; all of them or none.

        Who imports it before `undo` has it taken back, too. Does nothing if something has been put already.

        Raises:
            ImportError: there is no such module.
            RuntimeError: it has no such name.
        """
        if self:
            return
        try:
            for module, name, value in places:
                home, package = importlib.import_module(module), module.split(".")[0]
                if not hasattr(home, name):
                    raise RuntimeError(f"{module} has no {name!r}, which was to be replaced: a version never tested")
                old = getattr(home, name)
                self._undo.append(partial(_hand_over, package, value, old))
                _hand_over(package, old, value)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Everything as it was."""
        while self._undo:
            self._undo.pop()()
