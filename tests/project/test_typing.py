"""The types of the public names. `make lint` runs mypy over tests/project/typed; see the files there."""

import ast
import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from repository import ROOT

import fused_po

TYPED = Path(__file__).parent / "typed"


def test_sample_runs():
    """The sample that mypy checks also runs."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, TYPED / "usage.py"], env=os.environ | environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_sample_names_everything_public():
    tree = ast.parse((TYPED / "usage.py").read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = {node.attr for node in nodes if node.value.id == "fused_po"} | {node.value.id for node in nodes}
    assert set(fused_po.__all__) <= used


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with Python 3.11")
@pytest.mark.parametrize("function", (fused_po.linear_logps, fused_po.logps_from_logits), ids=lambda f: f.__name__)
def test_overloads_have_the_arguments_of_the_function(function):
    """Only `outputs` and the result differ between overloads."""

    def described(signature: inspect.Signature) -> list[tuple]:
        parameters = signature.parameters.values()
        empty = inspect.Parameter.empty
        return [(p.name, p.kind, p.annotation, p.default is empty) for p in parameters if p.name != "outputs"]

    overloads = typing.get_overloads(inspect.unwrap(function))
    assert len(overloads) == 3
    for overload in overloads:
        assert described(inspect.signature(overload)) == described(inspect.signature(function))
        assert "outputs" in inspect.signature(overload).parameters


@pytest.mark.slow
def test_mypy_finds_wrong_calls(tmp_path):
    """mypy passes usage.py, and reports each line of wrong.py that carries a `type: ignore`, and no other."""
    pytest.importorskip("mypy")
    wrong = (TYPED / "wrong.py").read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(wrong, 1) if "# type: ignore" in line}
    (tmp_path / "wrong.py").write_text("\n".join(line.split("  # type: ignore")[0] for line in wrong) + "\n")
    (tmp_path / "usage.py").write_text((TYPED / "usage.py").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", tmp_path / "usage.py"]
    done = subprocess.run([*command, tmp_path / "wrong.py"], cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert all(line.split(":")[0].endswith("wrong.py") for line in errors), done.stdout + done.stderr
    assert {int(line.split(":")[1]) for line in errors} == expected and len(expected) > 20
