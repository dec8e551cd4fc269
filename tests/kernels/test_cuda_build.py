"""The CUDA backend without a GPU: it compiles without spills, names what is missing, and is never a default."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import nvcc
import pytest
import torch
from repository import ROOT

import fused_po
from fused_po import kernels
from fused_po.backend import choose as backends

cuda = importlib.import_module("fused_po.kernels.cuda")
library = cuda.build
KERNELS = {"gradient_kernel", "one_read_kernel", "scale_kernel", "statistics_kernel"}


def test_every_kernel_compiles_for_every_architecture_without_spills():
    rows = nvcc.figures()
    if isinstance(rows, str):
        pytest.skip(f"needs nvcc: {rows}")
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90a", "sm_100"}
    assert [row for row in rows if row["spills"]] == []
    per_arch = {(row["kernel"], row["dtype"]) for row in rows}
    assert {kernel for kernel, _ in per_arch} == KERNELS and len(rows) == 3 * len(per_arch) == 48
    of_one_read = {row["arch"]: row["registers"] for row in rows if row["kernel"] == "one_read_kernel"}
    assert 16 < of_one_read["sm_90a"] <= 64 and of_one_read["sm_100"] <= 64  # two blocks on a multiprocessor
    assert of_one_read["sm_80"] < 16  # 0: there are no clusters


def test_the_table_reads_the_output_of_ptxas():
    said = (
        "ptxas info    : Compiling entry function '_ZN8fused_po15one_read_kernelIf13__nv_bfloat16EEvNS_7ProblemEb' "
        "for 'sm_90a'\n    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 62 registers, used 1 barriers\n"
    )
    row = {"kernel": "one_read_kernel", "dtype": "fp32 to bf16", "arch": "sm_90a", "registers": 62, "spills": 16}
    assert nvcc.rows_of(said) == [row]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """An empty PATH; tools(name, output) adds a program to it."""
    folder = tmp_path / "tools"

    def put(name: str, output: str = "", where: Path = folder) -> Path:
        where.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(f"#!/bin/sh\necho '{output}'\n")
        (where / name).chmod(0o755)
        return where.parent

    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return put


RELEASE = "Cuda compilation tools, release {}, V{}.88"


def toolkit(tools, tmp_path, monkeypatch, release: str) -> None:
    home = tools("nvcc", RELEASE.format(release, release), tmp_path / "toolkit" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(home))


def test_errors_name_what_is_missing_and_what_to_do(tools, tmp_path, monkeypatch):
    wanted = ("9.0a",)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "no nvcc on PATH and no CUDA_HOME; install the CUDA toolkit" in library.cannot_build(wanted)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert "no nvcc that runs in" in library.cannot_build(wanted)
    toolkit(tools, tmp_path, monkeypatch, "12.4")
    assert library.cannot_build(wanted) == "no ninja; run `pip install ninja`"
    tools("ninja")
    assert library.cannot_build(wanted) == "no C++ compiler (c++); install g++, or set CXX to one"
    tools("c++")
    assert library.cannot_build(wanted) is None
    assert library.cannot_build(("8.0", "10.0")).startswith(
        "nvcc 12.4 does not compile for sm_100; that takes CUDA 12.8"
    )
    for release, arch in (("12.8", "10.0"), ("12.0", "9.0a"), ("11.0", "8.0")):  # the oldest supported version
        toolkit(tools, tmp_path, monkeypatch, release)
        assert library.cannot_build((arch,)) is None
    toolkit(tools, tmp_path, monkeypatch, "12.4")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvcc 12.4 in" in library.cannot_build(wanted) and "torch is built with CUDA 13.0" in library.cannot_build(
        wanted
    )


def test_a_missing_toolkit_is_an_error_by_name_and_the_default_uses_triton(tools, monkeypatch):
    """Simulates a GPU as far as possible without one."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "_try", lambda name, device: None)
    monkeypatch.setattr(library, "ahead_of_time", lambda: None)
    assert library.architectures() == ("9.0a",)
    assert backends.resolve(None, gpu, torch.bfloat16) == "triton"
    with pytest.raises(
        ValueError,
        match=r"backend: 'cuda' cannot run on this machine: no nvcc on PATH.*backend=None selects one that can",
    ):
        backends.resolve("cuda", gpu, torch.bfloat16)
    said = fused_po.backends(gpu)
    assert said["triton"] == "yes, chosen by backend=None" and said["cuda"].startswith(
        "no: this machine: no nvcc on PATH"
    )
    library.library.cache_clear()
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be built: no nvcc"):
        library.library()
    monkeypatch.setattr(library, "cannot_build", lambda wanted: None)
    assert fused_po.backends(gpu)["cuda"] == "yes, only by name: it has not been measured on a GPU"
    assert backends.resolve("cuda", gpu, torch.bfloat16) == "cuda"
    monkeypatch.setattr(kernels, "unsupported", lambda name, *_: "no triton" if name == "triton" else None)
    assert backends.resolve(None, gpu, torch.bfloat16) == "reference"


def test_unsupported_calls_are_errors():
    x, labels = torch.zeros(1, 2, 9), torch.zeros(2, dtype=torch.long)
    assert "a cpu tensor (the CUDA kernels run on NVIDIA GPUs)" in fused_po.backends("cpu", torch.float32)["cuda"]
    assert cuda.unsupported(torch.device("cuda"), torch.float64).startswith("dtype torch.float64")
    with pytest.raises(ValueError, match="backend: 'cuda' cannot run on a cpu tensor"):
        fused_po.logps_from_logits(x[0], labels, backend="cuda")
    with pytest.raises(ValueError, match="softcap: backend 'cuda' takes none"):
        cuda.statistics(x, labels, 1.0, 0.5, -100, 1)
    with pytest.raises(ValueError, match="outputs: backend 'cuda' has logps, entropy and lse"):
        cuda.statistics(x, labels, 1.0, None, -100, 16)
    with pytest.raises(ValueError, match="'cuda' has no kl; 'triton' has"):
        _ = cuda.kl
    from fused_po import reference

    assert set(cuda.__all__) | set(cuda.OTHERS) == set(reference.__all__)


def test_the_fewest_blocks_that_hold_a_row():
    on_chip = 232448  # of an H100
    sizes = {(32000, 2): 1, (50257, 2): 1, (128256, 2): 4, (262144, 2): 8, (128256, 4): 8, (262144, 4): 16}
    assert {key: cuda.cluster_blocks(*key, on_chip) for key in sizes} == sizes
    assert cuda.cluster_blocks(800_000, 4, on_chip) == 16  # one block on a multiprocessor
    assert cuda.cluster_blocks(1_000_000, 4, on_chip) is None


def test_setup_names_what_is_missing(tools, tmp_path):
    """FUSED_PO_BUILD_CUDA=1 without a toolkit stops with an error that says what to do."""
    environment = os.environ | {"FUSED_PO_BUILD_CUDA": "1"}
    command = [sys.executable, ROOT / "setup.py", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 1 and "FUSED_PO_BUILD_CUDA=1, but no nvcc on PATH and no CUDA_HOME" in run.stderr


# Loads the library as the first backend="cuda" does, then launches a kernel, which fails without a GPU.
LOAD = """
import ctypes, torch
from fused_po.kernels import cuda
torch.cuda.current_stream = lambda device: type("stream", (), {"cuda_stream": 0})
torch.cuda.device = lambda device: __import__("contextlib").nullcontext()
x, labels = torch.zeros(1, 2, 9), torch.zeros(2, dtype=torch.long)
try:
    cuda.statistics(x, labels, 1.0, None, -100, 1)
except RuntimeError as error:
    print(error)
"""


@pytest.fixture
def linkable(tmp_path):
    """The environment of a build. Empty libraries replace the two that torch without CUDA lacks for linking."""
    reason = library.cannot_build(("9.0a",))
    if reason is not None:
        pytest.skip(f"needs nvcc: {reason}")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: with one the backend's own tests build it")
    folder = tmp_path / "stand_ins"
    folder.mkdir()
    for name in ("c10_cuda", "torch_cuda"):
        subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", folder / f"lib{name}.so"], check=True)
    paths = {"LIBRARY_PATH": str(folder), "LD_LIBRARY_PATH": f"{folder}:{library.cuda_home() / 'lib64'}"}
    return os.environ | paths | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), "TORCH_CUDA_ARCH_LIST": "9.0a"}


@pytest.mark.slow
def test_concurrent_processes_build_once(linkable, tmp_path):
    """One process prints that it builds while the others wait; all load the library, and a later process reuses it."""
    run = [sys.executable, "-c", LOAD]
    how = {"env": linkable, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = [subprocess.Popen(run, **how) for _ in range(3)]
    ended = [process.communicate() for process in first]
    ended.append(subprocess.Popen(run, **how).communicate())
    for out, said in ended:
        assert out.startswith("fused_po_statistics: "), said[-2000:]  # CUDA's error: no device
    built = [said for _, said in ended if "fused_po: building the CUDA backend for sm_90a with nvcc" in said]
    assert len(built) == 1 and "building" not in ended[-1][1]
    assert len(list((tmp_path / "built").glob("fused_po_cuda_*/fused_po_cuda_*.so"))) == 1


@pytest.mark.slow
def test_setup_builds_ahead_of_time(linkable, tmp_path):
    environment = linkable | {"FUSED_PO_BUILD_CUDA": "1"}
    command = [sys.executable, ROOT / "setup.py", "-q", "build", "--build-base", tmp_path / "base"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "building the CUDA backend for sm_90a" in run.stderr
    (found,) = (tmp_path / "base").glob("lib*/fused_po/kernels/cuda/compiled*.so")
    load = f"import ctypes; ctypes.CDLL({str(found)!r}).fused_po_one_read"
    subprocess.run([sys.executable, "-c", "import torch;" + load], check=True, env=environment)
