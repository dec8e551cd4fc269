"""The tests run on the GPU if there is one, else on the CPU, with the Triton kernels under Triton's interpreter."""

import contextlib
import importlib
import os
import tempfile

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator: large tensors use 2 MiB pages
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core; processes that a test starts inherit it
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # Inductor's cache does not distinguish instruction sets and numbers of threads: code compiled for others crashes.
    made_for = (os.environ.get(name, "any") for name in ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS"))
    user = str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    cache = "-".join(("torchinductor", user, *made_for))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), cache)

import pytest
import torch
from numerics import Beyond, decide, fresh_seed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    with contextlib.suppress(ImportError):
        importlib.import_module("interpreter_speed").prepare_once()

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # PyTorch may already be imported


@pytest.fixture
def seed(request):
    """A random seed from `numerics.fresh_seed`; printed when the test fails."""
    value = fresh_seed(request.node.nodeid)
    torch.manual_seed(value)
    request.node.user_properties.append(("seed", value))
    return value


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test whose error slightly exceeds its bound runs again with other seeds: see `numerics.decide`."""
    try:
        return (yield)
    except Beyond as first:
        names = pyfuncitem._fixtureinfo.argnames
        arguments = {name: pyfuncitem.funcargs[name] for name in names}
        if "seed" not in arguments:
            raise

        def run(seed: int) -> None:
            torch.manual_seed(seed)
            pyfuncitem.obj(**arguments | {"seed": seed})

        decide(first, run, arguments["seed"])
        return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    seeds = [value for name, value in item.user_properties if name == "seed"]
    if report.failed and seeds:
        report.sections.append(("seed", f"repeat with FUSED_PO_SEED={seeds[0]}"))


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch):
    """Unset COLUMNS, which some libraries set, so that commands do not wrap the lines they print."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def poison():
    """Fill uninitialised tensors with NaN (or the largest integer), so that elements left unwritten are noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
