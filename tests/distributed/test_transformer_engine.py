"""`--transformer-impl transformer_engine`, a stand-in in Transformer Engine's place: layouts, checkpoints.

The stand-in (tests/standins) has its modules' names, arguments and parameters, in plain torch; tests/nightly
runs the real one.
"""

from __future__ import annotations

import pytest

from tests.checkpoints import make_random_checkpoint
from tests.distributed import te_standin
from tests.distributed.gradients import relative_error
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import Layout
from tests.distributed.te_standin import TE
from tests.distributed.test_checkpoint import difference
from tests.distributed.test_layouts import EP, PACKED, PP, SP, SP1

LAYOUTS = {
    # Biases of the projections here, norms of heads in the model of experts.
    "qwen2": [
        Layout("DP=2 packed", {PACKED: 64, **TE}),
        Layout("TP=2 SP", {**SP, **TE}),
        Layout("TP=2 SP packed", {**SP, PACKED: 64, **TE}),
        Layout("PP=2 recomputed", {PP: 2, "recompute_granularity": "full", **TE}),
    ],
    # Rotary frequencies that megatron-core would compute otherwise; tied embeddings.
    "llama3": [Layout("DP=2", TE)],
    "qwen3-moe": [
        Layout("EP=2 packed", {EP: 2, PACKED: 64, **TE}),
        Layout("EP=2 TP=2 SP, one replica", {EP: 2, **SP1, **TE}),
        Layout("TP=2 SP, experts cut too", {**SP, **TE}),
    ],
}


def test_log_probs_and_gradients_equal_those_of_local_layers(tmp_path):
    checkpoints = {family: make_random_checkpoint(tmp_path / family, family) for family in LAYOUTS}
    jobs = [(family, layout) for family in LAYOUTS for layout in (Layout("local"), *LAYOUTS[family])]
    arguments = [(checkpoints[family], layout) for family, layout in jobs]
    updates = run_ranks(te_standin.update, 2, arguments, timeout=300)[0]
    print(f"\n{'family':12}{'layout':34}{'log-probs':>12}{'gradients':>12}   (difference)")
    for (family, layout), update in zip(jobs, updates, strict=True):
        if layout.name == "local":
            local = update
            assert local.logprobs.std() > 1 and all(float(t.norm()) > 0 for t in local.gradients.values())
            assert local.implementations["norm"] == "RMSNorm (siren_megatron)"
            continue
        worst = float((update.logprobs - local.logprobs).abs().max())
        error = relative_error(update.gradients, local.gradients)
        print(f"{family:12}{layout.name:34}{worst:12.1e}{error:12.1e}")
        assert worst < 1e-4 and error < 1e-4, (family, layout.name)
        used = update.implementations
        assert used["norm"].startswith("TELayerNormColumnParallelLinear (Transformer Engine)")
        assert used["attention"] == "TEDotProductAttention (Transformer Engine)"
        assert ("TEColumnParallelGroupedLinear (Transformer Engine)" in used.get("experts", "")) == (
            family == "qwen3-moe"
        )


def test_checkpoints_cross_over(tmp_path):
    """Both kinds of layers write the same names: a run goes on with the other kind, in any layout."""
    checkpoint = make_random_checkpoint(tmp_path / "model", "qwen3-moe", num_hidden_layers=2)
    results = run_ranks(te_standin.cross_checkpoints, 2, checkpoint, tmp_path, timeout=300)[0]
    for (metrics, weights), resumed in results:
        for other_metrics, other_weights in resumed:
            assert other_metrics == [pytest.approx(step, rel=1e-4, abs=1e-5) for step in metrics]
            assert difference(other_weights, weights) < 1e-5
