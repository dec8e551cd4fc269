"""The option `--suite`, and the device it runs on."""

import contextlib
import os
import platform
import subprocess
import sys

# Memory on a CPU comes in pages of 2 MiB, for all providers. With small pages, page faults take a fifth of the time,
# more after a provider has freed gigabytes. torch reads this once, when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser):
    parser.addoption(
        "--suite", choices=("cpu", "gpu", "tiny"), help="cases to measure; the default depends on the device"
    )


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.suite(metafunc.config.getoption("--suite") or ("gpu" if DEVICE == "cuda" else "cpu"))
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="session")
def device():
    return DEVICE


@pytest.fixture(scope="session")
def rounds(pytestconfig):
    from measure import rounds_of

    return rounds_of(pytestconfig.getoption("--suite"), DEVICE)


@pytest.fixture(scope="session")
def circumstances():
    """What is needed to interpret a figure: versions, machine, commit, command."""
    from providers import versions

    from fused_po.planner.devices import copy_bandwidth

    if DEVICE == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    commit = ""  # without git
    with contextlib.suppress(OSError):
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(("/", "--benchmark-json"))]
    return {
        "machine": machine,
        "versions": versions(),
        "commit": commit,
        "command": " ".join(["pytest", *arguments]),
        "copy GB/s": copy_bandwidth(torch.device(DEVICE)) / 1e9,
        "THP_MEM_ALLOC_ENABLE": os.environ["THP_MEM_ALLOC_ENABLE"],
    }


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # a machine's name does not matter
