"""Estimators against enumeration of every subset, closed forms and exact moments."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from siren_megatron.evaluation.diversity import distinct_ngrams
from siren_megatron.evaluation.passk import (
    bootstrap_interval,
    ks_to_show,
    majority_at_k,
    pass_at_k,
    pass_curve,
)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (6, 0), (6, 2), (7, 3), (6, 6)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, c):
    right = [i < c for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(right, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
        assert pass_curve(n, c)[k - 1] == pytest.approx(expected, abs=1e-12)


def test_pass_curve_of_many_samples_is_exact():
    curve = pass_curve(256, 3)
    assert curve[0] == pytest.approx(3 / 256)
    for k in (2, 50, 128, 253, 254, 256):
        assert curve[k - 1] == pytest.approx(1 - math.comb(253, k) / math.comb(256, k), abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_other_k(k):
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(4, 2, k)


def enumerate_majority(clusters, k):
    """The definition: every subset of the samples, a tie broken uniformly."""
    samples = [cluster for cluster, (size, _) in enumerate(clusters) for _ in range(size)]
    total = count = 0
    for subset in itertools.combinations(samples, k):
        votes = Counter(subset)
        top = max(votes.values())
        tied = [clusters[cluster][1] for cluster, number in votes.items() if number == top]
        total += sum(tied) / len(tied)
        count += 1
    return total / count


@pytest.mark.parametrize(
    "clusters",
    [
        [(3, True), (2, False), (2, False), (1, False)],
        [(2, True), (2, False), (1, True), (1, False), (1, False)],
        [(1, True)] * 3 + [(1, False)] * 4,
        [(5, False), (2, True), (1, True)],
        [(8, True)],
        [(4, False), (3, False)],
    ],
)
def test_majority_is_the_mean_over_all_subsets(clusters):
    n = sum(size for size, _ in clusters)
    for k in range(1, n + 1):
        assert majority_at_k(clusters, k) == pytest.approx(enumerate_majority(clusters, k), abs=1e-12), k


def test_majority_of_one_is_the_average_and_of_many_is_exact():
    clusters = [(100, True), (80, False), (70, False), (6, False)]
    assert majority_at_k(clusters, 1) == pytest.approx(100 / 256)
    assert majority_at_k(clusters, 256) == 1.0
    generator = np.random.default_rng(0)
    # Against simulation: three standard errors of 20,000 draws.
    draws = generator.multivariate_hypergeometric([100, 80, 70, 6], 16, size=20000)
    top = draws.max(axis=1, keepdims=True)
    expected = ((draws == top)[:, 0] / (draws == top).sum(axis=1)).mean()
    assert majority_at_k(clusters, 16) == pytest.approx(expected, abs=0.011)


def test_the_bootstrap_has_the_moments_and_the_coverage_of_the_mean():
    generator = np.random.default_rng(7)
    values = generator.random(400)
    low, high = bootstrap_interval(values, seed=1)
    # Large samples: mean +- 1.96 standard errors.
    error = values.std() / math.sqrt(len(values))
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.2 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert bootstrap_interval(values, seed=1) == (low, high) != bootstrap_interval(values, seed=2)
    covered = 0
    for trial in range(300):
        sample = generator.random(60) < 0.3
        low, high = bootstrap_interval(sample, seed=trial, num_resamples=400)
        covered += low <= 0.3 <= high
    # Binomial(300, ~0.94): four standard errors.
    assert covered / 300 == pytest.approx(0.94, abs=0.055)


def test_the_bootstrap_of_one_problem_has_no_width():
    assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([], seed=0)


def test_ks():
    assert ks_to_show(1) == [1]
    assert ks_to_show(16) == [1, 2, 4, 8, 16]
    assert ks_to_show(20) == [1, 2, 4, 8, 16, 20]


def test_distinct_ngrams():
    assert distinct_ngrams(["a b c d e"]) == 1
    assert distinct_ngrams(["a b c d e", "a b c d e"]) == 0.5
    # abcd bcde | abcd bcdx: three of four
    assert distinct_ngrams(["a b c d e", "a b c d x"]) == 0.75
    assert distinct_ngrams(["1 + 1"], n=2) == 1
    assert distinct_ngrams(["x", "x"]) == 0.5
    assert distinct_ngrams(["", " "]) is None
