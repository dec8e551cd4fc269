"""TRL's trainers read as source: the names of their losses, and their loss code run alone. TRL is not imported."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def trainer(name: str) -> Path:
    """The path of trl/<name>; skips the test if TRL is not installed."""
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("needs TRL: pip install -e '.[test]'")
    return Path(spec.origin).parent / name


def function(path: Path, name: str) -> ast.FunctionDef:
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == name]
    assert found, f"{path.name} has no {name} any more"
    return found[0]


def is_loss_type(node: ast.AST) -> bool:
    """Whether the node is loss_type, self.loss_type, args.loss_type or similar."""
    return getattr(node, "id", None) == "loss_type" or getattr(node, "attr", None) == "loss_type"


def compared_names(node: ast.AST) -> set[str]:
    """The strings that loss_type is compared with by ==, !=, in and not in."""
    names = set()
    for test in ast.walk(node):
        if isinstance(test, ast.Compare) and is_loss_type(test.left):
            values = ast.walk(test.comparators[0])
            names |= {v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    return names


def branch(body: ast.FunctionDef, name: str) -> list[ast.stmt]:
    """The statements under `if loss_type == name`."""
    for node in ast.walk(body):
        test = getattr(node, "test", None)
        equal = isinstance(node, ast.If) and isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq)
        if equal and name in compared_names(test):
            return node.body
    raise AssertionError(f"no branch for {name!r}")


def execute(statements: list[ast.stmt], **names) -> SimpleNamespace:
    """Run statements with torch, F and these names in scope, and return the variables."""
    scope = {"torch": torch, "F": torch.nn.functional, **names}
    exec(compile(ast.Module(body=statements, type_ignores=[]), "trl", "exec"), scope)
    return SimpleNamespace(**scope)
