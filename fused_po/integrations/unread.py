"""Arguments that a loss does not read. The packages whose names we take accept them; so do we, with one warning."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

_warned: set[tuple[str, str, str]] = set()


def at_defaults(where: str, given: dict[str, Any], unread: dict[str, tuple[object, str]]) -> dict[str, Any]:
    """`given`, with what is not read at its default. unread: by argument, its default and what does read it.

    One warning a process for each argument that was set, naming `where`.
    """
    for name, (default, readers) in unread.items():
        value = given.get(name, default)
        if value is default or (type(value) is type(default) and value == default):
            continue
        if (where, name, readers) not in _warned:
            _warned.add((where, name, readers))
            warnings.warn(f"{where}: {name} is given and changes nothing; it is read by {readers}", stacklevel=4)
        given = given | {name: default}
    return given


def accepting(
    title: str, ours: type, constructor: inspect.Signature, settle: Callable[[dict], dict], unread: Callable, more: str
) -> type:
    """A subclass of a module `ours` under another package's name, which accepts what it does not read.

    Args:
        constructor: the signature of the constructor. settle: from all its arguments to those of `ours`.
        unread: (settings, arguments of a call) to what the call does not read, for `at_defaults`.
        more: what its docstring says besides.
    """
    call = inspect.signature(ours.forward)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = constructor.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = settle(dict(bound.arguments))
        ours.__init__(self, **settings)
        self.settings = settings

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(call.bind(self, *args, **kwargs).arguments)
        return ours.forward(**at_defaults(title, given, unread(self.settings, given)))

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = constructor.replace(parameters=[first, *constructor.parameters.values()])
    forward.__signature__, forward.__doc__ = call, ours.forward.__doc__
    return type(title, (ours,), {"__init__": __init__, "forward": forward, "__doc__": f"{ours.__doc__}\n{more}"})
