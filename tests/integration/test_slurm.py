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
        "ROLLOUT_NODES": "first",
        "SAVE_INTERVAL": 1,
        "OMP_NUM_THREADS": 1,
        **more,
    }
    return {name: str(value) for name, value in values.items()}


def output(cluster: Cluster, job: int, path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else "(no output)"
    return f"{cluster.job(job)}\n{text[-6000:]}{cluster.logs()}"


def wait_for(cluster: Cluster, job: int, log: Path, condition, what: str, timeout: float = 180) -> None:
    """Poll until `condition` holds; a failure shows the job, its output and SLURM's logs."""
    try:
        wait_until(condition, timeout, what)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{output(cluster, job, log)}") from None


def wait_for_end(cluster: Cluster, job: int, log: Path) -> None:
    """Until the job is completed; fails at once where it failed."""

    def ended() -> bool:
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "COMPLETED", "REQUEUED"), state
        return state == "COMPLETED"

    wait_for(cluster, job, log, ended, f"the end of job {job}", timeout=300)


def submit_two_replicas(cluster: Cluster, checkpoint: Path, run: Path, log: Path, **more: object) -> int:
    """`sbatch SCRIPT` with a data-parallel rank on each node; the job's number."""
    command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--output", str(log), str(SCRIPT)]
    return int(cluster.run(*command, *TOY, **variables(checkpoint, run, TP=1, **more)).stdout)


def start_again(cluster: Cluster, job: int, log: Path, restarts: int) -> None:
    """Wait until SLURM has requeued the job, and spare it the two minutes that SLURM then lets pass.

    Both nodes have to be through with the last attempt: a node that still ends it would refuse the next, and
    SLURM would hold the job. A node also refuses what SLURM signed in the very second in which it ended the
    last one ("already killed, do not launch batch job"), and the job would fail: hence the seconds after now.
    """

    def requeued() -> bool:
        state = cluster.job(job)
        return state["Restarts"] == str(restarts) and state["JobState"] == "PENDING" and cluster.is_idle()

    wait_for(cluster, job, log, requeued, "requeueing", timeout=90)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def attempts(run: Path) -> list[list[str]]:
    """The words of each line of attempts.txt."""
    return [line.split() for line in (run / "logs" / "attempts.txt").read_text().splitlines()]


def check_whole_run(cluster: Cluster, run: Path, steps: int) -> None:
    rows = read_metrics(run / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert len({row["siren/entropy_anchor"] for row in rows}) == 1, "the anchor is kept, not measured again"
    for row in rows:
        assert row["rollout_logprob_diff"] < 1e-4, "vLLM has the trainer's weights, resumed ones too"
        assert row["grad_norm"] > 0
    assert (run / "train" / "hf" / "model.safetensors").stat().st_size > 1_000_000
    assert not processes_mentioning(str(run)), "nothing of any attempt is left"


def test_a_layer_cut_over_two_nodes_survives_a_killed_step_and_a_lost_node(cluster, toy_checkpoint, tmp_path):
    """`bash SCRIPT` submits itself. A node's processes are killed, then SLURM is told that a node is down.

    Each node has a vLLM server, started by its own rank.
    """
    run, steps = tmp_path / "run", 8
    submitted = cluster.run(
        "bash",
        str(SCRIPT),
        *TOY,
        **variables(toy_checkpoint, run, TP=2, NUM_STEPS=steps, ROLLOUT_NODES="all"),
    ).stdout
    assert "node 1: CPU: a vLLM server, shared with rank 1" in submitted
    assert "node 1: CPU: trainer rank 1" in submitted and "verdict    it fits" in submitted
    job = int(re.search(r"submitted: job (\d+)", submitted)[1])
    log = run / "logs" / f"job-{job}.out"
    pointer = run / "train" / "checkpoints" / "latest"
    wait_for(cluster, job, log, pointer.exists, "a checkpoint")
    killed = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_JOB_ID") == str(job) and environment.get("SLURMD_NODENAME") == "n2":
                process.send_signal(signal.SIGKILL)
                killed += 1
    assert killed >= 2, "torchrun and its rank ran on the second node"
    start_again(cluster, job, log, restarts=1)
    saved = pointer.read_text()
    wait_for(cluster, job, log, lambda: pointer.read_text() != saved, "a step of the next attempt")
    # To SLURM this is a node that failed: the job is requeued without a word of the script.
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    wait_for(cluster, job, log, lambda: cluster.job(job)["Restarts"] == "2", "requeueing by SLURM")
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)  # unless it is back
    start_again(cluster, job, log, restarts=2)
    wait_for_end(cluster, job, log)
    assert cluster.job(job)["NodeList"] == "n[1-2]"
    first, *_, last = attempts(run)
    reached = int(first[5])
    assert first[1] == f"{job}.0" and 1 <= reached < steps
    assert last[1] == f"{job}.2" and reached < int(last[3]) < steps and last[5] == str(steps)
    text = log.read_text()
    assert f"requeued: the next attempt goes on from step {reached}" in text
    assert f"finished: step {steps} of {steps}" in text and f"done: step {steps} of {steps}" in text
    # Each node keeps the words of its rank; those of rank 0 are the job's output as well.
    for attempt in (f"{job}.0", f"{job}.2"):
        nodes = [run / "logs" / attempt / node for node in ("node0", "node1")]
        assert [len(list(node.rglob("stdout.log"))) for node in nodes] == [1, 1]
    assert all((run / "train" / f"vllm-{node}-0.log").is_file() for node in (0, 1))
    for row in read_metrics(run / "train" / "metrics.jsonl"):
        assert row["rollout_requests/0"] + row["rollout_requests/1"] >= 8 + 1, "the last is the check's"
        assert row["rollout_requests/1"] > 0, "rank 0 asks the other node's server"
    check_whole_run(cluster, run, steps)


def test_a_warned_run_saves_and_goes_on_after_requeueing(cluster, toy_checkpoint, tmp_path):
    """SIGUSR1 to the script, as SLURM sends it before the time limit; nothing else saves this run."""
    run, log, steps = tmp_path / "run", tmp_path / "job.out", 12
    job = submit_two_replicas(cluster, toy_checkpoint, run, log, NUM_STEPS=steps, SAVE_INTERVAL=1000)
    metrics = run / "train" / "metrics.jsonl"
    wait_for(cluster, job, log, lambda: metrics.exists() and read_metrics(metrics), "the first step")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    start_again(cluster, job, log, restarts=1)
    wait_for_end(cluster, job, log)
    first, last = attempts(run)
    assert first[-1] == "warned" and first[9] == "0" and 1 <= int(first[5]) < steps, first
    assert last[3:8:2] == [first[5], str(steps), str(steps)], last
    check_whole_run(cluster, run, steps)


def test_a_cancelled_job_is_not_requeued(cluster, toy_checkpoint, tmp_path):
    run, log = tmp_path / "run", tmp_path / "job.out"
    job = submit_two_replicas(cluster, toy_checkpoint, run, log, NUM_STEPS=1000)
    wait_for(cluster, job, log, (run / "train" / "vllm.log").exists, "the server's start")
    cluster.run("scancel", str(job))
    wait_for(cluster, job, log, lambda: not cluster.run("squeue", "-h").stdout, "the end of the job")
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"
    wait_until(lambda: not processes_mentioning(str(run)), 30, "every process of the run ended")


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
