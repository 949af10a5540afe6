"""Every family computes transformers' logits in every layout, and gives back the weights it was given."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import FAMILY_CONFIGS, make_random_checkpoint
from tests.distributed.families import TOKENS, forward_and_gather
from tests.distributed.launch import run_ranks

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
SP = "sequence_parallel"
DENSE_LAYOUTS = {1: [{}], 2: [{TP: 2}, {TP: 2, SP: True}, {PP: 2}], 4: [{TP: 2, PP: 2}, {TP: 4}]}
EXPERT_LAYOUTS = {
    1: [{}],
    2: [{EP: 2}, {TP: 2, SP: True}, {PP: 2}],
    4: [{TP: 2, SP: True, EP: 2}, {PP: 2, EP: 2}, {EP: 4}, {TP: 2, SP: True, PP: 2}, {EP: 2}],
}


def transformers_logits(checkpoint) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_logits_equal_transformers_and_weights_come_back(tmp_path, experts):
    families = [name for name in FAMILY_CONFIGS if ("moe" in name) == experts]
    checkpoints = {name: make_random_checkpoint(tmp_path / name, name) for name in families}
    expected = {name: transformers_logits(path) for name, path in checkpoints.items()}
    print(f"\n{'family':24}{'layout':72}{'largest difference':>20}")
    for world_size, layouts in (EXPERT_LAYOUTS if experts else DENSE_LAYOUTS).items():
        jobs = [(name, layout) for name in families for layout in layouts]
        results = run_ranks(
            forward_and_gather,
            world_size,
            [(checkpoints[name], layout) for name, layout in jobs],
            timeout=300,
        )
        for index, (name, layout) in enumerate(jobs):
            seen = [rank[index][0] for rank in results if rank[index][0] is not None]
            assert len(seen) == world_size // layout.get(PP, 1)
            worst = max(float((logits[..., :500] - expected[name]).abs().max()) for logits in seen)
            print(f"{name:24}{str(layout):72}{worst:20.1e}")
            assert worst < 1e-4, (name, layout)
            stored = load_file(checkpoints[name] / "model.safetensors")
            weights = results[0][index][1]
            assert weights.keys() == stored.keys() - {"lm_head.weight" if "tied" in name else ""}
            for key, tensor in weights.items():
                assert torch.equal(tensor, stored[key]), (name, layout, key)
            assert not any(rank[index][1] for rank in results[1:])


def test_the_logits_are_worth_comparing(tmp_path):
    """Logits that hardly differ by position, or that no scaling of rotations moves, would prove nothing."""
    scaled = transformers_logits(make_random_checkpoint(tmp_path / "a", "llama3"))
    plain = transformers_logits(
        make_random_checkpoint(tmp_path / "b", "llama3", rope_parameters={"rope_theta": 10000.0})
    )
    assert scaled.std(dim=1).mean() > 0.5
    assert (scaled - plain).abs().max() > 0.1
