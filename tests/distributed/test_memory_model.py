"""The memory model against what real megatron-core trainers hold."""

from __future__ import annotations

import pytest

from siren_megatron.architecture import Architecture
from siren_megatron.config import read_hf_config
from siren_megatron.planning.memory_model import layer_activation_bytes, state_bytes
from tests.checkpoints import make_random_checkpoint
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import Layout, config_of
from tests.distributed.memory import held_bytes

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, SP = "expert_model_parallel_size", "sequence_parallel"
BF16 = {"bf16": True}
DENSE = [
    Layout("TP=2 SP bf16", {TP: 2, SP: True, **BF16}),
    Layout("TP=2", {TP: 2}),
    Layout("PP=2 bf16", {PP: 2, **BF16}),
    Layout("DP=2", {}),
    Layout("DP=2 plain optimizer, bf16", {"use_distributed_optimizer": False, **BF16}),
]
MODELS = {
    "qwen2": DENSE,
    "qwen2-tied": [Layout("PP=2", {PP: 2})],
    "qwen3-moe": [Layout("EP=2", {EP: 2}), Layout("TP=2 SP bf16", {TP: 2, SP: True, **BF16})],
}
TOKENS = 256


@pytest.mark.parametrize("family", MODELS)
def test_states_are_those_of_a_real_trainer(tmp_path, family):
    """Parameters and gradients to the byte; optimizer states too, the ranks' shares added up."""
    layouts = MODELS[family]
    checkpoint = make_random_checkpoint(tmp_path / "model", family)
    architecture = Architecture.of(read_hf_config(checkpoint))
    ranks = run_ranks(held_bytes, 2, checkpoint, layouts, TOKENS, timeout=200)
    print(f"\n{'layout':30}{'activations':>14}{'model of them':>16}")
    for index, layout in enumerate(layouts):
        config = config_of(checkpoint, **layout.options)
        bf16, parallel = config.model.bf16, config.parallel
        shares = 0.0
        for rank in ranks:
            held = rank[index]
            parameters, gradients, optimizer = state_bytes(
                architecture, parallel, stage=held["stage"], world_size=2, bf16=bf16
            )
            assert held["parameters"] == parameters, layout.name
            assert held["gradients"] == gradients, layout.name
            # Buffers are filled up so that every rank's share begins at a multiple of 128 elements.
            assert gradients <= held["gradient_buffers"] <= gradients * 1.05 + 4096, layout.name
            shares += held["optimizer"] - optimizer
        # The cut between two ranks lies where the buffer's halves meet: their sum is exact.
        assert shares == 0, f"{layout.name}: optimizer states differ by {shares:.0f} bytes over both ranks"
        if held["activations"] is not None:
            layers = architecture.layers * TOKENS
            estimate = layers * layer_activation_bytes(
                architecture, parallel, bf16=bf16, packed=False, fused_norm=False
            )
            print(f"{layout.name:30}{held['activations']:14,}{estimate:16,.0f}")
            # What the model leaves out are small tables (rotations, routing), large only beside a tiny model.
            assert estimate == pytest.approx(held["activations"], rel=0.1), layout.name
