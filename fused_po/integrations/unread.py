"""Arguments that a loss does not use. Liger and OpenRLHF accept them; so do our replacements, with one warning."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

_warned: set[tuple[str, str, str]] = set()


def at_defaults(where: str, arguments: dict[str, Any], unused: dict[str, tuple[object, str]]) -> dict[str, Any]:
    """The arguments, with unused ones reset to their defaults.

    unused: argument -> (its default, what uses it). Each unused argument that was set warns once per process; the
        warning names `where`.
    """
    for name, (default, used_by) in unused.items():
        value = arguments.get(name, default)
        if value is default or (type(value) is type(default) and value == default):
            continue
        if (where, name, used_by) not in _warned:
            _warned.add((where, name, used_by))
            warnings.warn(f"{where}: {name} has no effect here, it is used only with {used_by}", stacklevel=4)
        arguments = arguments | {name: default}
    return arguments


def accepting(
    title: str,
    base: type,
    constructor: inspect.Signature,
    convert: Callable[[dict], dict],
    unused: Callable,
    extra_doc: str,
) -> type:
    """A subclass of the module class `base`, named `title`, which accepts arguments that it does not use.

    Args:
        constructor: the signature of the constructor. convert: maps its arguments to those of `base`.
        unused: maps (settings, arguments of a forward) to the arguments that the forward does not use, for
            `at_defaults`.
        extra_doc: appended to the docstring.
    """
    call = inspect.signature(base.forward)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = constructor.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = convert(dict(bound.arguments))
        base.__init__(self, **settings)
        self.settings = settings

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(call.bind(self, *args, **kwargs).arguments)
        return base.forward(**at_defaults(title, arguments, unused(self.settings, arguments)))

    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = constructor.replace(parameters=[first, *constructor.parameters.values()])
    forward.__signature__, forward.__doc__ = call, base.forward.__doc__
    return type(title, (base,), {"__init__": __init__, "forward": forward, "__doc__": f"{base.__doc__}\n{extra_doc}"})
