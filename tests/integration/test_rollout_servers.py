"""Two real vLLM servers behind one queue; one is killed in the middle of a generation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from siren_megatron.config import Config
from siren_megatron.rollout.hosts import Hosts
from siren_megatron.rollout.node_servers import server_options
from siren_megatron.rollout.service import RolloutService
from tests.integration.jobs import REPOSITORY

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def toy_checkpoint():
    """As the quick start builds it, which takes it when it is there."""
    output = REPOSITORY / "runs" / "toy-countdown"
    build = [str(REPOSITORY / "tools" / "make_toy_checkpoint.py"), "countdown", "--output", str(output)]
    subprocess.run([sys.executable, *build, "--quiet"], check=True, timeout=600)
    return output


def prompts_of(checkpoint, count):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with open(checkpoint / "prompts" / "train.jsonl") as lines:
        texts = [json.loads(line)["problem"] for line, _ in zip(lines, range(count), strict=False)]
    return [tokenizer(text)["input_ids"] for text in texts], tokenizer.eos_token_id


def test_a_server_killed_in_mid_generation_leaves_no_trace(toy_checkpoint, tmp_path):
    prompts, eos = prompts_of(toy_checkpoint, 48)
    config = Config.of(
        hf_checkpoint=toy_checkpoint,
        prompt_data=toy_checkpoint,
        save=tmp_path,
        seq_length=64,
        rollout_num_servers=2,
        rollout_max_in_flight=4,
    )
    hosts = Hosts()
    options = server_options(config, hosts, on_cpu=True)
    assert [one.log_file.name for one in options] == ["vllm-0-0.log", "vllm-0-1.log"]
    control = SimpleNamespace(tell=lambda command, argument=0: None)  # there are no other ranks
    said, finished = [], []

    def weights():
        with safe_open(toy_checkpoint / "model.safetensors", framework="pt") as tensors:
            yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())

    def sample(service, on_group=None):
        return service.run(
            lambda: service.generate(
                prompts,
                num_samples=4,
                max_tokens=16,
                temperature=1.0,
                seed=3,
                stop_token_ids=[eos],
                on_group=on_group,
            )
        )

    with RolloutService(config, options, control, hosts=hosts, is_main=True, report=said.append) as service:
        service.connect(weights, lambda: 0)
        undisturbed = sample(service)
        counts = service.pop_counts()
        assert counts["rollout_requests/0"] + counts["rollout_requests/1"] == 48
        assert min(counts["rollout_requests/0"], counts["rollout_requests/1"]) > 8, "both have a share"
        servers = list(service._servers)
        assert len({server.port for server in servers}) == 2

        def kill_one(index, samples):
            if not finished:
                os.killpg(servers[1].pid, signal.SIGKILL)
            finished.append(index)

        disturbed = sample(service, kill_one)
        assert sorted(finished) == list(range(48)), "each prompt is done once"
        for ours, theirs in zip(disturbed, undisturbed, strict=True):
            assert [s.response_ids for s in ours] == [s.response_ids for s in theirs]
            for one, other in zip(ours, theirs, strict=True):
                assert one.rollout_logprobs == pytest.approx(other.rollout_logprobs, abs=1e-4)
        assert service.pop_counts()["rollout_restarts"] == 1
        assert len(said) == 1 and "killed by SIGKILL" in said[0] and "vllm-0-1.log" in said[0]
        assert service._servers[1] is not servers[1] and service._servers[1].alive()
        # The new one serves, with the weights it was given; an update reaches both.
        service.update_weights()
        again = sample(service)
        assert [[s.response_ids for s in g] for g in again] == [
            [s.response_ids for s in g] for g in undisturbed
        ]
        assert service.pop_counts()["rollout_requests/1"] > 8
