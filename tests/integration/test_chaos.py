"""The toy job while its server is killed and stopped, requests hang, rewards misbehave and a loss is NaN."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys

import psutil
import pytest

from siren_megatron.metrics import read_metrics
from tests.integration.jobs import (
    LAUNCH,
    REPOSITORY,
    processes_mentioning,
    run_job,
    started_job,
    toy_options,
    wait_until,
)

# Building the toy checkpoint may come first; a busy machine takes its time.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

CHAOS = "tests/integration/chaos.py"
STEPS = 4
# Clocks and counts of faults; and how vLLM rounds, which depends on what it computes side by side.
OF_THE_MACHINE = re.compile(r"time/|wall_time|tokens_per_second|rollout_|weight_sync_")


@pytest.fixture(scope="module")
def toy_checkpoint():
    """As the quick start builds it, which takes it when it is there."""
    output = REPOSITORY / "runs" / "toy-countdown"
    build = [str(REPOSITORY / "tools" / "make_toy_checkpoint.py"), "countdown", "--output", str(output)]
    subprocess.run([sys.executable, *build, "--quiet"], check=True, timeout=600)
    return output


def faults(**by_step: str) -> dict[str, str]:
    return {"FAULTS": json.dumps({step.removeprefix("step_"): fault for step, fault in by_step.items()})}


def own_metrics(row):
    return {name: value for name, value in row.items() if not OF_THE_MACHINE.match(name)}


def test_a_server_that_dies_and_hangs_leaves_no_trace(toy_checkpoint, tmp_path):
    """One fault a step: each in a place of its own, and then everything is as if there had been none."""
    options = {"num_steps": STEPS, "rollout_max_in_flight": 2, "rollout_request_timeout": 10}
    environment = faults(
        step_1="kill the engine",
        step_2="kill the API server in an update",
        step_3="stop the engine",
        step_4="hang a request",
    )
    quiet = run_job(toy_options(toy_checkpoint, tmp_path / "quiet", **options))
    assert quiet.returncode == 0, quiet.stderr[-3000:]
    chaos = run_job(
        toy_options(toy_checkpoint, tmp_path / "chaos", **options), script=CHAOS, environment=environment
    )
    assert chaos.returncode == 0, chaos.stderr[-3000:]
    expected, rows = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("quiet", "chaos"))
    assert [own_metrics(row) for row in rows] == [own_metrics(row) for row in expected]
    assert sum(row["grad_norm"] for row in rows) > 0, "there is something to be the same"
    assert [row["rollout_restarts"] for row in rows] == [1, 1, 1, 0]
    assert [row["rollout_retries"] for row in rows][-1] == 1
    assert [row["rollout_dropped"] for row in rows] == [0] * STEPS
    assert sum(row[name] for row in expected for name in row if "rollout_re" in name) == 0
    said = [line for line in chaos.stdout.splitlines() if "starting vLLM again" in line]
    assert len(said) == 3 and "(3 of at most 3 times)" in said[2] and "is stopped" in said[2], said
    assert not processes_mentioning(str(tmp_path))


def rows_of(save):
    path = save / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def everyone_in(job):
    """All processes of a job, as SLURM knows them: the launcher, its ranks, and what these have started."""
    return [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]


def test_bad_samples_cost_themselves_and_signals_end_a_run_that_resumes(toy_checkpoint, tmp_path):
    save = tmp_path / "run"
    reward = {"reward-function": REPOSITORY / "tests" / "integration" / "hostile_countdown.py"}
    options = {**reward, "num_steps": 1000, "reward_time_limit": 1, "micro_batch_size": 8}
    first = [option.replace(".py", ".py:grade") for option in toy_options(toy_checkpoint, save, **options)]
    first = [o for i, o in enumerate(first) if o != "--reward" and first[i - 1] != "--reward"]
    environment = faults(step_2="not a number")
    with started_job(first, script=CHAOS, launcher=LAUNCH, environment=environment) as job:
        wait_until(lambda: job.poll() is not None or len(rows_of(save)) >= 3, 180, "three steps")
        job.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err[-3000:]
    rows = rows_of(save)
    last = rows[-1]["step"]
    assert (
        f"stopped by SIGTERM after step {last} of 1000, saved; go on with --load {save} --save {save}" in out
    )
    assert not processes_mentioning(str(save))
    # A response that raises, hangs, crashes or eats memory loses its own reward.
    assert sum(row["reward_errors"] for row in rows) > 0 and sum(row["reward_timeouts"] for row in rows) > 0
    assert max(row["reward"] for row in rows) > 0
    # Two updates a step: the one with the NaN is left out and kept, the other one counts.
    assert [row["skipped_updates"] for row in rows] == [0, 1, *[0] * (last - 2)]
    assert all(math.isfinite(row["grad_norm"]) for row in rows)
    kept = [path.name for path in (save / "bad_batches").iterdir()]
    assert kept == ["step_000002_update_1.safetensors"]

    # It goes on from there; SIGUSR1 comes to every process of the job, vLLM and the rewards included.
    with started_job([*first, "--load", str(save)], launcher=LAUNCH) as job:
        wait_until(lambda: job.poll() is not None or rows_of(save)[-1]["step"] >= last + 2, 180, "two steps")
        for process in everyone_in(job):
            process.send_signal(signal.SIGUSR1)
        out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err[-3000:]
    rows = rows_of(save)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert f"stopped by SIGUSR1 after step {len(rows)} of 1000" in out
    assert (save / "checkpoints" / "latest").read_text().strip() == f"step_{len(rows):06d}"
    assert not any(row["skipped_updates"] for row in rows[last:])
    assert not processes_mentioning(str(save))
