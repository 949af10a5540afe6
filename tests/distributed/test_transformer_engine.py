"""`--transformer-impl transformer_engine` with a stand-in for Transformer Engine: results, cuts, checkpoints.

The stand-in (tests/standins) has its modules' names, arguments and parameters, in plain torch; tests/nightly
runs the real one.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.checkpoints import make_random_checkpoint
from tests.distributed import te_standin
from tests.distributed.gradients import relative_error
from tests.distributed.launch import run_ranks
from tests.distributed.layouts import Layout
from tests.distributed.te_standin import TE
from tests.distributed.test_checkpoint import difference
from tests.distributed.test_layouts import EP, PACKED, PP, SP, SP1

PADDED, TIGHT = Layout("padded", TE), Layout("packed", {PACKED: 64, **TE})
LAYOUTS = {
    # Biases of the projections; tied embeddings and scaled rotations; norms of heads and experts.
    "qwen2": [PADDED, TIGHT, Layout("recomputed", {"recompute_granularity": "full", **TE})],
    "llama3": [PADDED],
    "qwen3-moe": [PADDED, TIGHT],
}
CUTS = {
    "qwen2": [SP, {PP: 2}],
    "qwen3": [SP],
    "llama3": [SP],
    "qwen3-moe": [SP, {EP: 2}, {EP: 2, **SP1}],
}


def test_log_probs_and_gradients_equal_those_of_local_layers(tmp_path):
    checkpoints = {family: make_random_checkpoint(tmp_path / family, family) for family in LAYOUTS}
    jobs = [(family, layout) for family in LAYOUTS for layout in (Layout("local"), *LAYOUTS[family])]
    arguments = [(checkpoints[family], layout) for family, layout in jobs]
    (updates,) = run_ranks(te_standin.update, 1, arguments, timeout=300)
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


def test_every_rank_holds_the_same_of_both_kinds_of_layers(tmp_path):
    """The same parts of the same weights, marked alike, under the same names in a checkpoint."""
    checkpoints = {family: make_random_checkpoint(tmp_path / family, family) for family in CUTS}
    layouts = [(checkpoints[family], layout) for family in CUTS for layout in CUTS[family]]
    jobs = [(path, {**layout, **kind}) for path, layout in layouts for kind in ({}, TE)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranks = pool.submit(te_standin.cuts, jobs, 2).result(timeout=300)
    for found in ranks:
        for (path, layout), local, other in zip(layouts, found[::2], found[1::2], strict=True):
            assert local.weights.keys() == other.weights.keys(), (path.name, layout)
            for name, weight in local.weights.items():
                assert torch.equal(weight, other.weights[name]), (path.name, layout, name)
            assert local.marks == other.marks and local.entries == other.entries, (path.name, layout)


def test_checkpoints_cross_over(tmp_path):
    """A run goes on with the other kind of layers, its optimizer too."""
    checkpoint = make_random_checkpoint(tmp_path / "model", "qwen3-moe", num_hidden_layers=2)
    (results,) = run_ranks(te_standin.cross_checkpoints, 1, checkpoint, tmp_path, timeout=300)
    for (metrics, weights), (other_metrics, other_weights) in results:
        assert other_metrics == [pytest.approx(step, rel=1e-4, abs=1e-5) for step in metrics]
        assert difference(other_weights, weights) < 1e-5
