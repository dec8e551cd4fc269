"""examples/trainer/README.md names every module, its users, and layers that the imports follow."""

import ast
import re
from pathlib import Path

import pytest
from repository import ROOT

EXAMPLES = ROOT / "examples"
TRAINER = EXAMPLES / "trainer"
PAGE = (TRAINER / "README.md").read_text(encoding="utf-8")
MODULES = {path.stem for path in TRAINER.glob("*.py")} - {"__init__"}
SCRIPTS = {path.stem for path in EXAMPLES.glob("*.py")}
TABLE = {m[1]: m[2].split(", ") for m in re.finditer(r"^\| `(\w+)\.py` \| .+ \| (.+) \|$", PAGE, re.M)}
DIAGRAM = [line for line in PAGE.splitlines() if line.startswith("    ")]


def imported(path: Path) -> set[str]:
    """The modules of trainer/ that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".") if not node.level else ["trainer", *filter(None, [node.module])]
            if parts[0] == "trainer":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found & MODULES


def layers() -> dict[str, int]:
    """The layer of each module in the diagram, 0 at the top."""
    rows = [(match[1], line) for line in DIAGRAM if (match := re.match(r"    (\w+) {2,}\S", line))]
    assert [name for name, _ in rows] == ["scripts", "rewards", "run", "models", "data", "base"]
    found = {}
    for number, (name, line) in enumerate(rows):
        text = re.sub(r"\(.*?\)", "", line.strip().removeprefix(name))
        found |= {word: number for word in re.findall(r"\w+", text) if word in MODULES}
    return found


def test_every_module_has_a_line_and_a_place():
    assert set(TABLE) == MODULES and set(layers()) == MODULES


def test_imports_go_down():
    layer = layers()
    for module in MODULES:
        for other in imported(TRAINER / f"{module}.py"):
            assert layer[module] <= layer[other], f"{module} imports {other}, which is above it"


def test_no_module_imports_a_script():
    for module in MODULES:
        tree = ast.parse((TRAINER / f"{module}.py").read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not names & SCRIPTS, module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_users_are_named(module):
    """All users are named; "all scripts" means the scripts that use this training loop."""
    users = {path.stem for path in (*EXAMPLES.glob("*.py"), *TRAINER.glob("*.py")) if module in imported(path)}
    said = set(TABLE[module])
    if said == {"most scripts and modules"}:
        assert len(users) > 8
        return
    if "all scripts" in said:
        assert len(users & SCRIPTS) >= 6
        said, users = said - {"all scripts"}, users - SCRIPTS
    assert said == users
