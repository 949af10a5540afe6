"""A run that is killed again and again and resumed is the run that was never killed, to the last bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from siren_megatron.metrics import read_metrics
from tests.integration.jobs import REPOSITORY, kill_all, run_job, started_job, toy_options, wait_until
from tests.small_disk import small_disk

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, INTERVAL = 10, 3
# Wall-clock values; everything else of a row has to be equal.
TIMES = ("wall_time", "tokens_per_second", "time/")
# In order: the stage and step of the kill, and the save whose writers stop half-way, with the options.
KILLS = [
    ("rollout", 5, 0, []),
    ("save", 6, 6, []),
    ("train", 10, 9, ["--async-save"]),  # while the writers of step 9 are at work
]


def options(checkpoint: Path, save: Path, **more: object) -> list[str]:
    small = {"rollout_batch_size": 4, "global_batch_size": 8, "micro_batch_size": 2}
    small |= {"num_steps": STEPS, "save_interval": INTERVAL, **more}
    return toy_options(checkpoint, save, **small)


def rows_without_times(save: Path) -> list[dict[str, float]]:
    rows = read_metrics(save / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def run_and_kill(arguments: list[str], marks: Path, stage: str, step: int, save_to_stop: int) -> None:
    """Start the run and kill all of it once it is at a stage of a step."""
    marks.mkdir()
    environment = {"SIREN_TEST_MARKS": str(marks), "SIREN_TEST_STOP_IN_SAVE": str(save_to_stop)}
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
    for number, (stage, step, save_to_stop, more) in enumerate(KILLS):
        load = ["--load", str(save)] if number else []
        arguments = [*options(checkpoint, save), *load, *more]
        run_and_kill(arguments, tmp_path / f"marks{number}", stage, step, save_to_stop)
        found = sorted(path.name for path in (save / "checkpoints").glob("*.partial"))
        assert found == ([f"step_{save_to_stop:06d}.partial"] if save_to_stop else [])
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


def test_rollouts_that_were_sampled_ahead_survive(tmp_path):
    """With --rollout-async-steps a checkpoint holds the next rollout, by weights that are gone."""
    checkpoint = REPOSITORY / "runs" / "toy-countdown"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ahead = {"rollout_async_steps": 1, "rollout_correction": "token-truncate"}
    ahead |= {"num_steps": 4, "save_interval": 2}
    done = run_job(options(checkpoint, whole, **ahead))
    assert done.returncode == 0, done.stderr[-3000:]
    # What a run that is killed in its third step leaves.
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step_000004")
    (cut / "checkpoints" / "latest").write_text("step_000002\n")
    done = run_job(options(checkpoint, cut, load=cut, **ahead))
    assert done.returncode == 0, done.stderr[-3000:]
    expected, got = rows_without_times(whole), rows_without_times(cut)
    assert got == expected
    assert [row["rollout_weight_lag/max"] for row in got] == [0, 1, 1, 1]
    assert got[0]["rollout_logprob_diff"] < 1e-4 < got[2]["rollout_logprob_diff"], "older weights sampled"
    assert max(row["weight_sync_logprob_diff"] for row in got) < 1e-4


def test_a_full_disk_ends_the_run_with_one_line(tmp_path):
    """The third checkpoint, written in the background, finds no room; nor do the metrics of that moment."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 14 * 2**20) as mounted:
        if not mounted:
            pytest.skip("this user may not mount a file system")
        save = disk / "run"
        every_step = options(REPOSITORY / "runs" / "toy-countdown", save, save_interval=1)
        done = run_job([*every_step, "--async-save"])
        lines = [line for line in done.stderr.splitlines() if "pretrain_siren.py: error:" in line]
        assert done.returncode == 1
        assert len(lines) == 1 and "[rank" not in done.stderr, done.stderr[-3000:]
        assert "checkpoint step_000003 could not be written" in lines[0]
        assert "No space left on device; the last good one is step_000002" in lines[0]
        found = sorted(path.name for path in (save / "checkpoints").iterdir())
        assert found == ["latest", "step_000001", "step_000002"]
