"""Prepare the rehearsal's environment: compile runtime.c, and make its Python start the rehearsal.

    .rehearsal/bin/python tests/support/rehearsal/build.py      what `make rehearse` does once

The library and the .pth file are written only to that Python's own environment. A process is a rehearsal if it has the
environment variables of `environment()`, and so are its child processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = Path(sys.prefix) / "lib" / "rehearsal" / "libcuda.so.1"
SITE = Path(sysconfig.get_path("purelib"))
FLAGS = ("-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1")


def cannot(python: str = sys.executable) -> str | None:
    """Why this Python's torch cannot run a rehearsal, or None if it can."""
    code = "import torch; print(torch.version.cuda or '', torch.cuda.device_count())"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if found.returncode:
        return f"{python} has no torch"
    version, _, devices = found.stdout.strip().rpartition(" ")
    if not version:
        return "this torch is built without CUDA; `make rehearse` makes an environment with one that is"
    if devices != "0":
        return "there is a GPU: `make gpu-check` runs the tests on it"
    return None if compiler() else "there is no C compiler (cc or gcc)"


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def headers() -> Path | None:
    """A folder with CUDA's headers, from pip or from a toolkit."""
    toolkits = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for folder in (*SITE.glob("nvidia/cu*/include"), *toolkits, Path("/usr/local/cuda/include")):
        if (folder / "cuda_runtime_api.h").is_file() and (folder / "crt" / "host_defines.h").is_file():
            return folder
    return None


def build() -> None:
    """Compile the library and write the .pth file; exits with a one-line error if it cannot."""
    include = headers()
    if compiler() is None:
        sys.exit("build.py: there is no C compiler: install gcc, or set PATH to one")
    if include is None:
        sys.exit("build.py: no cuda_runtime_api.h: pip install nvidia-cuda-runtime nvidia-cuda-crt, or set CUDA_HOME")
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler(), *FLAGS, f"-I{include}", str(HERE / "runtime.c"), "-o", str(LIBRARY)], check=True)
    start = f"{HERE.parent}\nimport rehearsal; rehearsal.start()\n"
    (SITE / "fused_po_rehearsal.pth").write_text(start, encoding="utf-8")


def environment() -> dict[str, str]:
    """This process's environment variables plus those of a rehearsal."""
    preload = " ".join(filter(None, (str(LIBRARY), os.environ.get("LD_PRELOAD"))))
    return os.environ | {"LD_PRELOAD": preload, "FUSED_PO_REHEARSAL": "1"}


if __name__ == "__main__":
    build()
