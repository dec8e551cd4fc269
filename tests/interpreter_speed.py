"""Triton's interpreter, twice as fast: it prepares triton.language once a launch, not in every function of a kernel."""

import types

import triton.language as tl
from triton.runtime import interpreter

BOTH = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # in place of a kernel: prepare both modules


def prepare_once() -> None:
    """In this process, from now on. In an inner function all is prepared already; Triton would look again, and long.

    Other versions of Triton than the tests' may lack these names: there it stays as it is.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    stock = interpreter._patch_lang
    scopes = []

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            scopes.remove(self)

    def prepare(fn):
        if scopes:
            return interpreter._LangPatchScope()
        scope = Scope()
        scope._changes = stock(BOTH)._changes
        scopes.append(scope)
        return scope

    interpreter._patch_lang = prepare
