"""examples/run_siren_7b_tp4.sh where there is no SLURM; tests/integration/test_slurm.py runs it on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from siren_megatron.planning.known_models import KNOWN_MODELS

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "run_siren_7b_tp4.sh"
SLURM_NAMES = ("SLURM_", "SBATCH_")


@pytest.fixture
def no_slurm(tmp_path):
    """A PATH without SLURM, whatever is installed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "seq", "cat", "mkdir", "date", "head", "sed", "env"):
        found = next(Path(d) / name for d in ("/usr/bin", "/bin") if (Path(d) / name).exists())
        (tools / name).symlink_to(found)
    return tools


@pytest.fixture
def inputs(tmp_path):
    """HF_CHECKPOINT and PROMPT_DATA of a 7B model, without its weights."""
    model = tmp_path / "a model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(KNOWN_MODELS["qwen2.5-math-7b"]))
    (model / "model.safetensors").touch()
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"problem": "1 + 1", "answer": "2"}) + "\n")
    return {"HF_CHECKPOINT": str(model), "PROMPT_DATA": str(data), "RUN_DIR": str(tmp_path / "run")}


def script(*arguments: str, path: Path | str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(SLURM_NAMES)}
    environment = {**clean, "PYTHON": sys.executable, **variables}
    if path:
        environment["PATH"] = str(path)
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_dry_run_needs_neither_slurm_nor_a_checkpoint(no_slurm):
    done = script("--dry-run", path=no_slurm)
    assert done.returncode == 0, done.stderr
    for part in ("7,615,616,512 parameters", "TP=4 PP=1", "node 0: GPUs 4-7: the vLLM server", "it fits"):
        assert part in done.stdout


def test_a_dry_run_follows_variables_and_options(inputs):
    done = script(
        "--dry-run",
        "--global-batch-size",
        "128",
        NODES="4",
        GPUS_PER_NODE="4",
        ROLLOUT_GPUS="0",
        TP="2",
        **inputs,
    )
    assert "16 trainer rank(s), TP=2 PP=1 CP=1 EP=1 DP=8" in done.stdout, done.stderr
    assert "8 optimizer step(s) of 128" in done.stdout
    assert "node 3: GPU 0: a vLLM server, shared with rank 12 (asleep while it trains)" in done.stdout
    awake = script("--dry-run", ROLLOUT_GPUS="0", ROLLOUT_SLEEP="0", **inputs)
    assert "shared with rank 0 (both stay in memory)" in awake.stdout, awake.stderr


def test_servers_on_every_node_or_on_the_first():
    everywhere = script("--dry-run", NODES="2", ROLLOUT_TP="2")
    assert "8 trainer rank(s)" in everywhere.stdout, everywhere.stderr
    assert "node 1: GPUs 4-7: 2 vLLM servers, tensor-parallel 2 each" in everywhere.stdout
    first = script("--dry-run", NODES="2", ROLLOUT_NODES="first")
    assert "12 trainer rank(s)" in first.stdout and "node 1: GPUs 0-7: trainer ranks 4-11" in first.stdout


def test_a_dry_run_refuses_what_does_not_fit():
    done = script("--dry-run", GPU="a100-40gb")
    assert done.returncode == 2 and "refused    trainer" in done.stdout and "raise --tensor" in done.stdout


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        ((), {"HF_CHECKPOINT": ""}, "set HF_CHECKPOINT to the directory"),
        ((), {"PROMPT_DATA": ""}, "set PROMPT_DATA"),
        ((), {"NODES": "two"}, "NODES is 'two'"),
        ((), {"ROLLOUT_GPUS": "8"}, "ROLLOUT_GPUS 8 leaves no GPU"),
        ((), {"SAVE_INTERVAL": "0"}, "SAVE_INTERVAL is 0"),
        ((), {"ROLLOUT_NODES": "two"}, "ROLLOUT_NODES is 'two'; it has to be all or first"),
        (("--rollout-nodes", "all"), {}, "--rollout-nodes: set ROLLOUT_NODES instead"),
        (("--save", "elsewhere"), {}, "--save: set RUN_DIR instead"),
        (("--nonsense",), {}, "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(inputs, arguments, variables, message):
    done = script(*arguments, **{**inputs, **variables})
    assert done.returncode == 2 and message in done.stderr
    assert not Path(inputs["RUN_DIR"]).exists()


def test_without_slurm_it_says_so_in_one_line(inputs, no_slurm):
    done = script(path=no_slurm, **inputs)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no sbatch here" in done.stderr and "--dry-run" in done.stderr


def test_it_submits_itself_with_the_machines_and_passes_options_on(inputs, tmp_path):
    """A stand-in for sbatch writes down how it was called; the real one is in the integration test."""
    tools = tmp_path / "slurm"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/called\necho "42;cluster"\n')
    (tools / "sbatch").chmod(0o755)
    done = script(
        "--num-steps",
        "7",
        path=f"{tools}:{os.environ['PATH']}",
        NODES="2",
        SBATCH_OPTIONS="--partition=gpu --account=abc",
        **inputs,
    )
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert called[-3:] == ["examples/run_siren_7b_tp4.sh", "--num-steps", "7"]
    for pair in (("--nodes", "2"), ("--gpus-per-node", "8"), ("--signal", "B:USR1@600")):
        assert called[called.index(pair[0]) + 1] == pair[1]
    assert {"--partition=gpu", "--account=abc", "--exclusive"} <= set(called)
    assert "submitted: job 42; its output: " in done.stdout


def test_help_names_every_variable():
    done = script("--help")
    assert done.returncode == 0
    text = SCRIPT.read_text()
    for name in ("HF_CHECKPOINT", "PROMPT_DATA", "RUN_DIR", "NODES", "GPUS_PER_NODE", "ROLLOUT_GPUS", "TP"):
        assert name in done.stdout and name in text.split("USAGE")[2]
