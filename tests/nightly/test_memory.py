"""The memory model against `torch.cuda.max_memory_allocated` of real updates in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from siren_megatron.architecture import Architecture
from siren_megatron.batch import Sample, make_batch
from siren_megatron.config import read_hf_config
from siren_megatron.planning.known_models import KNOWN_MODELS
from siren_megatron.planning.memory_model import activation_bytes, logit_bytes, state_bytes
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import GROUP_SIZE, Layout, config_of

TP, SP, TOKENS = "tensor_model_parallel_size", "sequence_parallel", "max_tokens_per_microbatch"
PROMPT, RESPONSE, ROWS = 256, 3840, 8


def random_model(directory: Path, name: str, layers: int | None = None) -> Path:
    """A checkpoint of a known model's shape with random weights; fewer layers where wanted."""
    import transformers

    fields = dict(KNOWN_MODELS[name])
    class_name = fields.pop("architectures")[0].replace("ForCausalLM", "Config")
    if layers is not None:
        fields["num_hidden_layers"] = layers
    config = getattr(transformers, class_name)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"]
    return directory


def peak_bytes(rank: int, world_size: int, checkpoint: Path, layout: Layout) -> tuple[int, int]:
    """For `run_ranks`: largest allocation of two updates, and of the state between them."""
    from siren_megatron import platform

    device = platform.install()
    from siren_megatron.policy import initialize_model_parallel
    from siren_megatron.trainer import Trainer

    config = config_of(
        checkpoint, global_batch_size=ROWS, rollout_max_response_length=RESPONSE, **layout.options
    )
    initialize_model_parallel(config)
    trainer = Trainer(config, read_hf_config(checkpoint), device)
    samples = [Sample((1,) * PROMPT, (2,) * RESPONSE, (-1.0,) * RESPONSE, "length") for _ in range(ROWS)]
    rewards = torch.arange(ROWS) % GROUP_SIZE
    batch = make_batch(samples, rewards, rewards - 1.5, multiple=trainer.length_multiple)
    batch = trainer.compute_logprobs(batch.to(device.device))
    trainer.update(batch, 1.0)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    trainer.update(batch, 1.0)
    return torch.cuda.max_memory_allocated(), held


def compare(checkpoint: Path, gpus: int, layout: Layout) -> None:
    architecture = Architecture.of(read_hf_config(checkpoint))
    config = config_of(checkpoint, **layout.options)
    states = state_bytes(architecture, config.parallel, stage=0, world_size=gpus, bf16=True)
    tokens = config.train.max_tokens_per_microbatch
    passing = activation_bytes(
        architecture, config.parallel, stage=0, tokens=tokens, micro_batches=2, bf16=True, packed=True
    )
    passing += logit_bytes(architecture, config.parallel, tokens=tokens, bf16=True, states=sum(states))
    for peak, held in run_ranks(peak_bytes, gpus, checkpoint, layout, timeout=1800, backend="nccl"):
        print(f"held {held / 2**30:.2f} GiB, model {sum(states) / 2**30:.2f}")
        print(f"peak {peak / 2**30:.2f} GiB, model {(sum(states) + passing) / 2**30:.2f}")
        assert held == pytest.approx(sum(states), rel=0.05)
        assert peak == pytest.approx(sum(states) + passing, rel=0.2)


@pytest.mark.gpus(1)
@pytest.mark.parametrize(
    "options", [{}, {"recompute_granularity": "full"}], ids=["no recomputation", "full recomputation"]
)
def test_a_small_model_on_one_gpu(tmp_path, options):
    """8 of the 28 layers of Qwen2.5-Math-1.5B."""
    checkpoint = random_model(tmp_path / "model", "qwen2.5-math-1.5b", layers=8)
    compare(checkpoint, 1, Layout("one GPU", {"bf16": True, TOKENS: 16384, **options}))


@pytest.mark.gpus(4)
@pytest.mark.timeout(3000)
def test_7b_at_tp4(tmp_path):
    """The launcher's default: Qwen2.5-Math-7B, TP=4, sequence parallelism, 16,384 tokens a micro-batch."""
    checkpoint = random_model(tmp_path / "model", "qwen2.5-math-7b")
    compare(checkpoint, 4, Layout("TP=4 SP", {"bf16": True, TP: 4, SP: True, TOKENS: 16384}))
