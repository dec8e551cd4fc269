"""The compiled kernels: from an installation built with them, else built here on first use, by torch's own means.

`FUSED_PO_BUILD_CUDA=1 pip install .` builds them ahead of time. What is built on first use lies where torch keeps its
extensions (TORCH_EXTENSIONS_DIR), under a name made of the sources, the architectures and the tools' versions.
TORCH_CUDA_ARCH_LIST names other architectures than those of the GPUs here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = ("passes.cu", "one_read.cu")
AHEAD = ("8.0", "9.0a", "10.0")  # architectures of what is built ahead of time
OLDEST_NVCC = {8: (11, 0), 9: (12, 0), 10: (12, 8), 11: (13, 0), 12: (12, 8)}  # by an architecture's major number


def cuda_home() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME, CUDA_PATH, or where the nvcc on PATH lies."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    found = re.search(r"TOP=(\S+)", dry)  # nvcc may be a script or a link
    return Path(found[1]).resolve() if found else Path(nvcc).resolve().parent.parent


def nvcc_version(home: Path) -> tuple[int, int] | None:
    """The version of nvcc, such as (13, 0); None if no nvcc runs."""
    try:
        said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else None


def architectures() -> tuple[str, ...]:
    """Compute capabilities to build for, "9.0a" and the like: TORCH_CUDA_ARCH_LIST, or the GPUs here."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named:
        return tuple(dict.fromkeys(re.findall(r"\d+\.\d+[af]?", named)))
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}" + ("a" if major == 9 else "") for major, minor in sorted(here) if major >= 8)


def architectures_ahead() -> tuple[str, ...]:
    """What to build for a machine that is not known yet: TORCH_CUDA_ARCH_LIST, or sm_80, sm_90 and sm_100."""
    return architectures() if os.environ.get("TORCH_CUDA_ARCH_LIST") else AHEAD


def names(wanted: tuple[str, ...]) -> list[str]:
    """sm_90a for "9.0a"."""
    return ["sm_" + arch.replace(".", "") for arch in wanted]


def cannot_build(wanted: tuple[str, ...]) -> str | None:
    """Why the kernels cannot be built here for these architectures, and the way out; None if they can."""
    if sys.platform == "win32":
        return "this is Windows; it is built on Linux only"
    home = cuda_home()
    if home is None:
        return "no nvcc on PATH and no CUDA_HOME; install the CUDA toolkit and set CUDA_HOME to its folder"
    version = nvcc_version(home)
    if version is None:
        return f"no nvcc that runs in {home / 'bin'}; set CUDA_HOME to the folder of a CUDA toolkit"
    written = ".".join(map(str, version))
    theirs = torch.version.cuda
    if theirs is not None and int(theirs.split(".")[0]) != version[0]:
        return f"nvcc {written} in {home}, but torch is built with CUDA {theirs}; set CUDA_HOME to a toolkit {theirs}"
    for arch in wanted:
        oldest = OLDEST_NVCC.get(int(arch.split(".")[0]), (99, 0))
        if version < oldest:
            needs = ".".join(map(str, oldest))
            return f"nvcc {written} does not compile for {names((arch,))[0]}; that takes CUDA {needs} or later"
    if shutil.which("ninja") is None:
        return "no ninja; run `pip install ninja`"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}); install g++, or set CXX to one"
    return None


def gencode(wanted: tuple[str, ...]) -> list[str]:
    """nvcc's flags for these architectures."""
    return [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in names(wanted)]


def flags(wanted: tuple[str, ...]) -> list[str]:
    return ["-O3", "-std=c++17", *gencode(wanted)]


def ahead_of_time() -> Path | None:
    """The library of an installation that was built with one."""
    return next(iter(sorted(HERE.glob("compiled*.so"))), None)


def build_directory(wanted: tuple[str, ...]) -> Path:
    """Where the library for these architectures is built: another one for other sources, tools or flags."""
    from torch.utils import cpp_extension

    said = [torch.__version__, str(nvcc_version(cuda_home())), *flags(wanted)]
    content = b"".join(path.read_bytes() for path in sorted(HERE.glob("*.[ch]u*")) + [HERE / "row.h"])
    name = "fused_po_cuda_" + hashlib.sha256(content + " ".join(said).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / name


def build(wanted: tuple[str, ...]) -> Path:
    """The path of the library, built if it is not there. Processes wait for the one that builds."""
    import fcntl  # not on Windows

    from torch.utils import cpp_extension

    folder = build_directory(wanted)
    library, finished = folder / f"{folder.name}.so", folder / "finished"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "one_at_a_time", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system, whatever happens to this process
        if not finished.exists():
            home = cuda_home()
            tools = f"nvcc {'.'.join(map(str, nvcc_version(home)))}"
            said = f"fused_po: building the CUDA backend for {', '.join(names(wanted))} with {tools}, once, in {folder}"
            print(said, file=sys.stderr)
            (folder / "lock").unlink(missing_ok=True)  # torch's own, left by a process that was killed
            before, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, str(home)
            try:
                cpp_extension.load(
                    folder.name, [str(HERE / name) for name in SOURCES], extra_cuda_cflags=flags(wanted),
                    build_directory=str(folder), with_cuda=True, is_python_module=False,
                )  # fmt: skip
            finally:
                cpp_extension.CUDA_HOME = before
            finished.touch()
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; RuntimeError with the way out where they cannot be built."""
    path = ahead_of_time()
    if path is None:
        wanted = architectures()
        reason = cannot_build(wanted)
        if reason is not None:
            raise RuntimeError(f"backend 'cuda' cannot be built: {reason}")
        path = build(wanted)
    found = ctypes.CDLL(str(path))
    found.fused_po_error.restype = ctypes.c_char_p
    return found
