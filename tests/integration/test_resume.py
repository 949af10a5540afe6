"""A run that is killed again and again and resumed is the run that was never killed, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from siren_megatron.metrics import read_metrics
from tests.integration.jobs import REPOSITORY, kill_all, run_job, started_job, toy_options, wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, INTERVAL = 10, 3
# Wall-clock values; everything else of a row has to be equal.
TIMES = ("wall_time", "tokens_per_second", "time/")
# In order: what is killed, and whether checkpoints are written in the background.
KILLS = [("rollout", 5, False), ("train", 8, False), ("save", 9, False), ("save", 9, True)]


def options(checkpoint: Path, save: Path, **more: object) -> list[str]:
    small = {"rollout_batch_size": 4, "global_batch_size": 8, "micro_batch_size": 2}
    return toy_options(checkpoint, save, num_steps=STEPS, save_interval=INTERVAL, **small, **more)


def rows_without_times(save: Path) -> list[dict[str, float]]:
    rows = read_metrics(save / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def run_and_kill(arguments: list[str], marks: Path, stage: str, step: int) -> None:
    """Start the run and kill all of it once it is at a stage of a step."""
    marks.mkdir()
    stop = str(step if stage == "save" else 0)
    environment = {"SIREN_TEST_MARKS": str(marks), "SIREN_TEST_STOP_IN_SAVE": stop}
    with started_job(arguments, script="tests/integration/marked_run.py", environment=environment) as job:
        wait_until(
            lambda: (marks / f"{stage}-{step}").exists() or job.poll() is not None, 180, f"{stage} of {step}"
        )
        assert job.poll() is None, job.communicate()[1][-3000:]
        kill_all(job)


def test_killed_and_resumed_is_never_killed(tmp_path):
    checkpoint = REPOSITORY / "runs" / "toy-countdown"
    whole, save = tmp_path / "whole", tmp_path / "killed"
    done = run_job(options(checkpoint, whole))
    assert done.returncode == 0, done.stderr[-3000:]
    for number, (stage, step, in_background) in enumerate(KILLS):
        more = ["--load", str(save)] * (number > 0) + ["--async-save"] * in_background
        marks = tmp_path / f"marks{number}"
        run_and_kill([*options(checkpoint, save), *more], marks, stage, step)
        found = sorted(path.name for path in (save / "checkpoints").iterdir())
        assert (f"step_{step:06d}.partial" in found) == (stage == "save"), found
        assert f"step_{step:06d}" not in found, found
    last = [*options(checkpoint, save, load=save), "--async-save"]
    done = run_job(last)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in (save / "checkpoints").iterdir()) == [
        "latest",
        *(f"step_{step:06d}" for step in (3, 6, 9, 10)),
    ]
    expected, got = rows_without_times(whole), rows_without_times(save)
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for ours, theirs in zip(got, expected, strict=True):
        different = {
            name: (ours.get(name), theirs[name]) for name in theirs if ours.get(name) != theirs[name]
        }
        assert not different and ours.keys() == theirs.keys(), f"step {theirs['step']}: {different}"
    assert len({row["loss/policy"] for row in expected}) == STEPS, "the steps differ"
