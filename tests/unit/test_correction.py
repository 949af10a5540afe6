"""Rollout correction on ratios that are known by hand."""

import math

import pytest
import torch

from siren_megatron.correction import rollout_correction

MASK = torch.tensor([[True, True, False], [False, True, True]])
RATIOS = torch.tensor([[4.0, 0.25, 99.0], [99.0, 1.0, 1.5]])
BOUNDS = {"maximum": 2.0, "minimum": 0.5}


def correct(mode):
    return rollout_correction(RATIOS.log() - 3.0, torch.full((2, 3), -3.0), MASK, mode=mode, **BOUNDS)


@pytest.mark.parametrize(
    ("mode", "expected", "bounded"),
    [
        ("none", [[1, 1, 0], [0, 1, 1]], 0),
        ("token-truncate", [[2, 0.25, 0], [0, 1, 1.5]], 1 / 4),
        ("token-mask", [[0, 0, 0], [0, 1, 1.5]], 2 / 4),
        ("sequence-truncate", [[1, 1, 0], [0, 1.5, 1.5]], 0),
        ("sequence-mask", [[1, 1, 0], [0, 1.5, 1.5]], 0),
    ],
)
def test_weights(mode, expected, bounded):
    weights, metrics = correct(mode)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert metrics["rollout_ratio/bounded"] == pytest.approx(bounded)


def test_sequence_bounds():
    old = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    truncated, _ = rollout_correction(old, torch.zeros(2, 2), mask, mode="sequence-truncate", **BOUNDS)
    small = math.exp(-2.0)
    torch.testing.assert_close(truncated, torch.tensor([[2.0, 2.0], [small, small]]))
    masked, metrics = rollout_correction(old, torch.zeros(2, 2), mask, mode="sequence-mask", **BOUNDS)
    assert not masked.any() and metrics["rollout_ratio/bounded"] == 1.0


def test_metrics_of_tokens():
    _, metrics = correct("none")
    w = [4.0, 0.25, 1.0, 1.5]
    assert metrics["rollout_ratio/mean"] == pytest.approx(sum(w) / 4)
    assert metrics["rollout_ratio/max"] == pytest.approx(4.0)
    assert metrics["rollout_ratio/effective_samples"] == pytest.approx(
        sum(w) ** 2 / (4 * sum(x * x for x in w))
    )
    assert metrics["rollout_ratio/kl"] == pytest.approx(sum(x - 1 - math.log(x) for x in w) / 4)


def test_metrics_of_sequences():
    _, metrics = correct("sequence-truncate")
    assert metrics["rollout_ratio/mean"] == pytest.approx((1.0 + 1.5) / 2)
    assert metrics["rollout_ratio/effective_samples"] == pytest.approx(2.5**2 / (2 * (1 + 1.5**2)))


def test_equal_engines_change_nothing_and_infinities_stay_finite():
    logprobs = torch.randn(2, 3)
    weights, metrics = rollout_correction(logprobs, logprobs, MASK, mode="token-mask", **BOUNDS)
    assert torch.equal(weights, MASK.float())
    assert metrics["rollout_ratio/effective_samples"] == pytest.approx(1.0)
    weights, metrics = rollout_correction(
        torch.zeros(2, 3), torch.full((2, 3), -1e4), MASK, mode="sequence-truncate", **BOUNDS
    )
    assert torch.isfinite(weights).all() and math.isfinite(metrics["rollout_ratio/effective_samples"])
    with pytest.raises(ValueError, match="--rollout-correction half"):
        rollout_correction(logprobs, logprobs, MASK, mode="half", **BOUNDS)
