"""What all tests share: quiet threading, the `gpus(n)` marker, the shared data sets."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

# Before anything imports torch: the suite runs several processes on few cores, and their thread pools fight
# (512 vLLM sequences took 28 s instead of 2.3 s). vLLM's servers and gloo ranks inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test reaches a network: models and tokenizers are built, not downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

# The same examples in every run; `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def _count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpus(n)` where fewer GPUs are present, saying how many there are."""
    marked = [(item, item.get_closest_marker("gpus")) for item in items]
    marked = [(item, marker) for item, marker in marked if marker is not None]
    if not marked:
        return
    present = _count_gpus()
    for item, marker in marked:
        if len(marker.args) != 1 or not isinstance(marker.args[0], int):
            raise pytest.UsageError(f"{item.nodeid}: the marker needs a number of GPUs: gpus(n)")
        if present < marker.args[0]:
            reason = f"needs {marker.args[0]} GPUs, {present} present"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets beside the repository (`../shared/data`, with gsm8k/ in it); skips without them."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}")
    return path
