"""Start pretrain_siren.py under torchrun as a user does, and end it by its own process group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
TOY_OPTIONS = {
    "reward": "countdown",
    "tensor-model-parallel-size": 2,
    "rollout-batch-size": 8,
    "rollout-num-samples": 4,
    "rollout-max-response-length": 16,
    "seq-length": 64,
    "global-batch-size": 16,
    "micro-batch-size": 4,
    "lr": 1e-4,
    "entropy-coeff": 0.1,
}


def toy_options(checkpoint: Path, save: Path, **more: object) -> list[str]:
    options = {
        "hf-checkpoint": checkpoint,
        "prompt-data": checkpoint / "prompts" / "train.jsonl",
        "save": save,
        **TOY_OPTIONS,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


TORCHRUN, LAUNCH = "torch.distributed.run", "siren_megatron.launch"


def command(
    options: list[str], ranks: int = 2, *, launcher: str = TORCHRUN, script: str = "pretrain_siren.py"
) -> list[str]:
    launch = [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node", str(ranks)]
    return [*launch, str(REPOSITORY / script), *options]


def run_job(
    options: list[str], ranks: int = 2, timeout: float = 400, **how: object
) -> subprocess.CompletedProcess[str]:
    """Run a job to its end; its output is in the result."""
    with started_job(options, ranks, **how) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def started_job(
    options: list[str], ranks: int = 2, *, environment: dict[str, str] | None = None, **how: str
) -> Iterator[subprocess.Popen[str]]:
    """A job in a session of its own; whatever is left of it is killed in the end."""
    process = subprocess.Popen(
        command(options, ranks, **how),
        cwd=REPOSITORY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(condition: Callable[[], object], timeout: float, what: str) -> None:
    """Poll `condition` until it holds; fails with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(0.1)


def kill_all(job: subprocess.Popen[str]) -> None:
    """SIGKILL for a job's processes, each by its own id: torchrun, the ranks, and all that they started."""
    tree = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=30)
    job.communicate()


def processes_mentioning(text: str) -> list[psutil.Process]:
    """Live processes whose command line holds `text` (a run's own directory, say)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and any(text in word for word in process.cmdline()):
                found.append(process)
    return found
