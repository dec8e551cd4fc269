"""Metadata, and the mapping of kernels/<backend> to fused_po.kernels.<backend>.

Each backend's folder is mapped on its own. Mapping the top-level folder `kernels` as a whole breaks editable installs,
and an `__init__.py` in it would shadow Hugging Face's package of that name, which transformers imports.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
source = (root / "fused_po" / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
backends = sorted(path.parent.name for path in (root / "kernels").glob("*/__init__.py"))

# The repository's address on GitHub, "https://github.com/owner/name". Empty until it has one.
REPOSITORY = ""

# Triton is not required, although the kernels need it. PyTorch for Linux requires the build that fits it: triton for
# CUDA, triton-rocm for ROCm, none for the CPU. Environment markers cannot tell these apart, and a requirement of
# "triton" would install it over triton-rocm's files. Without Triton the reference backend runs, and
# `python -m fused_po info` says how to get it. The tests run the kernels in Triton's interpreter, on a CPU too.
required = ["torch>=2.11"]
interpreter = ["triton>=3.6; platform_system == 'Linux'"]
trl = ["trl>=1.15,<1.17"]
demo = ["transformers>=5.17", "tokenizers", "safetensors", "peft", "pyyaml", "tqdm", "matplotlib"]
data = ["datasets"]
bench = ["pytest-benchmark", "matplotlib", *trl, "liger-kernel"]
test = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "expecttest", "ninja", *trl, "peft", "accelerate"]
test += interpreter


LABEL = r"(?:!\[[^\[\]]*\]\([^()\s]+\)|[^\[\]])*"  # of a link: text, and images such as badges
LINK = re.compile(rf"(!?)\[({LABEL})\]\(([^()\s]+)\)")


def for_package_index(text: str, repository: str, version: str) -> str:
    """README with links that work outside the repository: to files of it if it has an address, else plain text."""

    def rewritten(match: re.Match) -> str:
        image, label, target = match.groups()
        label = LINK.sub(rewritten, label)
        if ":" not in target and not target.startswith("#"):
            if not repository:
                return "" if image else label
            target = f"{repository}/{'raw' if image else 'blob'}/v{version}/{target}"
        return f"{image}[{label}]({target})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)  # code stays as it is
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)


def compiled() -> dict:
    """Arguments that build the CUDA backend ahead of time; none unless FUSED_PO_BUILD_CUDA=1 asks for it."""
    if os.environ.get("FUSED_PO_BUILD_CUDA") != "1":
        return {}
    from torch.utils import cpp_extension

    spec = importlib.util.spec_from_file_location("library", root / "kernels" / "cuda" / "library.py")
    spec.loader.exec_module(library := importlib.util.module_from_spec(spec))
    wanted = library.architectures_ahead()
    reason = library.cannot_build(wanted)
    if reason is not None:
        sys.exit(f"FUSED_PO_BUILD_CUDA=1, but {reason}; without it the kernels are built on first use")
    cpp_extension.CUDA_HOME = str(library.cuda_home())
    print(f"building the CUDA backend for {', '.join(library.names(wanted))}", file=sys.stderr)
    extension = cpp_extension.CUDAExtension(
        "fused_po.kernels.cuda.compiled",
        [f"kernels/cuda/{name}" for name in library.SOURCES],
        extra_compile_args={"nvcc": library.flags(wanted)},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(
    name="fused-po",
    version=version,
    description="Fused log-probs and preference losses (DPO and beyond) for training language models",
    long_description=for_package_index((root / "README.md").read_text(encoding="utf-8"), REPOSITORY, version),
    long_description_content_type="text/markdown",
    project_urls={"Source": REPOSITORY, "Changelog": f"{REPOSITORY}/blob/v{version}/CHANGELOG.md"}
    if REPOSITORY
    else {},
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["DPO", "RLHF", "preference optimization", "log-probs", "language models", "PyTorch", "Triton"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["fused_po*"]) + [f"fused_po.kernels.{name}" for name in backends],
    package_dir={f"fused_po.kernels.{name}": f"kernels/{name}" for name in backends},
    package_data={"fused_po": ["py.typed"], "fused_po.kernels.cuda": ["*.h", "*.cuh", "*.cu"]},
    **compiled(),
    install_requires=required,
    extras_require={
        "trl": trl,
        "demo": demo,
        "data": data,
        "bench": bench,
        "test": test,
        "dev": [*demo, *data, *test, "mypy", "rich", "ruff"],
    },
)
