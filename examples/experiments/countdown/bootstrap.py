"""Estimates over prompts and seeds with paired bootstrap intervals. numpy only.

Legend: S = seeds, P = prompts, n = responses to a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% bootstrap interval."""

    estimate: float
    low: float
    high: float


def bootstrap(values: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of values [S, P], seeds and prompts resampled independently of each other (a crossed design).

    For a comparison pass the difference of two methods' values: prompts and seeds then stay paired. With one
    seed only the prompts are resampled, and the interval says nothing of other seeds.

    Args:
        values: [S, P] one number for each seed and prompt, e.g. pass@k.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values must be [seeds, prompts] and not empty, got {values.shape}")
    seeds, prompts = values.shape
    random = np.random.default_rng(seed)
    # Weights instead of indices: a resample is a row of counts, its mean a bilinear form.
    seed_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    prompt_weights = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts
    means = np.einsum("rs,sp,rp->r", seed_weights, values, prompt_weights, optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
