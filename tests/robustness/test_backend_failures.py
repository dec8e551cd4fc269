"""Backends that cannot be imported, compiled, cached or launched: backend=None falls back, backend=name raises."""

import json
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from numerics import DEVICE
from repository import ROOT

import fused_po
from fused_po import kernels
from fused_po.backend import choose as backends

SAID = "fused_po: backend 'triton' does not run on"
LABELS = torch.tensor([1, 4, -100], device=DEVICE)
CALLS = {
    "logps_from_logits": lambda x, **how: fused_po.logps_from_logits(x, LABELS, **how).logps,
    "linear_logps": lambda x, **how: fused_po.linear_logps(x, x.flip(1), LABELS.clamp(max=1), **how).logps,
    "kl_from_logits": lambda x, **how: fused_po.kl_from_logits(x, x.flip(1), LABELS, **how).kl,
    "linear_kl": lambda x, **how: fused_po.linear_kl(x, x, x.flip(1), x, **how).kl,
    "dpo_from_logits": lambda x, **how: (
        fused_po.dpo_from_logits(x[None].repeat(2, 1, 1), LABELS[None].repeat(2, 1), ref_logps=x[:2, :3], **how).losses
    ),
    "gae": lambda x, **how: fused_po.gae(x, x.flip(1), **how)[0],
}


@pytest.fixture
def fresh(monkeypatch):
    """Reset the choice of backends, and let CPU tensors choose like GPU tensors: the interpreted kernels."""
    monkeypatch.setattr(backends, "_tried", {})
    monkeypatch.setattr(backends, "ALWAYS_REFERENCE", ())


@pytest.fixture
def no_compiler(fresh, monkeypatch):
    """Every kernel launch raises the error of a machine without a C compiler."""

    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    if DEVICE == "cuda":
        monkeypatch.setattr("triton.runtime.jit.JITFunction.run", fail)
    else:
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", fail)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def test_the_best_backend_runs_where_it_can(fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve(None, torch.device(DEVICE), torch.float32) == "triton"
        assert backends.resolve(None, torch.device(DEVICE), torch.float64) == "reference"


def test_a_backend_that_does_not_compile_is_replaced_with_one_warning(no_compiler):
    """Calls with backend=None give right results. One warning says what failed, why, and what to do."""
    x = logits(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = {name: call(x) for name, call in CALLS.items()}
    assert len(caught) == 1
    said = str(caught[0].message)
    assert said.startswith(f"{SAID} {x.device}, another one is used (RuntimeError: Failed to find C compiler")
    assert "backend='triton' raises the full error; `python -m fused_po info`" in said
    for name, call in CALLS.items():
        assert torch.equal(results[name], call(x, backend="reference")), name
    assert fused_po.backends(x.device, torch.float32)["triton"].startswith(
        "no: RuntimeError: Failed to find C compiler"
    )
    assert fused_po.backends(x.device, torch.float32)["reference"] == "yes, chosen by backend=None"


@pytest.mark.parametrize("name", CALLS)
def test_a_backend_asked_for_by_name_raises(name, no_compiler):
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="Failed to find C compiler"):
        warnings.simplefilter("error")
        CALLS[name](logits(1), backend="triton")


def test_many_threads_warn_once(no_compiler):
    x, results, start = logits(2), [], threading.Barrier(8)

    def work():
        start.wait()
        results.append(fused_po.logps_from_logits(x, LABELS).logps)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(caught) == 1 and len(results) == 8 and all(torch.equal(r, results[0]) for r in results)


def test_out_of_memory_and_ctrl_c_do_not_disable_a_backend(fresh, monkeypatch):
    where = torch.device(DEVICE)
    for error in (torch.OutOfMemoryError, KeyboardInterrupt):

        def fail(*_, error=error, **__):
            raise error("not now")

        with monkeypatch.context() as patch:
            patch.setattr(backends, "get", lambda name: type("Backend", (), {"statistics": staticmethod(fail)}))
            if error is KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    backends.resolve(None, where, torch.float32)
            else:
                assert backends.resolve(None, where, torch.float32) == "triton"
        assert backends._tried == {}
    assert backends.resolve(None, where, torch.float32) == "triton"


def test_fake_tensors_do_not_try_a_backend(fresh):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_po.logps_from_logits(
            torch.randn(3, 9, device=DEVICE), torch.ones(3, dtype=torch.int64, device=DEVICE)
        ).logps.shape == (3,)
    assert backends._tried == {}


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Kernels run on the device of their tensors even if another device is current."""
    entered = []
    real = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or real(tensor))
    x = logits(3)
    fused_po.logps_from_logits(x, LABELS, backend="triton")
    assert [tensor.data_ptr() for tensor in entered] == [x.data_ptr()]


@pytest.fixture
def not_imported(request, monkeypatch):
    """Importing the kernels' package raises this error."""

    def fail(name, error=request.param):
        raise error

    monkeypatch.setattr(kernels.importlib, "import_module", fail)
    monkeypatch.setattr(backends, "_tried", {})
    kernels._load.cache_clear()
    backends.get.cache_clear()
    yield
    kernels._load.cache_clear()
    backends.get.cache_clear()


BROKEN = [
    (ModuleNotFoundError("no triton here", name="triton"), "no triton here; run `pip install triton`"),
    (
        ImportError("no such kernels", name="fused_po.kernels.triton"),
        "no such kernels; run `pip install -e .` in the clone",
    ),
    (OSError("libcuda.so.1: cannot open"), "importing it raises OSError: libcuda.so.1: cannot open"),
]


@pytest.mark.parametrize("not_imported, why", BROKEN, indirect=["not_imported"], ids=["triton", "kernels", "library"])
def test_a_backend_that_cannot_be_imported(not_imported, why):
    """The reference works; the backend by name raises; GPU tensors use the reference with one warning."""
    x = torch.zeros(1, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        none = dict.fromkeys(kernels.NAMES, f"no: {why}")
        assert fused_po.backends("cpu", torch.float32) == none | {"reference": "yes, chosen by backend=None"}
        logps = fused_po.logps_from_logits(x, torch.zeros(1, dtype=torch.int64)).logps
        assert abs(logps.item() + 0.6931472) < 1e-6 and not caught
        for _ in range(3):
            assert backends.resolve(None, torch.device("cuda"), torch.float32) == "reference"
    assert len(caught) == 1 and str(caught[0].message).startswith(f"{SAID} cuda") and why in str(caught[0].message)
    with pytest.raises(ValueError, match="backend: 'triton' is not available: ") as error:
        fused_po.logps_from_logits(x, torch.zeros(1, dtype=torch.int64), backend="triton")
    assert why in str(error.value)


# Triton's cache on disk, with kernels compiled ahead of time, which needs no GPU, in a process without the interpreter.
# A path below a file cannot be created even by root, who may write to read-only folders.

CACHE = """
import json, os, sys, torch
from pathlib import Path

cache, benchmarks = sys.argv[1:]
sys.path.insert(0, benchmarks)
import aot
from fused_po import kernels
from fused_po.backend import choose as backend

case = next(case for case in aot.cases() if case.kernel == "statistics_kernel")
kernels.load("triton").statistics = lambda *_: aot.compile_case(case, "90").asm["cubin"]

def compiled(folder):
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    try:
        return len(backend.get("triton").statistics(torch.zeros(1)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def cut(pattern):
    for path in Path(cache).glob(pattern):
        path.write_bytes(path.read_bytes()[:20])

Path(cache + ".file").touch()
results = [compiled(cache), compiled(cache)]
cut("**/[!_]*.json")
results.append(compiled(cache))
cut("**/__grp__*")
results += [compiled(cache), compiled(cache + ".file/below")]
print(json.dumps(results))
"""


def test_triton_s_cache_is_damaged_or_not_writable(tmp_path):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CACHE, str(tmp_path / "cache"), str(ROOT / "benchmarks")]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    first, cached, cut, made_anew, nowhere = json.loads(done.stdout)
    assert isinstance(first, int) and first > 1000 and cached == first
    start = "RuntimeError: fused_po: backend 'triton' cannot compile or load a kernel"
    assert cut.startswith(f"{start} (JSONDecodeError") and nowhere.startswith(f"{start} (NotADirectoryError")
    if made_anew != first:  # Triton 3.6 does not recreate a damaged list of files; the error says what to do
        assert made_anew.startswith(f"{start} (JSONDecodeError")
    for said in (cut, nowhere):
        assert (
            "delete the cache, or set TRITON_CACHE_DIR to another folder; backend='reference' does not need it" in said
        )
