"""The peers' wheels for a machine without a network: `make peer-wheels`.

    python benchmarks/peer_wheels.py fetch         # downloads them into wheels/peers, which git ignores
    python benchmarks/peer_wheels.py unpack DIR    # extracts them into DIR, for PYTHONPATH; no pip, no network

Only what peers.py calls is included. These modules need torch, Triton, packaging and, for TRL, transformers, which must
be installed on that machine. The whole packages verl and unsloth_zoo need far more (ray, tensordict, datasets); their
kernels do not. TRL's trainers need datasets, pandas and pyarrow: 68 MB, over the limit. quack and Liger's kernel for
compute capability 9.0 need nvidia-cutlass-dsl: 92 MB for its compiler alone, also over the limit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NoReturn

FOLDER = Path(__file__).resolve().parent.parent / "wheels" / "peers"
LIMIT = 64 << 20
# The releases that peers.py was written for.
RELEASES = {
    "liger-kernel": "0.8.5",
    "trl": "1.16.0",
    "cut-cross-entropy": "25.1.1",
    "unsloth_zoo": "2026.10.9",
    "verl": "0.9.1",
    "quack-kernels": "0.6.5",
}
NOT_CARRIED = {"quack-kernels": "needs nvidia-cutlass-dsl, which is over the limit"}
# The machine that they are for, which may differ from the one that downloads them.
TARGET = (
    "--python-version", "3.12", "--implementation", "cp",
    "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64",
)  # fmt: skip


def fail(message: str) -> NoReturn:
    print(f"peer_wheels.py: {message}", file=sys.stderr)
    sys.exit(1)


def wheels(folder: Path) -> dict[str, Path]:
    """The wheels in a folder by project; exits if a project is there twice."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.whl")):
        project = re.sub(r"[-_.]+", "-", path.name.partition("-")[0]).lower()
        if project in found:
            fail(f"{folder} holds {found[project].name} and {path.name}; delete one of them")
        found[project] = path
    return found


def fetch(folder: Path = FOLDER) -> None:
    """Download what is missing, print the sizes, and exit with status 1 beyond LIMIT."""
    for package in RELEASES.keys() - NOT_CARRIED.keys():
        wanted = f"{package}=={RELEASES[package]}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", *TARGET]
        if subprocess.run([*pip, "--dest", str(folder), wanted]).returncode:
            fail(f"pip could not download {wanted}")
    check(folder)


def check(folder: Path) -> None:
    """Print the sizes of the wheels and their sum; exit with status 1 beyond LIMIT."""
    sizes = {path.name: path.stat().st_size for path in wheels(folder).values()}
    for name, size in sorted(sizes.items()):
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:7.2f} MiB  of {LIMIT >> 20} MiB")
    for package, reason in NOT_CARRIED.items():
        print(f"not included: {package} {reason}")
    if total > LIMIT:
        largest = max(sizes, key=sizes.get)
        fail(f"{folder} holds {total / 2**20:.2f} MiB, over {LIMIT >> 20} MiB; the largest is {largest}")


def unpack(target: Path, folder: Path = FOLDER) -> None:
    """Extract every wheel into `target`."""
    found = wheels(folder)
    if not found:
        fail(f"{folder} holds no wheels; `make peer-wheels` downloads them")
    for path in found.values():
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(target)
        except (OSError, zipfile.BadZipFile) as error:
            fail(f"{path.name} could not be extracted into {target}: {error}")
        print(path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="download them into wheels/peers")
    commands.add_parser("unpack", help="extract them").add_argument("directory", type=Path)
    args = parser.parse_args()
    if args.command == "fetch":
        fetch()
    else:
        unpack(args.directory)


if __name__ == "__main__":
    main()
