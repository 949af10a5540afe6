"""Whole runs on GPUs: the toy task with vLLM on a GPU of its own, and half an hour of 7B at TP=4."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from siren_megatron.metrics import read_metrics
from tests.integration.jobs import REPOSITORY, run_job, toy_options

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def toy_checkpoint():
    checkpoint = REPOSITORY / "runs" / "toy-countdown"
    tool = REPOSITORY / "tools" / "make_toy_checkpoint.py"
    subprocess.run([sys.executable, tool, "countdown", "--output", checkpoint], check=True, timeout=900)
    return checkpoint


def check_rows(save: Path, steps: int, tolerance: float) -> list[dict]:
    rows = read_metrics(save / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert row["weight_sync_logprob_diff"] < tolerance
    return rows


@pytest.mark.gpus(2)
@pytest.mark.timeout(1500)
def test_the_toy_task_with_a_gpu_for_vllm(toy_checkpoint, tmp_path):
    """One trainer rank on GPU 0, vLLM on GPU 1."""
    save = tmp_path / "run"
    options = toy_options(
        toy_checkpoint, save, num_steps=40, tensor_model_parallel_size=1, rollout_devices=1,
        rollout_batch_size=32, rollout_num_samples=8, global_batch_size=64,
    )  # fmt: skip
    done = run_job(options, ranks=1, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = check_rows(save, 40, 1e-2)
    first, last = (sum(row["reward"] for row in part) / 10 for part in (rows[:10], rows[-10:]))
    assert last > first + 0.05


@pytest.mark.gpus(8)
@pytest.mark.timeout(5400)
def test_half_an_hour_of_7b(tmp_path):
    """The launcher's own options: TP=4 on four GPUs, vLLM on four; NIGHTLY_STEPS steps."""
    checkpoint, data = os.environ.get("NIGHTLY_CHECKPOINT"), os.environ.get("NIGHTLY_DATA")
    if not checkpoint or not data:
        pytest.skip("set NIGHTLY_CHECKPOINT (Qwen2.5-Math-7B) and NIGHTLY_DATA (prompts) for this test")
    steps, save = int(os.environ.get("NIGHTLY_STEPS", "14")), tmp_path / "run"
    options = f"""--hf-checkpoint {checkpoint} --prompt-data {data} --reward math --save {save}
    --num-steps {steps} --rollout-batch-size 128 --rollout-num-samples 8 --seq-length 4096
    --rollout-max-response-length 3072 --global-batch-size 64 --max-tokens-per-microbatch 16384 --bf16
    --tensor-model-parallel-size 4 --sequence-parallel --rollout-devices 4,5,6,7
    --rollout-gpu-memory-utilization 0.85 --rollout-start-timeout 900 --rollout-request-timeout 3600"""
    done = run_job(options.split(), ranks=4, timeout=5000)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = check_rows(save, steps, 5.0)
    assert rows[-1]["reward"] > rows[0]["reward"] - 0.05
