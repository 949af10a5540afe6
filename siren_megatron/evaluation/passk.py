"""Estimators of an evaluation: avg@k, pass@k, maj@k and bootstrap intervals. Pure functions; numpy only.

Legend: n = samples of a problem, c = right ones of them, P = problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_MAJORITY_K = 64
"""maj@k for k < n is computed exactly by a dynamic program, whose cost grows with about k to the fourth."""


def ks_to_show(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    ks = [2**power for power in range(n.bit_length()) if 2**power <= n]
    return ks if ks[-1] == n else [*ks, n]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k samples is right: 1 - C(n-c, k) / C(n, k), which is without bias.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1; in exact integers here.

    Raises:
        ValueError: not 1 <= k <= n or not 0 <= c <= n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@k wants 1 <= k <= n and 0 <= c <= n, got k {k}, n {n}, c {c}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_curve(n: int, c: int) -> list[float]:
    """pass@k for k = 1 ... n, in one pass."""
    curve, none_right = [], 1.0
    for k in range(1, n + 1):
        none_right *= max(0, n - c - k + 1) / (n - k + 1)
        curve.append(1 - none_right)
    return curve


def majority_at_k(clusters: Sequence[tuple[int, bool]], k: int) -> float:
    """Expected maj@k: the probability that the most frequent answer of k samples is right.

    The k samples are drawn without replacement from the n that there are. Between answers that are equally
    frequent one is chosen at random, so m right ones among t tied ones count m / t. A sample without an
    answer counts as a wrong answer of its own: give it as (1, False) each.

    Args:
        clusters: (number of samples, whether right) of each distinct answer; the numbers sum to n.
        k: samples that vote; at most n, and at most MAX_MAJORITY_K where it is less than n.

    Raises:
        ValueError: k is out of range.
    """
    sizes = [size for size, _ in clusters]
    n = sum(sizes)
    if not 1 <= k <= n or (k < n and k > MAX_MAJORITY_K):
        raise ValueError(f"maj@k wants 1 <= k <= {n} (and at most {MAX_MAJORITY_K} below n), got {k}")
    if k == n:
        top = max(sizes)
        tied = [right for size, right in clusters if size == top]
        return sum(tied) / len(tied)
    if not any(right for _, right in clusters):
        return 0.0
    if all(right for _, right in clusters):
        return 1.0
    return sum(_majority_with_top(clusters, k, top) for top in range(1, k + 1)) / math.comb(n, k)


def _majority_with_top(clusters: Sequence[tuple[int, bool]], k: int, top: int) -> float:
    """Sum over the draws of k whose highest count is ``top`` of the share of right ones among the tied.

    ways[j, r, w]: draws of j samples in which r right and w wrong clusters have ``top``, the others fewer.
    """
    most = k // top
    num_right = min(most, sum(1 for size, right in clusters if right and size >= top))
    num_wrong = min(most, sum(1 for size, right in clusters if not right and size >= top))
    if not num_right:
        return 0.0
    ways = np.zeros((k + 1, num_right + 1, num_wrong + 1))
    ways[0, 0, 0] = 1
    for size, right in clusters:
        grown = np.zeros_like(ways)
        for drawn in range(min(size, top - 1, k) + 1):
            grown[drawn:] += math.comb(size, drawn) * ways[: k + 1 - drawn]
        if size >= top:
            tie = math.comb(size, top) * ways[: k + 1 - top]
            if right:
                grown[top:, 1:] += tie[:, :-1]
            else:
                grown[top:, :, 1:] += tie[:, :, :-1]
        ways = grown
    right, wrong = np.meshgrid(np.arange(num_right + 1), np.arange(num_wrong + 1), indexing="ij")
    share = np.where(right > 0, right / np.maximum(right + wrong, 1), 0.0)
    return float((ways[k] * share).sum())


def bootstrap_interval(
    values: Sequence[float], *, seed: int, confidence: float = 0.95, num_resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the mean over problems, which are drawn anew with replacement.

    It tells how the mean would vary over other problems of the kind; the samples of a problem stay together.

    Args:
        values: one number a problem, [P].
        seed: of the draws: the same values and seed give the same interval.
        confidence: share of the resampled means that the interval holds.
        num_resamples: how often the P problems are drawn.

    Raises:
        ValueError: there are no values.
    """
    data = np.asarray(values, dtype=float)
    if data.size == 0:
        raise ValueError("an interval wants at least one value")
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, 200):
        stop = min(start + 200, num_resamples)
        means[start:stop] = data[generator.integers(data.size, size=(stop - start, data.size))].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
