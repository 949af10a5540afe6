"""Losses, gradient norms and weights do not depend on the layout, and equal a float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import make_random_checkpoint
from tests.distributed.layouts import RESPONSES, Layout, compare_layouts, reference

UPDATES = 5
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, PACKED = "num_virtual_stages_per_pipeline_rank", "max_tokens_per_microbatch"
AS_OLD = {"rollout_logprobs_as_old": True}
FUSED = {"fused_linear": "on", "entropy_chunk_mb": 1}
SP = {TP: 2, "sequence_parallel": True}
LAYOUTS = {
    1: [
        Layout("micro-batch 1", {"micro_batch_size": 1}),
        Layout("micro-batch 2", {"micro_batch_size": 2}),
        Layout("micro-batch 4", {"micro_batch_size": 4}),
        Layout("plain optimizer", {"use_distributed_optimizer": False}),
        Layout("packed", {PACKED: 64}),
        Layout("full recomputation", {"recompute_granularity": "full"}),
        Layout("fused linear", FUSED),
        Layout("H of the training's forward pass", {**AS_OLD, "micro_batch_size": RESPONSES}),
        Layout("selective recomputation", {"recompute_granularity": "selective"}),
    ],
    2: [
        Layout("TP=2", {TP: 2}),
        Layout("TP=2 SP", SP),
        Layout("TP=2 SP packed", {**SP, PACKED: 64}),
        Layout("PP=2", {PP: 2}),
        Layout("PP=2 micro-batch 1", {PP: 2, "micro_batch_size": 1}),
        Layout("PP=2 packed", {PP: 2, PACKED: 64}),
        Layout("PP=2 VPP=2", {PP: 2, VPP: 2}),
        Layout("PP=2 VPP=2 packed", {PP: 2, VPP: 2, PACKED: 64}),
        Layout("PP=2 packed, fused linear", {PP: 2, PACKED: 64, **FUSED}),
        Layout("TP=2, fused linear", {TP: 2, **FUSED}),
        Layout("CP=2", {CP: 2}),
        Layout("CP=2 packed", {CP: 2, PACKED: 64}),
        Layout("DP=2", {}),
        Layout("DP=2, H of the training's pass", {**AS_OLD, "micro_batch_size": RESPONSES // 2}),
        Layout("DP=2 packed", {PACKED: 48}),
        Layout("DP=2 plain optimizer", {"use_distributed_optimizer": False}),
    ],
    4: [
        Layout("TP=2 PP=2", {TP: 2, PP: 2}),
        Layout("TP=2 SP DP=2", {**SP, "micro_batch_size": 2}),
        Layout("TP=4", {TP: 4}),
        Layout("CP=4", {CP: 4}),
        Layout("TP=2 SP CP=2, fused linear", {**SP, CP: 2, **FUSED}),
        Layout("TP=2 SP CP=2 packed, recomputed", {**SP, CP: 2, PACKED: 96, "recompute_granularity": "full"}),
        Layout("PP=2 VPP=2 CP=2", {PP: 2, VPP: 2, CP: 2}),
        Layout("PP=2 VPP=2 TP=2 SP", {PP: 2, VPP: 2, **SP}),
        Layout("PP=2 DP=2 packed", {PP: 2, PACKED: 64}),
        Layout("CP=2 DP=2 packed", {CP: 2, PACKED: 64}),
    ],
}

EP = "expert_model_parallel_size"
SP1 = {**SP, "expert_tensor_parallel_size": 1}
EXPERT_LAYOUTS = {
    1: [Layout("one rank", {}), Layout("packed", {PACKED: 64})],
    2: [
        Layout("EP=2", {EP: 2}),
        Layout("EP=2 packed", {EP: 2, PACKED: 64}),
        Layout("EP=2 CP=2", {EP: 2, CP: 2}),
        Layout("EP=2 TP=2 SP, one replica", {EP: 2, **SP1}),
        Layout("TP=2 SP, experts cut too", SP),
        Layout("PP=2", {PP: 2}),
        Layout("DP=2", {}),
    ],
    4: [
        Layout("EP=2 TP=2 SP", {EP: 2, **SP1}),
        Layout("EP=2 TP=2 SP, experts cut too", {EP: 2, **SP}),
        Layout("EP=4 TP=2 SP", {EP: 4, **SP1}),
        Layout("EP=4 packed", {EP: 4, PACKED: 64}),
        Layout("EP=2 PP=2 VPP=2", {EP: 2, PP: 2, VPP: 2, "micro_batch_size": 2}),
    ],
}
TIED_LAYOUTS = {
    1: [Layout("one rank", {}), Layout("fused linear", FUSED)],
    2: [
        Layout("TP=2 SP, fused linear", {**SP, **FUSED}),
        Layout("TP=2 SP packed", {**SP, PACKED: 64}),
        Layout("PP=2", {PP: 2}),
        Layout("PP=2 VPP=2 packed", {PP: 2, VPP: 2, PACKED: 64}),
        Layout("PP=2 plain optimizer", {PP: 2, "use_distributed_optimizer": False}),
    ],
    4: [Layout("TP=2 PP=2", {TP: 2, PP: 2}), Layout("PP=2 CP=2", {PP: 2, CP: 2})],
}
FAMILY_LAYOUTS = {2: [Layout("TP=2 SP packed", {**SP, PACKED: 64}), Layout("PP=2", {PP: 2})]}
MODELS = {
    "dense": ("qwen2", LAYOUTS),
    "tied embeddings": ("qwen2-tied", TIED_LAYOUTS),
    "experts": ("qwen3-moe", EXPERT_LAYOUTS),
    "norms of heads": ("qwen3", FAMILY_LAYOUTS),
    "scaled rotations": ("llama3", FAMILY_LAYOUTS),
}


@pytest.mark.parametrize("model", MODELS)
def test_updates_equal_a_float64_reference_in_every_layout(tmp_path, model):
    family, layouts_by_ranks = MODELS[model]
    checkpoint = make_random_checkpoint(tmp_path / "model", family)
    compare_layouts(checkpoint, layouts_by_ranks, UPDATES)


def test_reference_has_something_to_say(tmp_path):
    """The comparison above means nothing where losses or entropies are flat."""
    history, _ = reference(make_random_checkpoint(tmp_path / "model"), 2)
    assert abs(history[1]["loss/policy"] - history[0]["loss/policy"]) > 1e-4
    assert history[0]["siren/loss"] > 1e-3
    assert torch.isfinite(torch.tensor(history[0]["grad_norm"]))
