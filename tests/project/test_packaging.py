"""What is installed, what it imports, and which modules may import which."""

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import re
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from repository import ROOT, python, run

import fused_po

INTERPRET = {"TRITON_INTERPRET": "1"}
KERNELS_SPEC = "import importlib.util as u, json; s = u.find_spec('kernels'); print(json.dumps(s and s.origin))"


def stand_in(folder: Path) -> Path:
    """Create a package named `kernels`, like Hugging Face's, in this folder."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("STAND_IN = True\n")
    return folder


# Importing.


INTEGRATIONS = sorted(f"fused_po.integrations.{path.stem}" for path in ROOT.glob("fused_po/integrations/[!_]*"))


@pytest.mark.parametrize(
    "modules",
    ("fused_po", "fused_po.planner.command", ", ".join(INTEGRATIONS)),
    ids=("fused_po", "planner", "integrations"),
)
def test_import_is_light(modules, tmp_path):
    """Run from another folder: beside torch only the package and the standard library are imported."""
    code = (
        f"import json, sys, torch; b = set(sys.modules); import {modules}; print(json.dumps([*set(sys.modules) - b]))"
    )
    added = json.loads(python(code, tmp_path))
    foreign = {name.split(".")[0] for name in added} - {"fused_po", "torch"} - set(sys.stdlib_module_names)
    assert foreign == set()
    assert not [name for name in added if name.startswith("fused_po.kernels.")]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_triton_is_imported_on_first_use(tmp_path):
    code = "import sys, fused_po; print(fused_po.backends('cpu')['triton'] * ('triton' in sys.modules))"
    assert python(code, tmp_path, INTERPRET).strip() == "yes, by name"


def test_the_name_kernels_is_left_to_others(tmp_path):
    """`import kernels` in the repository root never finds our folder as a regular package, but finds another's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    origin = json.loads(python(KERNELS_SPEC, ROOT))
    assert origin is None or not Path(origin).is_relative_to(ROOT / "kernels")
    path = {"PYTHONPATH": str(stand_in(tmp_path / "site"))}
    assert python("import kernels, fused_po; print(kernels.STAND_IN)", ROOT, path).strip() == "True"


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_transformers_from_the_root():
    """transformers imports `kernels` if it exists; it must not mistake our folder for it."""
    code = "import json, sys, fused_po, transformers; from transformers.utils import is_kernels_available as available;"
    code += "print(json.dumps([available(), getattr(sys.modules.get('kernels'), '__file__', None)]))"
    available, origin = json.loads(python(code, ROOT).splitlines()[-1])
    assert origin is None or not Path(origin).is_relative_to(ROOT / "kernels")
    assert origin or not available


# Which modules may import which. The longest matching name applies; the standard library is always allowed. PRIVATE is
# the device code: fused_po/kernels/__init__.py loads it by name, and no other module may name it.

PRIVATE = "fused_po.kernels"
COMMON = {"torch", "typing_extensions", "fused_po.checks"}  # torch requires typing_extensions
RULES = {
    "fused_po": COMMON | {"fused_po"},
    "fused_po.checks": {"torch"},
    "fused_po.integrations": COMMON
    | {
        f"fused_po.{name}"
        for name in ("backend", "integrations", "lm_head", "losses", "modules", "ops", "parallel", "reduce", "schedule")
    }
    | {
        "accelerate",
        "axolotl",
        "packaging",
        "peft",
        "transformers",
        "trl",
        "verl",
    },  # test_import_is_light
    "fused_po.kernels": {"torch"},
    "fused_po.losses": COMMON | {"fused_po.losses"},
    "fused_po.modules": COMMON | {f"fused_po.{name}" for name in ("lm_head", "losses", "modules", "ops", "reduce")},
    "fused_po.backend": {"torch"},
    "fused_po.backend.choose": {"torch", "fused_po.backend.interface", "fused_po.kernels", "fused_po.reference"},
    "fused_po.reference": {"torch", "fused_po.backend.interface", "fused_po.reference"},
    "fused_po.parallel": COMMON | {"fused_po.backend.interface", "fused_po.parallel"},
    "fused_po.ops": COMMON
    | {f"fused_po.{name}" for name in ("backend", "losses", "ops", "parallel", "reduce", "reference")},
    "fused_po.lm_head": COMMON | {f"fused_po.{name}" for name in ("backend", "lm_head", "ops", "parallel", "schedule")},
    "fused_po.lm_head.plan": {"torch"},
    "fused_po.planner": COMMON
    | {"fused_po.lm_head.plan", "fused_po.planner", "fused_po.schedule"}
    | {"transformers"},  # imported for a Hub id
    "fused_po.reduce": COMMON | {"fused_po.losses"},
    "fused_po.schedule": COMMON,
}


def within(name: str, parent: str) -> bool:
    return parent == "*" or name == parent or name.startswith(parent + ".")


def package_files() -> dict[Path, Path]:
    """The installed path and the source path of all files of the package."""
    files = {path.relative_to(ROOT): path for path in ROOT.glob("fused_po/**/*.py")}
    return files | {"fused_po" / path.relative_to(ROOT): path for path in ROOT.glob("kernels/**/*.py")}


def module_files() -> dict[str, Path]:
    """The source path of all modules, by name."""
    names = {".".join(name.with_suffix("").parts): path for name, path in package_files().items()}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(module: str, path: Path, known: set[str]) -> set[str]:
    """The absolute names of all imports in a file; `from a import b` counts as a.b if that is a module."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def allowed_for(module: str) -> set[str]:
    if module.startswith(PRIVATE + "."):
        return {"torch", "triton", ".".join(module.split(".")[:3])}
    return RULES[max((name for name in RULES if within(module, name)), key=len)]


def violations(module: str, path: Path) -> list[str]:
    found = []
    for name in imports(module, path, set(module_files())):
        device_code = name.startswith(PRIVATE + ".") and not module.startswith(PRIVATE + ".")
        side_door = name == PRIVATE and not within(module, "fused_po.backend.choose")
        if device_code or side_door or not any(within(name, other) for other in allowed_for(module)):
            found.append(f"{module} imports {name}")
    return found


def test_imports_follow_the_rules():
    files = module_files()
    assert {"fused_po", "fused_po.ops.logps", "fused_po.kernels", "fused_po.kernels.triton"} <= set(files)
    assert [line for file in files.items() for line in violations(*file)] == []


def test_device_code_is_loaded_in_one_place():
    """In the package only fused_po/kernels/__init__.py imports by a name computed at run time."""
    for module, path in module_files().items():
        dynamic = re.search(r"\b(import_module|__import__)\b", path.read_text(encoding="utf-8"))
        assert (module == PRIVATE) == bool(dynamic) or within(module, "fused_po.integrations"), module


@pytest.mark.parametrize(
    "module, line",
    [
        ("fused_po.kernels.triton.extra", "from fused_po import checks"),
        ("fused_po.kernels.triton.extra", "from .. import load"),
        ("fused_po.kernels.triton.extra", "import numpy"),
        ("fused_po.losses.extra", "from fused_po.ops.rows import as_rows"),
        ("fused_po.losses.extra", "from ..ops import logps"),
        ("fused_po.ops.extra", "from fused_po import kernels"),
        ("fused_po.ops.extra", "def f():\n    from fused_po import modules"),
        ("fused_po.ops.extra", "import fused_po"),
        ("fused_po.ops.extra", "from fused_po.lm_head import plan"),
        ("fused_po.lm_head.plan", "from fused_po import schedule"),
        ("fused_po.planner.extra", "from fused_po.lm_head import gemm"),
        ("fused_po.backend.choose", "from fused_po.kernels import triton"),
        ("fused_po.modules", "import fused_po.reference"),
        ("fused_po.integrations.extra", "from fused_po.kernels.triton import gradient"),
        ("fused_po.integrations.extra", "from fused_po.reference import rows"),
        ("fused_po", "from fused_po.kernels import load"),
    ],
)
def test_broken_rules_are_found(module, line, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(line)
    assert len(violations(module, path)) == 1


# Metadata and public names.


def test_build_needs_no_torch(tmp_path):
    """setup.py runs and reports the version without torch and triton."""
    pytest.importorskip("setuptools", minversion="77")
    lack = "import sys, runpy; sys.modules.update(torch=None, triton=None); sys.argv = ['setup.py', '--version'];"
    assert python(lack + f"runpy.run_path({str(ROOT / 'setup.py')!r})", tmp_path).split()[-1] == fused_po.__version__


def test_versions_agree():
    assert importlib.metadata.version("fused-po") == fused_po.__version__


def public():
    """(name, object) of everything public: the names of the package and of its public modules, with methods."""
    for name in fused_po.__all__:
        value = getattr(fused_po, name)
        yield name, value
        if inspect.ismodule(value):
            inside = {n: v for n, v in vars(value).items() if not n.startswith("_") and callable(v)}
            names = getattr(value, "__all__", [n for n, v in inside.items() if v.__module__ == value.__name__])
            yield from ((f"{name}.{n}", getattr(value, n)) for n in names)


@pytest.mark.parametrize("name, value", [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_documented_and_annotated(name, value):
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc and not doc.startswith(f"{name}("), "no docstring"
    functions = [value] if inspect.isfunction(value) else []
    if inspect.isclass(value):
        functions = [vars(value)[n] for n in ("__init__", "forward") if inspect.isfunction(vars(value).get(n))]
    for function in functions:
        signature = inspect.signature(function)
        bare = [p for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert not bare, f"{function.__qualname__}: no annotation on {bare}"
        assert signature.return_annotation is not signature.empty, f"{function.__qualname__}: no return annotation"


# Real wheels, sdists and editable installs, all offline: torch comes from this interpreter's site-packages.

TINY = """
import importlib.util, sys, torch, fused_po
logits, labels = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([1, -100])
backends = ["reference"] + ["triton"] * (importlib.util.find_spec("triton") is not None)
for backend in backends:
    if backend == "reference" or not torch.cuda.is_available():
        logps = fused_po.logps_from_logits(logits, labels, backend=backend).logps
        assert torch.allclose(logps, torch.tensor([-0.6931472, 0.0])), (backend, logps)
if sys.argv[1] == "stand-in":
    import kernels
    assert kernels.STAND_IN
print(fused_po.__file__)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository without ignored files."""
    target = tmp_path_factory.mktemp("copy") / "repository"
    built = (".*", "build", "dist", "runs", "shared", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*built)))


@pytest.fixture(scope="module")
def wheel(copy):
    pip("wheel", "-w", copy.parent / "wheels", copy, cwd=copy.parent)
    return next((copy.parent / "wheels").glob("*.whl"))


def files_below(folder: Path) -> set[str]:
    """The files in a folder, without what builds and Python left in it."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    left = {"build", "__pycache__", "fused_po.egg-info"}
    return {path.as_posix() for path in files if not left & set(path.parts[:-1])}


def pip(command: str, *arguments, cwd: Path, interpreter=sys.executable) -> None:
    """Run this interpreter's pip for another interpreter, without network."""
    pytest.importorskip("setuptools", minversion="77")
    flags = ["-q", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    run(sys.executable, "-m", "pip", "--python", interpreter, command, *flags, *arguments, cwd=cwd)


def environment(folder: Path) -> tuple[Path, Path]:
    """(interpreter, site-packages) of a new environment, which finds this one's packages after its own."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    interpreter = folder / Path(sysconfig.get_path("scripts")).name / Path(sys.executable).name
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", folder, None, interpreter).strip())
    theirs = [path for path in sys.path if path.endswith("-packages")]
    (site / "zz_parent.pth").write_text("\n".join(theirs))
    return interpreter, site


@pytest.mark.slow
@pytest.mark.parametrize("neighbour", ("alone", "stand-in"))
@pytest.mark.parametrize("how", ("wheel", "editable"))
def test_install(how, neighbour, copy, wheel, tmp_path):
    interpreter, site = environment(tmp_path / "env")
    what = [wheel] if how == "wheel" else ["-e", copy]
    pip("install", *what, cwd=tmp_path, interpreter=interpreter)
    if (
        neighbour == "stand-in"
    ):  # only now, since Hugging Face's package takes part in setuptools' builds where it is installed
        stand_in(site)
    place = Path(run(interpreter, "-c", TINY, neighbour, cwd=tmp_path, env=INTERPRET).split()[-1])
    assert place.is_relative_to(site if how == "wheel" else copy)
    origin = json.loads(python(KERNELS_SPEC, copy, None, interpreter))
    assert origin is None or not Path(origin).is_relative_to(copy)
    if how == "editable":
        run(interpreter, "-c", TINY, neighbour, cwd=copy, env=INTERPRET)


@pytest.mark.slow
def test_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    info = f"fused_po-{fused_po.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"fused_po", info}
    assert {"fused_po/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    assert {name for name in names if name.endswith(".py")} == {path.as_posix() for path in package_files()}
    for line in ("Name: fused-po", "License-Expression: Apache-2.0", "Requires-Python: >=3.10"):
        assert line in metadata.splitlines()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [re.match(r"Requires-Dist: (\w+)", line)[1] for line in required] == ["torch"]  # why: setup.py


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(copy, wheel, tmp_path):
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    python(build, copy)
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path)
    source = tmp_path / f"fused_po-{fused_po.__version__}"
    here, there = files_below(copy), files_below(source)
    assert here <= there, "MANIFEST.in leaves out what the tests may need"
    assert there - here == {"PKG-INFO", "setup.cfg"}
    pip("wheel", "-w", tmp_path / "again", source, cwd=tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(next((tmp_path / "again").glob("*.whl"))) as other:
        contents = [{name: archive.read(name) for name in archive.namelist()} for archive in (one, other)]
    assert contents[0] == contents[1]
