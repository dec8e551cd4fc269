"""Package metadata and requirements, and the package without Triton or without Unix-only modules."""

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys

import pytest
import setuptools
from repository import ROOT

import fused_po
from fused_po import __main__ as command
from fused_po import kernels

URL = "https://example.org/owner/name"


@pytest.fixture
def setup_py(monkeypatch) -> tuple[dict, dict]:
    """(the names in setup.py, the arguments it gives to setup)."""
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    return runpy.run_path(str(ROOT / "setup.py")), given


def without(*modules: str, run: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process where these modules can be neither imported nor found as packages."""
    block = f"""
import importlib.metadata, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
version = importlib.metadata.version

def lacking(name):
    if name in {modules!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = lacking
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", block + run], env=env, cwd=ROOT, capture_output=True, text=True)


# The description on a package index, where relative links are broken.


@pytest.mark.parametrize(
    "markdown, without_address, with_address",
    [
        ("see [docs](docs/api.md#x)", "see docs", f"see [docs]({URL}/blob/v1.0/docs/api.md#x)"),
        ("![Chart](docs/a.png) drawn", " drawn", f"![Chart]({URL}/raw/v1.0/docs/a.png) drawn"),
        ("[web](https://pytorch.org)", None, None),
        ("![badge](https://img.org/x)", None, None),
        ("[here](#install)", None, None),
        ("a `[tokens, vocab]` matrix (large)", None, None),
        ("```\n[x](y)\n```\n[x](y)", "```\n[x](y)\n```\nx", f"```\n[x](y)\n```\n[x]({URL}/blob/v1.0/y)"),
        (
            "[![badge](https://img.org/x)](LICENSE)",
            "![badge](https://img.org/x)",
            f"[![badge](https://img.org/x)]({URL}/blob/v1.0/LICENSE)",
        ),
    ],
)
def test_links_of_the_description(markdown, without_address, with_address, setup_py):
    rewrite = setup_py[0]["for_package_index"]
    assert rewrite(markdown, "", "1.0") == (without_address or markdown)
    assert rewrite(markdown, URL, "1.0") == (with_address or markdown)


@pytest.mark.parametrize("address", ("", URL))
def test_the_readme_has_no_broken_links(address, setup_py):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", setup_py[0]["for_package_index"](readme, address, "1.0"), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    assert all(target.startswith(("https://", "#")) for target in targets), targets
    for target in targets:
        if target.startswith(URL):
            assert (ROOT / re.sub(r".*?/v1\.0/|#.*", "", target)).exists(), target


def test_addresses_of_the_project(setup_py):
    """Without a repository's address there are no links."""
    names, given = setup_py
    assert all(url.startswith(names["REPOSITORY"]) for url in given["project_urls"].values())
    assert bool(given["project_urls"]) == bool(names["REPOSITORY"])
    assert given["long_description"] == names["for_package_index"](
        (ROOT / "README.md").read_text(encoding="utf-8"), names["REPOSITORY"], fused_po.__version__
    )


# Triton: PyTorch installs the right version, or none.


def test_requirements(setup_py):
    """Only torch is required. The tests require Triton, and `[trl]` has the versions that `info` names."""
    given = setup_py[1]
    assert given["install_requires"] == ["torch>=2.11"]
    extras = given["extras_require"]
    for extra in ("test", "dev"):
        assert "triton>=3.6; platform_system == 'Linux'" in extras[extra]
    assert command.PACKAGES["trl"][1] == f"pip install '{extras['trl'][0]}'" and len(extras["trl"]) == 1
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in extras["dev"]}
    assert [name for name in names if f"\n{name.replace('-', '_')}==" not in pinned.replace("-", "_")] == []


def test_without_triton():
    """The reference works; backend="triton" raises and says how to install Triton; `info` lists it as missing."""
    code = """
import torch, fused_po
from fused_po import __main__ as command

x, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
assert abs(fused_po.logps_from_logits(x, labels).logps.item() + 0.6931472) < 1e-6
try:
    fused_po.logps_from_logits(x, labels, backend="triton")
except ValueError as error:
    print(error)
command.main(["info"])
"""
    done = without("triton", run=code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "backend: 'triton' is not available: No module named 'triton'; run `pip install triton`"
    assert "triton (not installed)" in done.stdout
    assert "  triton, for the kernels on a GPU: run `pip install triton`" in lines


@pytest.mark.parametrize(
    "system, hip, said",
    [
        ("linux", None, "run `pip install triton`"),
        ("linux", "7.2", "reinstall PyTorch for ROCm, which brings its own triton"),
        ("darwin", None, "PyTorch has no triton for this system; the reference backend runs"),
        ("win32", None, "PyTorch has no triton for this system; the reference backend runs"),
    ],
)
def test_how_to_get_triton(system, hip, said, monkeypatch):
    monkeypatch.setattr(kernels.sys, "platform", system)
    monkeypatch.setattr(kernels.torch.version, "hip", hip)
    assert kernels.how_to_get_triton() == said


@pytest.mark.parametrize("name", ("triton", "triton-rocm", "pytorch-triton-rocm", None))
def test_triton_under_its_other_names(name, monkeypatch):
    """PyTorch for ROCm has its own distribution names for Triton: `info` must not report Triton as missing."""

    def version(package):
        if package != name:
            raise importlib.metadata.PackageNotFoundError(package)
        return "3.7.1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert command.version_of("triton") == (name and "3.7.1")
    assert ("triton" in command.missing()) == (name is None)


# Windows has no fcntl.


def test_importing_needs_no_fcntl():
    """Import every module of the package and the command line in a new process; missing packages are ignored."""
    code = """
import pkgutil
import fused_po
from fused_po import __main__ as command
from fused_po.kernels.cuda import library

for module in pkgutil.walk_packages(fused_po.__path__, "fused_po."):
    if ".kernels." not in module.name and not module.name.endswith("__main__"):
        try:
            __import__(module.name)
        except ModuleNotFoundError as error:
            assert error.name.split(".")[0] in ("axolotl", "verl", "trl", "peft", "transformers"), error
assert command.main(["info"]) == 0
"""
    done = without("fcntl", run=code)
    assert done.returncode == 0, done.stderr


def test_the_cuda_backend_is_not_built_on_windows(monkeypatch):
    from fused_po.kernels.cuda import library

    monkeypatch.setattr(library.sys, "platform", "win32")
    assert library.cannot_build(("9.0a",)) == "this is Windows; it is built on Linux only"
