"""Every entropy method and loss option gives the same metrics and weights in every layout."""

from __future__ import annotations

import pytest
from checkpoints import make_random_checkpoint
from launch import run_ranks
from methods import CASES, EXPERT_CASES, EXPERT_LAYOUTS, METHOD_LAYOUTS, train_cases

TOLERANCE = 1e-4
# Below these a metric is rounding: sums of signed terms that cancel, and squares of small differences.
FLOORS = {"loss/policy": 1e-3, "kl_old_new": 1e-4, "kl_ref": 1e-4, "loss/kl": 1e-4, "kl-cov/loss": 1e-4}


# How often the fast path of the vocabulary operation sufficed is its own affair, and differs with the shards.
PERFORMANCE = {"top_p_fallback_rows"}


def train_everywhere(checkpoint, layouts_by_ranks, cases):
    """{layout: {case: (history, weights, state)}}; all ranks have to report the same metrics."""
    by_layout: dict[str, dict] = {}
    for world_size, layouts in layouts_by_ranks.items():
        ranks = run_ranks(train_cases, world_size, checkpoint, layouts, cases, timeout=500)
        for (layout, case), result in ranks[0].items():
            by_layout.setdefault(layout, {})[case] = result
            for other in ranks[1:]:
                assert other[layout, case][0] == result[0], f"{layout}, {case}: ranks disagree on metrics"
                assert other[layout, case][2] == result[2], f"{layout}, {case}: ranks disagree on the state"
    return by_layout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    checkpoint = make_random_checkpoint(
        tmp_path_factory.mktemp("methods") / "model", hidden_size=32, num_hidden_layers=4
    )
    return train_everywhere(checkpoint, METHOD_LAYOUTS, CASES)


def worst_metric(got, want):
    worst = (0.0, "")
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - PERFORMANCE:
            difference = abs(a[name] - b[name]) / max(abs(b[name]), FLOORS.get(name, 1e-9))
            worst = max(worst, (difference if a[name] != b[name] else 0.0, name))
    return worst


def drift(got, want):
    assert got.keys() == want.keys()
    return max(float((got[n].double() - want[n].double()).norm() / want[n].double().norm()) for n in want)


def test_every_layout_trains_alike(results):
    compare_layouts(results, METHOD_LAYOUTS[1][0].name, CASES)


def test_every_layout_trains_experts_alike(tmp_path):
    checkpoint = make_random_checkpoint(tmp_path / "model", "qwen3-moe", hidden_size=32, num_hidden_layers=2)
    results = train_everywhere(checkpoint, EXPERT_LAYOUTS, EXPERT_CASES)
    compare_layouts(results, EXPERT_LAYOUTS[1][0].name, EXPERT_CASES)


def compare_layouts(results, reference_name, cases):
    """Print the table of differences; fail where one exceeds the tolerance."""
    others = [name for name in results if name != reference_name]
    print(f"\nlargest relative difference to '{reference_name}': metrics / weights")
    print(f"{'':32}" + "".join(f"{name[:20]:>22}" for name in others))
    failures = []
    for case in cases:
        history, weights, state = results[reference_name][case]
        row = f"{case:32}"
        for name in others:
            other_history, other_weights, other_state = results[name][case]
            metric, which = worst_metric(other_history, history)
            moved = drift(other_weights, weights)
            row += f"{metric:13.1e}{moved:9.1e}"
            if not (metric < TOLERANCE and moved < TOLERANCE):
                failures.append(f"{case} in {name}: {which} {metric:.1e}, weights {moved:.1e}")
            if state["coeff"] is not None:
                assert other_state["coeff"] == pytest.approx(state["coeff"], rel=TOLERANCE)
        print(row)
    assert not failures, "\n".join(failures)


def test_every_case_trains_differently(results):
    """Equal numbers mean little where an option did nothing."""
    own = results[METHOD_LAYOUTS[1][0].name]
    _, plain, _ = own["none"]
    for case, (history, weights, _) in own.items():
        if case != "none":
            assert drift(weights, plain) > 100 * 1e-6, f"{case} equals plain GRPO"
        assert all(0 < row["grad_norm"] < 1e3 for row in history)


def test_each_method_acts(results):
    """The metrics show that each method's own part was at work."""
    own = {case: result[0] for case, result in results[METHOD_LAYOUTS[1][0].name].items()}
    assert own["clip-cov"][0]["clip-cov/tokens"] > 0
    assert own["kl-cov"][0]["kl-cov/loss"] > 0
    assert own["paec"][0]["paec/loss"] > 0 and own["siren"][0]["siren/loss"] > 0
    assert own["siren, no anchor"][0]["siren/loss"] < 0
    assert own["adaptive"][1]["entropy_coeff"] > own["adaptive"][0]["entropy_coeff"] > 0.2
    assert own["naive"][1]["entropy_coeff"] == pytest.approx(0.1)
    assert own["gspo, kl k3"][1]["kl_ref"] > 0 and own["gspo, kl k3"][1]["clip_fraction"] > 0
    assert 0 < own["kl k1 in reward, reinforce++"][0]["rollout_ratio/bounded"] < 1
