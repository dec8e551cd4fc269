"""Tests against packages that are too large, or have conflicting pins, to be installed in .venv: `make integrations`.

    python tests/support/peer_tests.py [verl openrlhf liger axolotl deepspeed]

Each is installed into a folder of its own, .peers/<name>, without its pinned dependencies (torch, transformers, vllm,
...), which come from this interpreter. Its tests then run with that folder on the path. Liger's own tests of its losses
run too, from its source distribution, with our classes instead of Liger's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".peers"
DEEPSPEED = (
    "deepspeed",
    "hjson",
    "msgpack",
    "py-cpuinfo",
    "einops",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "psutil",
)
# name -> what pip installs without dependencies: the version the tests were written for, and what it needs to import
PEERS = {
    "verl": (
        "verl==0.9.1", "tensordict", "omegaconf", "antlr4-python3-runtime==4.9.3", "ray", "hydra-core", "codetiming",
        "pylatexenc", "orjson", "cloudpickle", "pyvers", "importlib_metadata", "zipp", "msgpack", "jsonschema",
        "referencing", "attrs", "rpds-py", "jsonschema-specifications", "protobuf", "click", "requests", "urllib3",
        "certifi", "charset-normalizer", "idna",
    ),
    "openrlhf": ("openrlhf==0.11.2", *DEEPSPEED),
    "liger": ("liger-kernel==0.8.5",),
    "axolotl": ("axolotl==0.19.0", "addict", "pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    "deepspeed": ("deepspeed==0.19.8", *DEEPSPEED[1:]),
}  # fmt: skip
TESTS = {
    "liger": ("integrations/test_liger.py", "modules/test_liger_agreement.py"),
    "deepspeed": ("distributed/test_fused_heads.py", "integrations/test_trl_accelerate_configs.py"),
    **{name: (f"integrations/test_{name}.py",) for name in ("verl", "openrlhf", "axolotl")},
}
# Selects Liger's own tests, without its functional form and without cases of 1024 x 4096, which take minutes on a CPU.
LIGERS = "(dpo or cpo or simpo or orpo or kto) and not functional and not 4096"
# Intended differences: the text of an error; exo_pair without smoothing is an error in Liger, ours uses the paper's.
NOT_LIGERS = ("test_invalid_loss_type", "test_label_smoothing_validation")


def pip(*words: str) -> None:
    environment = os.environ | {"DS_BUILD_OPS": "0"}  # install deepspeed without its compiled parts
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, env=environment)


def install(name: str) -> Path:
    """The folder with the package, which is installed if missing."""
    folder = HOME / name
    done = folder / ".installed"
    wanted = "\n".join(PEERS[name])
    if not done.exists() or done.read_text() != wanted:
        pip("install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder), *PEERS[name])
        done.write_text(wanted)
    return folder


def run_tests(folder: Path, *words: str, cwd: Path = ROOT) -> int:
    """Run pytest with the folder first on the path; returns its exit status."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}).returncode


def ligers_own(folder: Path) -> int:
    """Run Liger's tests of its preference losses. A plugin installs our classes before the tests are imported."""
    source = HOME / "liger-source"
    if not any(source.glob("liger_kernel-*/test")):
        pip(
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "--dest",
            str(source),
            *PEERS["liger"],
        )
        with tarfile.open(next(source.glob("*.tar.gz"))) as archive:
            archive.extractall(source, filter="data")
    plugin = HOME / "plugins"
    plugin.mkdir(parents=True, exist_ok=True)
    lines = "import warnings\nfrom fused_po.integrations import liger\n\nliger.install()\n"
    (plugin / "ours_in_place.py").write_text(
        lines + 'warnings.filterwarnings("ignore", ".*has no effect in fused_po")\n'
    )
    checkout = next(source.glob("liger_kernel-*/test")).parent
    choice = " and ".join([LIGERS, *(f"not {name}" for name in NOT_LIGERS)])
    paths = os.pathsep.join(map(str, (folder, plugin, checkout)))
    return run_tests(Path(paths), "-p", "ours_in_place", "test/chunked_loss", "-q", "-k", choice, cwd=checkout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*PEERS, []], default=[*PEERS], metavar="name")
    failed = []
    for name in parser.parse_args().names:
        folder = install(name)
        print(f"\n== {PEERS[name][0]}", flush=True)
        status = run_tests(folder, "-q", *(str(ROOT / "tests" / file) for file in TESTS[name]))
        if name == "liger":
            print("\n== Liger's own tests, with our classes", flush=True)
            status = ligers_own(folder) or status
        failed += [name] if status else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
