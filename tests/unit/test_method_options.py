"""Contradictions of loss options are refused with a line that names both flags."""

import pytest

from siren_megatron.method_options import CorrectionOptions, EntropyOptions, GrpoOptions, check_methods


def check(group_size=8, max_response=100, **options):
    groups = {}
    for cls in (GrpoOptions, EntropyOptions, CorrectionOptions):
        own = {n: options.pop(n) for n in list(options) if n in cls.__dataclass_fields__}
        groups[cls] = cls(**own)
    assert not options
    check_methods(*groups.values(), group_size=group_size, max_response=max_response)


WRONG = [
    ({"grpo_policy_loss": "gspo", "grpo_dual_clip": 2.0}, "--grpo-dual-clip 2.0", "--grpo-policy-loss gspo"),
    ({"grpo_dual_clip": 0.5}, "--grpo-dual-clip must be greater than 1", ""),
    ({"grpo_normalize_std": True, "grpo_advantage_estimator": "dr-grpo"}, "--grpo-normalize-std", "dr-grpo"),
    ({"grpo_normalize_std": True, "grpo_advantage_estimator": "rloo"}, "--grpo-normalize-std", "rloo"),
    (
        {"entropy_method": "kl-cov", "rollout_logprobs_as_old": True},
        "--entropy-method kl-cov",
        "--rollout-logprobs-as-old",
    ),
    (
        {"rollout_correction": "token-mask", "rollout_logprobs_as_old": True},
        "--rollout-correction token-mask",
        "--rollout-logprobs-as-old",
    ),
    (
        {"entropy_refresh": True, "rollout_logprobs_as_old": True},
        "--entropy-refresh",
        "--rollout-logprobs-as-old",
    ),
    ({"group_size": 1}, "--rollout-num-samples 1", "--grpo-advantage-estimator grpo"),
    ({"grpo_kl_estimator": "k1"}, "--grpo-kl-estimator k1", "--grpo-kl-coeff 0"),
    ({"grpo_kl_in": "reward"}, "--grpo-kl-in reward", "--grpo-kl-coeff 0"),
    ({"grpo_overlong_buffer": 100}, "--grpo-overlong-buffer 100", "--rollout-max-response-length 100"),
    ({"grpo_overlong_penalty": 2.0}, "--grpo-overlong-penalty 2.0", "--grpo-overlong-buffer 0"),
    (
        {"grpo_overlong_buffer": 9, "grpo_mask_truncated": True},
        "--grpo-overlong-buffer",
        "--grpo-mask-truncated",
    ),
    (
        {"grpo_dynamic_sampling_max_rounds": 3},
        "--grpo-dynamic-sampling-max-rounds 3",
        "--no-grpo-dynamic-sampling",
    ),
    ({"entropy_method": "none", "entropy_coeff": 0.1}, "--entropy-coeff 0.1", "--entropy-method none"),
    (
        {"entropy_method": "clip-cov", "entropy_coeff": 0.1},
        "--entropy-coeff 0.1",
        "--entropy-method clip-cov",
    ),
    ({"entropy_coeff_final": 0.1}, "--entropy-coeff-final 0.1", "--entropy-coeff-schedule constant"),
    (
        {"entropy_method": "adaptive", "entropy_coeff_schedule": "cosine"},
        "--entropy-coeff-schedule cosine",
        "--entropy-method adaptive",
    ),
    (
        {"entropy_method": "high-entropy-tokens", "entropy_coeff_schedule": "linear"},
        "--entropy-coeff-schedule linear",
        "high-entropy-tokens",
    ),
    ({"entropy_method": "naive", "entropy_target": 1.0}, "--entropy-target 1.0", "--entropy-method naive"),
    ({"entropy_rate": 0.1}, "--entropy-rate 0.1", "--entropy-method siren"),
    ({"entropy_advantage_kappa": 2.0}, "--entropy-advantage-kappa 2.0", "--entropy-method siren"),
    ({"entropy_token_quantile": 0.5}, "--entropy-token-quantile 0.5", "--entropy-method siren"),
    (
        {"entropy_method": "high-entropy-tokens", "entropy_token_quantile": 1.0},
        "--entropy-token-quantile must be less than 1",
        "",
    ),
    ({"entropy_cov_fraction": 0.1}, "--entropy-cov-fraction 0.1", "--entropy-method siren"),
    (
        {"entropy_method": "kl-cov", "entropy_cov_low": 2.0},
        "--entropy-cov-low 2.0",
        "--entropy-method kl-cov",
    ),
    (
        {"entropy_method": "clip-cov", "entropy_cov_low": 6.0},
        "--entropy-cov-low 6.0",
        "--entropy-cov-high 5.0",
    ),
    ({"entropy_method": "naive", "siren_anchor": False}, "--no-siren-anchor", "--entropy-method naive"),
    (
        {"entropy_method": "naive", "siren_anchor_estimate": "microbatch"},
        "--siren-anchor-estimate microbatch",
        "--entropy-method naive",
    ),
    (
        {"siren_anchor": False, "siren_anchor_estimate": "microbatch"},
        "--siren-anchor-estimate microbatch",
        "--no-siren-anchor",
    ),
    ({"siren_anchor": False, "entropy_target": 1.0}, "--entropy-target 1.0", "--no-siren-anchor"),
    (
        {"entropy_refresh": True, "siren_anchor_estimate": "microbatch"},
        "--entropy-refresh",
        "--siren-anchor-estimate microbatch",
    ),
    ({"rollout_correction_max": 3.0}, "--rollout-correction-max 3.0", "--rollout-correction none"),
    (
        {"rollout_correction": "token-truncate", "rollout_correction_min": 0.1},
        "--rollout-correction-min 0.1",
        "--rollout-correction token-truncate",
    ),
]


@pytest.mark.parametrize(
    ("options", "first", "second"), WRONG, ids=[" ".join(map(str, o)) for o, _, _ in WRONG]
)
def test_contradictions_name_both_flags(options, first, second):
    with pytest.raises(ValueError) as error:
        check(**options)
    assert first in str(error.value) and second in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"entropy_method": "none"},
        {"entropy_method": "none", "entropy_coeff": 0.0},
        {"entropy_method": "adaptive", "entropy_coeff": 0.01, "entropy_target": 0.3, "entropy_rate": 0.01},
        {"entropy_method": "paec", "entropy_target": 0.3, "entropy_coeff_schedule": "cosine"},
        {"siren_anchor": False, "siren_peak_quantile": 0.0, "entropy_top_p": 1.0},
        {"grpo_normalize_std": True, "grpo_kl_coeff": 0.01, "grpo_kl_in": "reward"},
        {"grpo_policy_loss": "cispo", "grpo_dynamic_sampling": True, "grpo_dynamic_sampling_max_rounds": 2},
        {"rollout_correction": "sequence-mask", "rollout_correction_min": 0.1, "rollout_correction_max": 9.0},
    ],
)
def test_sensible_combinations_pass(options):
    check(**options)
