"""Options of the policy loss and of the entropy methods, and what contradicts what. Standard library only.

docs/methods.md has the formulas behind them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from siren_megatron.options import flag, option

LOSS_AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
ENTROPY_METHOD_NAMES = (
    "none",
    "naive",
    "adaptive",
    "entropy-advantage",
    "high-entropy-tokens",
    "clip-cov",
    "kl-cov",
    "siren",
    "entropy-constraint",
    "paec",
)
"""Keys of `entropy_methods.ENTROPY_METHODS`, which imports torch; a test holds the two together."""

ADVANTAGE_ESTIMATORS = ("grpo", "dr-grpo", "rloo", "reinforce++-baseline")
POLICY_LOSSES = ("ppo", "gspo", "cispo")
ROLLOUT_CORRECTIONS = ("none", "token-truncate", "sequence-truncate", "token-mask", "sequence-mask")


@dataclass(frozen=True, kw_only=True)
class GrpoOptions:
    grpo_policy_loss: str = option(
        "ppo",
        "ppo: clipped token ratio; gspo: clipped ratio of the response; cispo: clipped weight on log-prob",
        choices=POLICY_LOSSES,
    )
    grpo_clip_ratio_low: float = option(
        0.2, "epsilon below 1 of the ratio's clip (GSPO's authors: 3e-4)", minimum=0, maximum=1
    )
    grpo_clip_ratio_high: float = option(
        0.2, "epsilon above 1 of the ratio's clip (GSPO's authors: 4e-4; DAPO's: 0.28)", minimum=0
    )
    grpo_dual_clip: float = option(
        3.0, "bound of the ratio for negative advantages (ppo only); 0 = none", minimum=0
    )
    grpo_advantage_estimator: str = option(
        "grpo",
        "grpo: reward - group mean; dr-grpo: the same, never divided by the deviation; rloo: reward - mean "
        "of the others; reinforce++-baseline: reward - group mean, whitened over the rollout's tokens",
        choices=ADVANTAGE_ESTIMATORS,
    )
    grpo_normalize_std: bool = option(False, "divide advantages by the group's standard deviation (GRPO)")
    loss_agg: str = option(
        "seq-mean-token-sum-norm",
        "how token losses become one: '-norm' divides by the maximum response length (Dr. GRPO)",
        choices=LOSS_AGGREGATIONS,
    )
    grpo_epochs: int = option(1, "passes over one rollout's responses", minimum=1)
    grpo_kl_coeff: float = option(
        0.0,
        "weight of the KL divergence from the initial policy; 0 = none, and no reference model",
        minimum=0,
    )
    grpo_kl_estimator: str = option(
        "k3", "estimator of that KL: k1 = log-ratio, k2 = its square / 2, k3", choices=("k1", "k2", "k3")
    )
    grpo_kl_in: str = option(
        "loss", "a term of the loss, or taken from a response's reward", choices=("loss", "reward")
    )
    grpo_dynamic_sampling: bool = option(
        False, "replace groups whose rewards are all equal by new prompts' groups (DAPO)"
    )
    grpo_dynamic_sampling_max_rounds: int = option(
        10, "extra generation rounds a step; what is missing then stays as it was", minimum=1
    )
    grpo_overlong_buffer: int = option(
        0,
        "tokens before the maximum response length over which a length penalty grows (DAPO); 0 = none",
        minimum=0,
    )
    grpo_overlong_penalty: float = option(1.0, "largest length penalty, in units of reward", above=0)
    grpo_mask_truncated: bool = option(
        False, "no policy gradient from responses cut at the maximum length (DAPO's overlong filtering)"
    )


@dataclass(frozen=True, kw_only=True)
class EntropyOptions:
    entropy_method: str = option(
        "siren", "entropy regulariser (docs/methods.md)", choices=ENTROPY_METHOD_NAMES
    )
    entropy_coeff: float | None = option(
        None,
        "the method's coefficient (siren: beta 0.005); adaptive, entropy-constraint: its first value; "
        "default: the method's own",
        type=float,
        minimum=0,
    )
    entropy_coeff_schedule: str = option(
        "constant", "course of the coefficient over the run", choices=("constant", "linear", "cosine")
    )
    entropy_coeff_final: float | None = option(
        None, "coefficient at the last step of a linear or cosine schedule; default: 0", type=float, minimum=0
    )
    entropy_top_p: float = option(
        0.8, "mass of the top-p mask over the vocabulary; 1 = all", above=0, maximum=1
    )
    entropy_chunk_mb: int = option(
        0,
        "MiB of the chunks that the vocabulary operation works in; 0 = 64, or 256 rows if these are more",
        minimum=0,
    )
    entropy_top_p_boundary: str = option(
        "inclusive",
        "whether the token that crosses the mass is in the mask",
        choices=("inclusive", "exclusive"),
    )
    entropy_target: float | None = option(
        None,
        "entropy in nats that siren, adaptive, entropy-constraint and paec hold to; "
        "default: the initial policy's, measured on the first rollout",
        type=float,
        minimum=0,
    )
    entropy_rate: float = option(
        0.001, "change of adaptive's or entropy-constraint's coefficient per nat and optimizer step", above=0
    )
    entropy_advantage_kappa: float = option(
        1.0, "entropy-advantage: the bonus is at most |advantage| / kappa", above=0
    )
    entropy_token_quantile: float = option(
        0.8,
        "high-entropy-tokens: quantile of a response's entropies above which tokens have a policy gradient",
        minimum=0,
    )
    entropy_cov_fraction: float = option(
        2e-4, "clip-cov, kl-cov: share of the optimizer step's tokens that is chosen", above=0, maximum=1
    )
    entropy_cov_low: float = option(1.0, "clip-cov: lower bound of the covariance of chosen tokens")
    entropy_cov_high: float = option(5.0, "clip-cov: upper bound of the covariance of chosen tokens")
    entropy_refresh: bool = option(
        False,
        "one more forward pass before every optimizer step but a rollout's first, so that what a method "
        "takes from the whole step is of the current policy (clip-cov and kl-cov always do)",
    )
    siren_peak_quantile: float = option(
        0.8, "quantile of a response's entropies above which positions count; 0 = all positions", minimum=0
    )
    siren_anchor: bool = option(True, "penalise the distance to the anchor; off = reward the masked entropy")
    siren_anchor_estimate: str = option(
        "step",
        "mean entropy of the penalty's factor: of the whole optimizer step, or of each micro-batch",
        choices=("step", "microbatch"),
    )


@dataclass(frozen=True, kw_only=True)
class CorrectionOptions:
    rollout_correction: str = option(
        "none",
        "weights against the difference of rollout engine and trainer: ratios of tokens or of whole "
        "responses, cut at the bound (truncate) or dropped outside the bounds (mask)",
        choices=ROLLOUT_CORRECTIONS,
    )
    rollout_correction_max: float = option(2.0, "largest ratio", minimum=1)
    rollout_correction_min: float = option(0.5, "smallest ratio (mask only)", minimum=0, maximum=1)
    rollout_logprobs_as_old: bool = option(
        False,
        "take the log-probs that vLLM sampled with for the old ones, and leave out the trainer's own pass "
        "over the rollout, but for the anchor and for records",
    )


# What only means something with certain values of another option: (option, other option, its values).
_NEEDS = (
    ("grpo_dual_clip", "grpo_policy_loss", ("ppo",)),
    ("grpo_dynamic_sampling_max_rounds", "grpo_dynamic_sampling", (True,)),
    ("entropy_coeff_final", "entropy_coeff_schedule", ("linear", "cosine")),
    ("entropy_target", "entropy_method", ("siren", "adaptive", "entropy-constraint", "paec")),
    ("entropy_rate", "entropy_method", ("adaptive", "entropy-constraint")),
    ("entropy_advantage_kappa", "entropy_method", ("entropy-advantage",)),
    ("entropy_token_quantile", "entropy_method", ("high-entropy-tokens",)),
    ("entropy_cov_fraction", "entropy_method", ("clip-cov", "kl-cov")),
    ("entropy_cov_low", "entropy_method", ("clip-cov",)),
    ("entropy_cov_high", "entropy_method", ("clip-cov",)),
    ("siren_anchor", "entropy_method", ("siren",)),
    ("siren_anchor_estimate", "entropy_method", ("siren",)),
    ("rollout_correction_max", "rollout_correction", ROLLOUT_CORRECTIONS[1:]),
    ("rollout_correction_min", "rollout_correction", ("token-mask", "sequence-mask")),
)
_BY_TRAINING_ENTROPIES = ("none", "naive", "adaptive", "siren", "entropy-constraint")
"""Methods that need no entropies before the training's own forward pass, but for their anchor."""
_WITHOUT_COEFF = ("none", "high-entropy-tokens", "clip-cov")


def check_methods(
    grpo: GrpoOptions,
    entropy: EntropyOptions,
    correction: CorrectionOptions,
    *,
    group_size: int,
    max_response: int,
) -> None:
    """Refuse options of the losses that contradict each other; one option that does nothing is one, too.

    Args:
        group_size: `--rollout-num-samples`.
        max_response: `--rollout-max-response-length`, in tokens.

    Raises:
        ValueError: one line that names both flags.
    """
    values: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for group in (grpo, entropy, correction):
        for field in dataclasses.fields(group):
            values[field.name], defaults[field.name] = getattr(group, field.name), field.default
    for name, other, allowed in _NEEDS:
        if values[name] != defaults[name] and values[other] not in allowed:
            raise ValueError(
                f"{_shown(name, values[name])} has no meaning with {_shown(other, values[other])}"
            )
    _check_grpo(grpo, group_size, max_response)
    _check_entropy(entropy)
    if correction.rollout_logprobs_as_old:
        _check_without_pass(entropy, correction)


def _check_without_pass(entropy: EntropyOptions, correction: CorrectionOptions) -> None:
    if entropy.entropy_method not in _BY_TRAINING_ENTROPIES:
        raise ValueError(
            f"--entropy-method {entropy.entropy_method} chooses tokens by the log-prob pass, which "
            "--rollout-logprobs-as-old leaves out"
        )
    if correction.rollout_correction != "none":
        raise ValueError(
            f"--rollout-correction {correction.rollout_correction} has no meaning with "
            "--rollout-logprobs-as-old: the trainer's old log-probs are not computed"
        )
    if entropy.entropy_refresh:
        raise ValueError("--entropy-refresh has no meaning with --rollout-logprobs-as-old")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag(name) if value else flag("no_" + name)
    return f"{flag(name)} {value}"


def _check_grpo(grpo: GrpoOptions, group_size: int, max_response: int) -> None:
    if 0 < grpo.grpo_dual_clip <= 1:
        raise ValueError("--grpo-dual-clip must be greater than 1, or 0 for none")
    if grpo.grpo_normalize_std and grpo.grpo_advantage_estimator != "grpo":
        raise ValueError(
            f"--grpo-normalize-std contradicts --grpo-advantage-estimator {grpo.grpo_advantage_estimator}"
        )
    if group_size == 1:
        raise ValueError(
            "--rollout-num-samples 1 leaves every advantage 0 with --grpo-advantage-estimator "
            f"{grpo.grpo_advantage_estimator}"
        )
    if grpo.grpo_kl_coeff == 0:
        for name in ("grpo_kl_estimator", "grpo_kl_in"):
            if getattr(grpo, name) != GrpoOptions.__dataclass_fields__[name].default:
                raise ValueError(f"{_shown(name, getattr(grpo, name))} has no meaning with --grpo-kl-coeff 0")
    if grpo.grpo_overlong_buffer >= max_response:
        raise ValueError(
            f"--grpo-overlong-buffer {grpo.grpo_overlong_buffer} is not less than "
            f"--rollout-max-response-length {max_response}"
        )
    if grpo.grpo_overlong_penalty != 1.0 and grpo.grpo_overlong_buffer == 0:
        raise ValueError(
            f"--grpo-overlong-penalty {grpo.grpo_overlong_penalty} has no meaning with "
            "--grpo-overlong-buffer 0"
        )
    if grpo.grpo_overlong_buffer and grpo.grpo_mask_truncated:
        raise ValueError(
            "--grpo-overlong-buffer penalises long responses, --grpo-mask-truncated drops them: choose one"
        )


def _check_entropy(entropy: EntropyOptions) -> None:
    method = entropy.entropy_method
    for name in ("siren_peak_quantile", "entropy_token_quantile"):
        if getattr(entropy, name) >= 1:
            raise ValueError(f"{flag(name)} must be less than 1 (no position would count)")
    if entropy.entropy_coeff and method in _WITHOUT_COEFF:
        raise ValueError(
            f"--entropy-coeff {entropy.entropy_coeff} has no meaning with --entropy-method {method}"
        )
    if entropy.entropy_coeff_schedule != "constant" and method in (
        *_WITHOUT_COEFF,
        "adaptive",
        "entropy-constraint",
    ):
        why = "has no coefficient" if method in _WITHOUT_COEFF else "sets the coefficient itself"
        raise ValueError(
            f"--entropy-coeff-schedule {entropy.entropy_coeff_schedule} contradicts "
            f"--entropy-method {method}, which {why}"
        )
    if entropy.entropy_cov_low >= entropy.entropy_cov_high:
        raise ValueError(
            f"--entropy-cov-low {entropy.entropy_cov_low} is not less than "
            f"--entropy-cov-high {entropy.entropy_cov_high}"
        )
    if method == "siren" and not entropy.siren_anchor:
        if entropy.siren_anchor_estimate == "microbatch":
            raise ValueError("--siren-anchor-estimate microbatch has no meaning with --no-siren-anchor")
        if entropy.entropy_target is not None:
            raise ValueError(
                f"--entropy-target {entropy.entropy_target} has no meaning with --no-siren-anchor"
            )
    if entropy.entropy_refresh and entropy.siren_anchor_estimate == "microbatch":
        raise ValueError("--entropy-refresh has no meaning with --siren-anchor-estimate microbatch")
