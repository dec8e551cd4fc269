"""Metadata, and the mapping of kernels/<backend> to fused_po.kernels.<backend>.

Each backend's folder is mapped on its own. Mapping the top-level folder `kernels` as a whole breaks editable installs,
and an `__init__.py` in it would shadow Hugging Face's package of that name, which transformers imports.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
source = (root / "fused_po" / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
backends = sorted(path.parent.name for path in (root / "kernels").glob("*/__init__.py"))

demo = ["transformers>=5.17", "tokenizers", "safetensors", "peft", "pyyaml", "tqdm", "matplotlib"]
data = ["datasets"]
bench = ["pytest-benchmark", "matplotlib", "trl", "liger-kernel"]
test = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ninja", "trl", "peft", "accelerate"]

setup(
    name="fused-po",
    version=version,
    description="Fused log-probs and preference losses (DPO and beyond) for training language models",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
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
    package_data={"fused_po": ["py.typed"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "demo": demo,
        "data": data,
        "bench": bench,
        "test": test,
        "dev": [*demo, *data, *test, "rich", "ruff"],
    },
)
