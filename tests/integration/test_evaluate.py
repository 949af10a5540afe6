"""tools/evaluate.py with a real vLLM: interrupted and resumed, from a server, from a Megatron checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from siren_megatron.rollout.client import RolloutServer, ServerOptions
from tests.integration.jobs import REPOSITORY, wait_until
from tools import evaluate
from tools.convert_hf import main as convert
from tools.make_toy_checkpoint import build_countdown_checkpoint

pytestmark = pytest.mark.vllm

NUM_PROBLEMS = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Countdown model that is hardly trained."""
    path = tmp_path_factory.mktemp("model") / "toy"
    build_countdown_checkpoint(path, steps=60, num_eval_prompts=NUM_PROBLEMS, num_eval_samples=1, quiet=True)
    return path


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    options = ServerOptions(checkpoint, tmp_path_factory.mktemp("server") / "vllm.log", max_model_len=64)
    with RolloutServer.start(options) as server:
        server.wait_ready()
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("VLLM_API_KEY", server.api_key)
            yield server


def arguments(checkpoint, output, *source, **more):
    options = {
        "data": checkpoint / "prompts" / "eval.jsonl",
        "reward": "countdown",
        "num-samples": 6,
        "temperature": 1.0,
        "top-p": 0.95,
        "max-tokens": 16,
        "grading-workers": 1,
        "output": output,
        **more,
    }
    return [
        *map(str, source),
        *(text for name, value in options.items() for text in (f"--{name}", str(value))),
    ]


def samples(output):
    """Responses by problem, in the benchmark's order."""
    lines = (output / "samples" / "eval.jsonl").read_text().splitlines()
    return [record["responses"] for record in sorted(map(json.loads, lines), key=lambda r: r["index"])]


@pytest.fixture(scope="module")
def whole(checkpoint, server, tmp_path_factory):
    """An evaluation without interruption."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate.main(arguments(checkpoint, output, "--server", server.url)) == 0
    return output


def test_the_results_are_those_of_the_samples(whole):
    graded = [json.loads(line) for line in (whole / "eval_graded.jsonl").read_text().splitlines()]
    metrics = json.loads((whole / "results.json").read_text())["benchmarks"]["eval"]["metrics"]
    assert len(graded) == NUM_PROBLEMS
    right = [sum(row["correct"]) for row in graded]
    assert metrics["avg@6"]["value"] == pytest.approx(sum(right) / 6 / NUM_PROBLEMS)
    assert metrics["pass@6"]["value"] == pytest.approx(sum(r > 0 for r in right) / NUM_PROBLEMS)
    assert 8 < metrics["length (tokens)"]["value"] <= 16
    assert len({response for row in samples(whole) for response in row}) > NUM_PROBLEMS


def test_a_killed_evaluation_resumes_and_asks_for_nothing_twice(checkpoint, server, whole, tmp_path, capsys):
    output = tmp_path / "out"
    # One problem at a time: it is slow enough to be caught in the middle.
    slow = {"max-in-flight": 1}
    command = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py")]
    command += arguments(checkpoint, output, "--server", server.url, **slow)
    path = output / "samples" / "eval.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 3, 120, "three problems")
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    before = path.read_text().splitlines()
    assert 3 <= len(before) < NUM_PROBLEMS and not (output / "results.json").exists()
    other = arguments(checkpoint, output, "--server", server.url, **{"num-samples": 4})
    assert evaluate.main(other) == 2
    assert "holds an evaluation with num_samples 6, not 4" in capsys.readouterr().err
    assert evaluate.main(arguments(checkpoint, output, "--server", server.url, **slow)) == 0
    after = path.read_text().splitlines()
    assert after[: len(before) - 1] == before[:-1] and len(after) == NUM_PROBLEMS
    assert samples(output) == samples(whole), "resumed, the same samples as in one go"


def test_a_megatron_checkpoint_gives_the_samples_of_its_source(checkpoint, whole, tmp_path):
    megatron, output = tmp_path / "megatron", tmp_path / "out"
    assert convert(["import", "--hf", str(checkpoint), "--megatron", str(megatron)]) == 0
    assert evaluate.main(arguments(checkpoint, output, "--checkpoint", megatron)) == 0
    assert samples(output) == samples(whole)


def test_a_server_that_is_not_there_is_named(checkpoint, tmp_path, capsys):
    assert evaluate.main(arguments(checkpoint, tmp_path / "out", "--server", "http://127.0.0.1:9")) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: error: --server http://127.0.0.1:9: no vLLM answers there")
    assert not (tmp_path / "out").exists()
