"""What the experiment runs: the methods with their options, and how large each setting is."""

from __future__ import annotations

from dataclasses import dataclass

METHODS: dict[str, tuple[str, ...]] = {
    "grpo": ("--entropy-method", "none"),
    "naive-0.001": ("--entropy-method", "naive", "--entropy-coeff", "0.001"),
    "naive-0.01": ("--entropy-method", "naive", "--entropy-coeff", "0.01"),
    "naive-0.05": ("--entropy-method", "naive", "--entropy-coeff", "0.05"),
    "clip-cov": ("--entropy-method", "clip-cov", "--entropy-cov-fraction", "2e-3"),
    "kl-cov": ("--entropy-method", "kl-cov", "--entropy-cov-fraction", "2e-3"),
    "entropy-advantage": ("--entropy-method", "entropy-advantage"),
    "high-entropy-tokens": ("--entropy-method", "high-entropy-tokens"),
    "entropy-constraint": ("--entropy-method", "entropy-constraint", "--entropy-rate", "0.01"),
    "siren-0.005": ("--entropy-method", "siren", "--entropy-coeff", "0.005"),
    "siren-0.1": ("--entropy-method", "siren", "--entropy-coeff", "0.1"),
    "siren-0.5": ("--entropy-method", "siren", "--entropy-coeff", "0.5"),
    "siren-no-top-p": ("--entropy-method", "siren", "--entropy-coeff", "0.1", "--entropy-top-p", "1"),
    "siren-no-peak": ("--entropy-method", "siren", "--entropy-coeff", "0.1", "--siren-peak-quantile", "0"),
    "siren-no-anchor": ("--entropy-method", "siren", "--entropy-coeff", "0.01", "--no-siren-anchor"),
    "anchor-alone": (
        *("--entropy-method", "siren", "--entropy-coeff", "0.1"),
        *("--entropy-top-p", "1", "--siren-peak-quantile", "0"),
    ),
}
"""Name -> options of pretrain_siren.py. Steps are of few tokens here: the cov fraction is ten times 2e-4."""

SENSITIVITY: dict[tuple[float, float], str] = {
    (top_p, quantile): f"grid-p{top_p:g}-q{quantile:g}"
    for top_p in (0.5, 0.8, 0.95)
    for quantile in (0.0, 0.5, 0.8)
} | {(0.8, 0.8): "siren-0.1", (0.8, 0.0): "siren-no-peak"}
"""Mass of the top-p mask, quantile of the peak mask -> the method with these, at SIREN's coefficient 0.1."""

GRID: dict[str, tuple[str, ...]] = {
    name: (
        *("--entropy-method", "siren", "--entropy-coeff", "0.1"),
        *("--entropy-top-p", f"{top_p:g}", "--siren-peak-quantile", f"{quantile:g}"),
    )
    for (top_p, quantile), name in SENSITIVITY.items()
    if name not in METHODS
}

BASELINE = "grpo"
SIREN = "siren-0.1"
"""What every other method is compared with: plain GRPO, and SIREN of all three parts."""


@dataclass(frozen=True)
class Setting:
    """How large an experiment is.

    Args:
        steps: rollout steps of each run.
        seeds: of the methods; grid_seeds of the sensitivity grid (0 = no grid).
        methods: names in METHODS.
        eval_prompts: held-out prompts of the final evaluation.
        eval_samples: responses to each of them: pass@k goes up to it.
        curve_prompts, curve_samples, curve_interval: the evaluations during training.
    """

    steps: int
    seeds: int
    grid_seeds: int
    methods: tuple[str, ...]
    eval_prompts: int
    eval_samples: int
    curve_prompts: int
    curve_samples: int
    curve_interval: int


_MAIN = ("grpo", "naive-0.01", "naive-0.05", "entropy-constraint", "siren-0.1")
SETTINGS = {
    "quick": Setting(60, 2, 0, ("grpo", "naive-0.05", "siren-0.1"), 128, 128, 64, 16, 20),
    "main": Setting(120, 5, 0, _MAIN, 256, 256, 128, 32, 30),
    "full": Setting(120, 5, 2, tuple(METHODS), 256, 256, 128, 32, 30),
}
TASKS = ("countdown", "rewrite")
"""Names of toy tasks: of `tools/make_toy_checkpoint.py` and of `--reward`."""
MAX_RESPONSE_TOKENS = 16
"""Countdown's right responses have 11 tokens, rewrite's 16."""

TRAINING = (
    *("--rollout-batch-size", "32", "--rollout-num-samples", "8"),
    *("--rollout-max-response-length", str(MAX_RESPONSE_TOKENS), "--rollout-max-in-flight", "32"),
    *("--seq-length", "64", "--global-batch-size", "64", "--micro-batch-size", "64", "--lr", "1e-4"),
    *("--record-prompts", "0"),
    # Several runs share few cores: slow is not broken.
    *("--rollout-health-timeout", "600", "--rollout-request-timeout", "3600", "--reward-time-limit", "600"),
)
"""Options that all runs share: 32 prompts x 8 responses, 8 prompts an optimizer step."""
