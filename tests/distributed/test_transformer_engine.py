"""`--transformer-impl transformer_engine`, a stand-in in Transformer Engine's place: layouts, checkpoints.

The stand-in (tests/standins) has its modules' names, arguments and parameters, in plain torch; tests/nightly
runs the real one.
"""

from __future__ import annotations

import pytest

from tests.checkpoints import make_random_checkpoint
from tests.distributed import te_standin
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import Layout, compare_layouts
from tests.distributed.test_checkpoint import difference
from tests.distributed.test_layouts import EP, PACKED, PP, SP, SP1

TE = {"transformer_impl": "transformer_engine"}
LAYOUTS = {
    # Biases of the projections; norms of heads are those of the model of experts.
    "qwen2": [
        Layout("DP=2 packed", {PACKED: 64, **TE}),
        Layout("TP=2 SP", {**SP, **TE}),
        Layout("TP=2 SP packed", {**SP, PACKED: 64, **TE}),
        Layout("PP=2 recomputed", {PP: 2, "recompute_granularity": "full", **TE}),
    ],
    "qwen3-moe": [
        Layout("EP=2 packed", {EP: 2, PACKED: 64, **TE}),
        Layout("EP=2 TP=2 SP, one replica", {EP: 2, **SP1, **TE}),
        Layout("TP=2 SP, experts cut too", {**SP, **TE}),
    ],
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_layouts_equal_the_reference(tmp_path, family):
    checkpoint = make_random_checkpoint(tmp_path / "model", family)
    compare_layouts(checkpoint, {2: LAYOUTS[family]}, updates=2, train=te_standin.train_layouts)


def test_checkpoints_cross_over(tmp_path):
    """Both kinds of layers write the same names: a run goes on with the other kind, in any layout."""
    checkpoint = make_random_checkpoint(tmp_path / "model", "qwen3-moe", num_hidden_layers=2)
    results = run_ranks(te_standin.cross_checkpoints, 2, checkpoint, tmp_path, timeout=300)[0]
    for (metrics, weights), resumed in results:
        for other_metrics, other_weights in resumed:
            assert other_metrics == [pytest.approx(step, rel=1e-4, abs=1e-6) for step in metrics]
            assert difference(other_weights, weights) < 1e-5


def test_what_is_in_use_is_told_from_what_is_built(tmp_path):
    checkpoint = make_random_checkpoint(tmp_path / "model", "qwen3-moe", num_hidden_layers=1)
    (found,) = run_ranks(te_standin.implementations, 1, checkpoint)
    assert found["norm"].startswith("TELayerNormColumnParallelLinear (Transformer Engine), RMSNorm (Transf")
    assert found["attention"] == "TEDotProductAttention (Transformer Engine)"
    assert found["experts"] == (
        "TEGroupedMLP (megatron-core), TEColumnParallelGroupedLinear (Transformer Engine)"
    )
