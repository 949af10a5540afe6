"""Training other families: losses, gradient norms and weights equal a float64 reference in every layout.

Queries' and keys' norms, experts and routers have gradients that no Qwen2 has.
"""

from __future__ import annotations

import pytest

from tests.checkpoints import make_random_checkpoint
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import Layout, reference, train_layouts

UPDATES = 3
TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
SP = "sequence_parallel"
DENSE = {2: [Layout("TP=2", {TP: 2}), Layout("TP=2, sequence parallel", {TP: 2, SP: True})]}
EXPERTS = {
    1: [Layout("one rank")],
    2: [Layout("EP=2", {EP: 2}), Layout("DP=2"), Layout("TP=2", {TP: 2, SP: True})],
    4: [Layout("TP=2 x EP=2", {TP: 2, SP: True, EP: 2}), Layout("PP=2 x EP=2", {PP: 2, EP: 2})],
}


@pytest.mark.parametrize("family", ["qwen3", "llama3", "qwen3-moe"])
def test_updates_equal_a_float64_reference(tmp_path, family):
    checkpoint = make_random_checkpoint(tmp_path / "model", family)
    expected, expected_weights = reference(checkpoint, UPDATES)
    for world_size, layouts in (EXPERTS if "moe" in family else DENSE).items():
        results = run_ranks(train_layouts, world_size, checkpoint, UPDATES, layouts, timeout=300)
        for layout, (history, weights) in zip(layouts, results[0], strict=True):
            worst = {
                name: max(
                    abs(got[name] - want[name]) / (abs(want[name]) + 1e-3 * (name == "loss/policy"))
                    for got, want in zip(history, expected, strict=True)
                )
                for name in expected[0]
            }
            assert max(worst.values()) < 1e-4, f"{layout.name}: {worst}"
            # transformers keeps a layer's experts in one tensor, which its checkpoints do not.
            shared = weights.keys() & expected_weights.keys()
            assert len(shared) == len([name for name in weights if ".experts." not in name])
            for name in shared:
                want = expected_weights[name]
                drift = float((weights[name].double() - want).norm() / want.norm())
                assert drift < 1e-4, (layout.name, name)
