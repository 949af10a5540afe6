"""tools/convert_hf.py from end to end: its exports in transformers and in vLLM."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from siren_megatron.rollout.client import RolloutClient, RolloutServer, ServerOptions
from tests.checkpoints import make_random_checkpoint

TOOL = "tools/convert_hf.py"
PROMPTS = [[3 + i, 5, 7 + i % 3] * 10 for i in range(4)]


def convert(repository, *arguments) -> str:
    """The tool in a process of its own, as a user runs it; returns what it printed."""
    command = [sys.executable, repository / TOOL, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@torch.no_grad()
def logits_of(checkpoint) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(input_ids=torch.tensor(PROMPTS)).logits


@pytest.mark.parametrize("family", ["qwen2-tied", "llama3", "mistral", "qwen3", "qwen3-moe"])
def test_transformers_loads_an_export_and_verify_agrees(tmp_path, family, repository):
    checkpoint = make_random_checkpoint(tmp_path / "original", family, dtype=torch.bfloat16)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    convert(
        repository, "import", "--hf", checkpoint, "--megatron", megatron,
        "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 4,
    )  # fmt: skip
    convert(repository, "export", "--megatron", megatron, "--hf", back, "--max-shard-size", "200KB")
    assert torch.equal(logits_of(back), logits_of(checkpoint))
    verdict = convert(repository, "verify", "--hf", checkpoint, "--megatron", megatron)
    count = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"].__len__()
    assert f"parameters: {count} of {count} tensors identical" in verdict
    assert "logits: differ by at most" in verdict


@pytest.mark.vllm
def test_vllm_serves_an_export(tmp_path, repository):
    """Llama 3: scaled rotations, tied embeddings, a head size of its own. Log-probs are transformers'."""
    checkpoint = make_random_checkpoint(tmp_path / "original", "llama3", eos_token_id=1)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    convert(
        repository, "import", "--hf", checkpoint, "--megatron", megatron, "--tensor-model-parallel-size", 2
    )
    convert(repository, "export", "--megatron", megatron, "--hf", back)
    options = ServerOptions(model=back, log_file=tmp_path / "vllm.log", max_model_len=64)
    with RolloutServer.start(options) as server:
        server.wait_ready()
        client = RolloutClient(server.url, 60.0, 8, server=server)
        groups = client.generate(
            PROMPTS, num_samples=2, max_tokens=16, temperature=1.0, seed=0, stop_token_ids=[1]
        )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    worst, count = 0.0, 0
    for sample in (sample for group in groups for sample in group):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, len(sample.prompt_ids) :, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(sample.rollout_logprobs)).abs().max()))
        count += len(sample.response_ids)
    assert count > 40
    assert worst < 1e-4
