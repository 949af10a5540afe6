"""examples/run_siren_7b_tp4.sh on a real SLURM of two nodes, with a toy checkpoint on CPUs."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from siren_megatron.metrics import read_metrics
from tests.integration.jobs import REPOSITORY, processes_mentioning, wait_until
from tests.integration.slurm_cluster import Cluster, missing_reason, running

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = REPOSITORY / "examples" / "run_siren_7b_tp4.sh"
TOY = """--reward countdown --rollout-batch-size 8 --rollout-num-samples 4 --rollout-max-response-length 16
--seq-length 64 --global-batch-size 16 --max-tokens-per-microbatch 128 --lr 1e-4 --entropy-coeff 0.1
--distributed-timeout-minutes 3""".split()


@pytest.fixture(scope="module")
def cluster():
    reason = missing_reason()
    if reason is not None:
        pytest.skip(reason)
    # Not tmp_path: munge's socket has to fit into the length of a socket's name.
    with tempfile.TemporaryDirectory(prefix="siren-slurm-") as directory:
        with running(Path(directory)) as cluster:
            yield cluster
        assert not cluster.processes, "the daemons ended"
        assert not processes_mentioning(directory)


@pytest.fixture(scope="module")
def toy_checkpoint():
    checkpoint = REPOSITORY / "runs" / "toy-countdown"
    tool = REPOSITORY / "tools" / "make_toy_checkpoint.py"
    subprocess.run([sys.executable, tool, "countdown", "--output", checkpoint], check=True, timeout=500)
    return checkpoint


def variables(checkpoint: Path, run: Path, **more: object) -> dict[str, str]:
    values = {
        "HF_CHECKPOINT": checkpoint,
        "PROMPT_DATA": checkpoint / "prompts" / "train.jsonl",
        "RUN_DIR": run,
        "PYTHON": sys.executable,
        "GPUS_PER_NODE": 0,
        "NODES": 2,
        "SAVE_INTERVAL": 1,
        "OMP_NUM_THREADS": 1,
        **more,
    }
    return {name: str(value) for name, value in values.items()}


def output(cluster: Cluster, job: int, path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else "(no output)"
    return f"{cluster.job(job)}\n{text[-6000:]}{cluster.logs()}"


def wait_for_end(cluster: Cluster, job: int, log: Path, timeout: float = 300) -> None:
    """Until the job is completed; fails at once where it failed."""

    def ended() -> bool:
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED", "REQUEUED"), output(
            cluster, job, log
        )
        return state == "COMPLETED"

    try:
        wait_until(ended, timeout, f"job {job}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{output(cluster, job, log)}") from None


def test_bash_submits_itself_and_trains_with_a_layer_cut_over_two_nodes(cluster, toy_checkpoint, tmp_path):
    run = tmp_path / "run"
    submitted = cluster.run(
        "bash",
        str(SCRIPT),
        *TOY,
        **variables(toy_checkpoint, run, TP=2, NUM_STEPS=2),
    ).stdout
    assert "node 1: CPU: trainer rank 1" in submitted and "verdict    it fits" in submitted
    job = int(re.search(r"submitted: job (\d+)", submitted)[1])
    log = run / "logs" / f"job-{job}.out"
    wait_for_end(cluster, job, log)
    assert cluster.job(job)["NodeList"] == "n[1-2]"
    rows = read_metrics(run / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["rollout_logprob_diff"] < 1e-4 and row["weight_sync_logprob_diff"] < 1e-4
        assert row["grad_norm"] > 0
    assert (run / "train" / "hf" / "model.safetensors").stat().st_size > 1_000_000
    assert (run / "train" / "vllm.log").is_file()
    # Each node keeps the words of its rank; those of rank 0 are the job's output as well.
    logs = run / "logs" / f"{job}.0"
    assert [len(list((logs / node).rglob("stdout.log"))) for node in ("node0", "node1")] == [1, 1]
    assert "finished: step 2 of 2" in log.read_text() and "done: step 2 of 2" in log.read_text()
    assert not processes_mentioning(str(run)), "nothing of the job is left"


def test_a_killed_step_is_requeued_and_the_run_resumes(cluster, toy_checkpoint, tmp_path):
    """Called as `sbatch SCRIPT` this time, two data-parallel ranks; one node's processes are killed."""
    run, log = tmp_path / "run", tmp_path / "job.out"
    command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--output", str(log), str(SCRIPT)]
    done = cluster.run(*command, *TOY, **variables(toy_checkpoint, run, TP=1, NUM_STEPS=4))
    job = int(done.stdout)
    pointer = run / "train" / "checkpoints" / "latest"
    wait_until(pointer.exists, 180, f"a checkpoint of {output(cluster, job, log)}")
    killed = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_JOB_ID") == str(job) and environment.get("SLURMD_NODENAME") == "n2":
                process.send_signal(signal.SIGKILL)
                killed += 1
    assert killed >= 2, "torchrun and its rank ran on the second node"
    wait_for_end(cluster, job, log)
    text = log.read_text()
    assert int(cluster.job(job)["Restarts"]) == 1
    attempts = (run / "logs" / "attempts.txt").read_text().splitlines()
    assert [line.split()[1] for line in attempts] == [f"{job}.0", f"{job}.1"]
    reached = int(attempts[0].split()[5])
    assert 1 <= reached < 4 and attempts[1].split()[3:8:2] == [str(reached), "4", "4"], attempts
    assert f"requeued: the next attempt goes on from step {reached}" in text
    rows = read_metrics(run / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert len({row["siren/entropy_anchor"] for row in rows}) == 1, "the anchor is kept, not measured again"
    assert rows[-1]["rollout_logprob_diff"] < 1e-4, "vLLM got the resumed weights"
    assert (run / "train" / "hf" / "model.safetensors").is_file()
    assert not processes_mentioning(str(run)), "nothing of either attempt is left"


def test_a_wrong_option_ends_the_job_before_it_takes_the_machines(cluster, toy_checkpoint, tmp_path):
    done = cluster.run(
        "bash",
        str(SCRIPT),
        *TOY,
        "--lr",
        "-1",
        check=False,
        **variables(toy_checkpoint, tmp_path / "run", TP=2),
    )
    assert done.returncode == 2 and "--lr must be greater than 0" in done.stderr
    assert not cluster.run("squeue", "-h").stdout
    assert not (tmp_path / "run").exists()
