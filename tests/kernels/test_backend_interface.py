"""Every backend has the functions and arguments of `fused_po.backend.interface.Backend`, and the same row numbers."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from fused_po import kernels, reference
from fused_po.backend import choose, interface
from fused_po.backend.interface import Backend

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = {name: f for name, f in vars(Backend).items() if inspect.isfunction(f) and not name.startswith("_")}
BUFFERS = {  # file of a backend -> the row layouts that it repeats
    "kernels/triton/dpo.py": (interface.DPORow, interface.PairRow),
    "kernels/triton/kl.py": (interface.KLRow,),
    "kernels/triton/policy.py": (interface.PolicyRow,),
    "kernels/cuda/__init__.py": (interface.PolicyRow,),
}
LENGTHS = {"TOKEN_FIELDS", "PAIR_FIELDS", "SAVED_FIELDS"}


def arguments(function) -> list[tuple[str, object]]:
    """Names and defaults."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name != "self"]


def backend(name: str):
    """The module."""
    if name == "reference":
        return reference
    if kernels.missing(name):
        pytest.skip(kernels.missing(name))
    return kernels.load(name)


@pytest.mark.parametrize("name", ("reference", *kernels.NAMES))
def test_signatures(name):
    module = backend(name)
    names = set(module.__all__)
    assert names <= set(FUNCTIONS), "a function that the interface does not have"
    assert names | set(getattr(module, "OTHERS", ())) == set(FUNCTIONS), "one that it lacks and does not name"
    for function in names:
        assert arguments(getattr(module, function)) == arguments(FUNCTIONS[function]), function


def test_tensors_that_are_written_are_not_copied():
    """Tensors with other names are made contiguous before the call, so a result written into a copy would be lost."""
    for name, function in FUNCTIONS.items():
        if inspect.signature(function).return_annotation == "None":
            written = {"out", "basis", "grad"} & set(inspect.signature(function).parameters)
            assert written and written <= {*choose.STRIDED, *choose.AS_THEY_ARE}, name


def named_rows(path: Path) -> dict[str, int]:
    """Constants NAME = number of a file, in the forms `A, B = range(2)` and tl.constexpr's."""
    text = path.read_text(encoding="utf-8")
    found = {}
    for names, values in re.findall(r"^([A-Z_0-9, ]+) = (.+)$", text, re.MULTILINE):
        names = [name.strip() for name in names.split(",")]
        in_range = re.search(r"range\((\d+)(?:, (\d+))?\)", values)
        if in_range:
            low, high = in_range.groups()
            numbers = list(range(int(low), int(high))) if high else list(range(int(low)))
        else:
            numbers = [int(n) for n in re.findall(r"(?<![\w.])\d+(?![\w.])", values)]
        if len(numbers) == len(names):
            found |= dict(zip(names, numbers))
    return found


@pytest.mark.parametrize("file", BUFFERS)
def test_rows_of_buffers(file):
    """Device code imports nothing from the package, so it repeats the row numbers."""
    here, compared = named_rows(ROOT / file), 0
    for layout in BUFFERS[file]:
        for row, number in vars(layout).items():
            if row.isupper() and row != "COUNT" and row in here and here[row] is not None:
                assert here[row] == number, f"{file}: {row}"
                compared += 1
    assert compared >= 3
    counts = {layout.COUNT for layout in BUFFERS[file]} | {interface.SavedRow.COUNT}
    assert {here[name] for name in LENGTHS & set(here)} <= counts


def test_bits_of_outputs():
    """Triton's and CUDA's bits are those of `Outputs`."""
    triton = named_rows(ROOT / "kernels/triton/statistics.py")
    cuda = named_rows(ROOT / "kernels/cuda/__init__.py")
    assert interface.Outputs._fields[: len(interface.DIFFERENTIABLE)] == interface.DIFFERENTIABLE
    assert [row.lower() for row in vars(interface.AuxRow) if row.isupper() and row != "COUNT"] == [
        *interface.Outputs._fields[len(interface.DIFFERENTIABLE) :]
    ]
    for i, field in enumerate(interface.Outputs._fields):
        assert triton[field.upper()] == 1 << i
        if f"{field.upper()}_OUT" in cuda:
            assert cuda[f"{field.upper()}_OUT"] == 1 << i
    assert {"LOGPS_OUT", "ENTROPY_OUT", "LSE_OUT"} <= set(cuda)


def test_contributing_lists_the_functions():
    """CONTRIBUTING's table of a backend's functions is complete."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = {name.split("(")[0] for cell in table for name in re.findall(r"`([\w(), ]+)`", cell)}
    assert set(FUNCTIONS) <= listed, set(FUNCTIONS) - listed


def test_no_mask_literals():
    """Outputs are read by name: no file of the package tests their bits by number."""
    for path in (ROOT / "fused_po").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
                numbers = [side for side in (node.left, node.right) if isinstance(side, ast.Constant)]
                assert not numbers or path.name == "interface.py", f"{path}:{node.lineno}"
