"""Every method and every option of the losses, trained on the same rollouts in any layout.

`METHOD_LAYOUTS` is a plain dict {ranks: [Layout]} and `CASES` one of options: extend either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from layouts import GROUP_SIZE, MAX_RESPONSE, Layout, config_of, fixed_samples

from siren_megatron.batch import make_batch
from siren_megatron.config import read_hf_config

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, PACKED = "num_virtual_stages_per_pipeline_rank", "max_tokens_per_microbatch"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
SP = {TP: 2, "sequence_parallel": True}
METHOD_LAYOUTS: dict[int, list[Layout]] = {
    1: [
        Layout("one rank", {}),
        Layout("micro-batch 1", {"micro_batch_size": 1}),
        Layout("packed", {PACKED: 64}),
        Layout("recomputed", {"recompute_granularity": "full"}),
    ],
    2: [
        Layout("TP=2 SP", {**SP, "micro_batch_size": 2}),
        Layout("PP=2", {PP: 2, "micro_batch_size": 2}),
        Layout("DP=2 packed", {PACKED: 64}),
        Layout("CP=2", {CP: 2}),
        Layout("PP=2 VPP=2 packed", {PP: 2, VPP: 2, PACKED: 64}),
    ],
    4: [
        Layout("TP=2 PP=2", {TP: 2, PP: 2, "micro_batch_size": 4}),
        Layout("TP=2 SP CP=2 packed", {**SP, CP: 2, PACKED: 64}),
        Layout("PP=2 VPP=2 DP=2", {PP: 2, VPP: 2, "micro_batch_size": 2}),
        Layout("DP=4", {"micro_batch_size": 2}),
    ],
}
EXPERT_LAYOUTS: dict[int, list[Layout]] = {
    1: [Layout("one rank", {})],
    2: [Layout("EP=2 packed", {EP: 2, PACKED: 64}), Layout("EP=2 CP=2", {EP: 2, CP: 2})],
    4: [
        Layout("EP=2 TP=2 SP", {EP: 2, ETP: 1, **SP, "micro_batch_size": 2}),
        Layout("EP=2 PP=2", {EP: 2, PP: 2, "micro_batch_size": 2}),
    ],
}
_COV = {"entropy_cov_fraction": 0.1, "entropy_cov_low": 0.02}
CASES: dict[str, dict[str, Any]] = {
    "none": {"entropy_method": "none", "entropy_coeff": None},
    "naive": {"entropy_method": "naive", "entropy_coeff_schedule": "cosine", "num_steps": 3},
    "adaptive": {"entropy_method": "adaptive", "entropy_rate": 0.05},
    "entropy-advantage": {"entropy_method": "entropy-advantage"},
    "high-entropy-tokens": {"entropy_method": "high-entropy-tokens", "entropy_coeff": None},
    "clip-cov": {"entropy_method": "clip-cov", "entropy_coeff": None, **_COV},
    "kl-cov": {"entropy_method": "kl-cov", "entropy_cov_fraction": 0.1},
    "siren": {"entropy_method": "siren"},
    "siren, refreshed": {"entropy_method": "siren", "entropy_refresh": True},
    "siren, no anchor": {"entropy_method": "siren", "siren_anchor": False},
    "siren, anchor alone": {"entropy_method": "siren", "siren_peak_quantile": 0.0, "entropy_top_p": 1.0},
    "entropy-constraint": {"entropy_method": "entropy-constraint", "entropy_rate": 0.05},
    # At top-p 0.8 one token of these rollouts lies on the nucleus's very edge, and rounding decides for it.
    "paec": {"entropy_method": "paec", "entropy_top_p": 0.7},
    "gspo, kl k3": {
        "grpo_policy_loss": "gspo",
        "grpo_clip_ratio_low": 0.003,
        "grpo_clip_ratio_high": 0.004,
        "grpo_kl_coeff": 0.1,
    },
    "cispo, rloo, 2 epochs": {
        "grpo_policy_loss": "cispo",
        "grpo_advantage_estimator": "rloo",
        "loss_agg": "token-mean",
        "grpo_epochs": 2,
    },
    "kl k1 in reward, reinforce++": {
        "grpo_kl_coeff": 0.1,
        "grpo_kl_estimator": "k1",
        "grpo_kl_in": "reward",
        "grpo_advantage_estimator": "reinforce++-baseline",
        "rollout_correction": "token-truncate",
    },
    "sequence masks, truncated out": {
        "rollout_correction": "sequence-mask",
        "rollout_correction_min": 1e-8,
        "rollout_correction_max": 1e8,
        "grpo_mask_truncated": True,
        "grpo_kl_coeff": 0.1,
        "grpo_kl_estimator": "k2",
        "loss_agg": "seq-mean-token-mean",
    },
}
EXPERT_CASES = {name: case for name, case in CASES.items() if case.get("entropy_method") == name}
"""The entropy methods themselves, without the variants."""
COMMON = {"global_batch_size": 8, "lr": 1e-3, "lr_warmup_steps": 0}
"""16 responses: two optimizer steps a rollout."""
ANCHOR_OFFSET = 0.4  # nats above the initial policy's entropy, so that every penalty has a gradient


def train_case(checkpoint: Path, layout: Layout, case: dict[str, Any]):
    """Two rollout steps of two optimizer steps each; (metrics of both, weights, coefficient state)."""
    from siren_megatron import platform
    from siren_megatron.advantages import assign_advantages
    from siren_megatron.trainer import Trainer

    config = config_of(checkpoint, **{**COMMON, **layout.options, **case})
    trainer = Trainer(config, read_hf_config(checkpoint), platform.install())
    samples, rewards = fixed_samples()
    batch = make_batch(samples, rewards, torch.zeros_like(rewards), multiple=trainer.length_multiple)
    batch = batch.replace(truncated=torch.arange(len(samples)) % 5 == 0)
    history, anchor, first = [], None, None
    for step in range(2):
        batch = trainer.compute_logprobs(batch)
        first = batch.old_logprobs if first is None else first
        if trainer.reference is not None:
            policy = [p.detach().clone() for p in trainer.chunks[0].parameters()]
            batch = trainer.compute_ref_logprobs(batch)
            # Collectives and kernels may round differently from pass to pass: not bit for bit.
            torch.testing.assert_close(batch.ref_logprobs, first, rtol=1e-5, atol=1e-5)
            back = zip(trainer.chunks[0].parameters(), policy, strict=True)
            assert all(torch.equal(now, before) for now, before in back), "the policy's own weights are back"
        if anchor is None:
            anchor = trainer.entropy.measure(batch) + ANCHOR_OFFSET
        batch = assign_advantages(batch, config.grpo, group_size=GROUP_SIZE, max_response_length=MAX_RESPONSE)
        history.append(trainer.update(batch, anchor, step=step))
    weights = {name: tensor.clone() for name, tensor in trainer.hf_weights()}
    return history, weights, trainer.entropy.state_dict()


def train_cases(rank: int, world_size: int, checkpoint: Path, layouts: list[Layout], cases: dict):
    """For `run_ranks`: {(layout, case): result}, all in the same processes."""
    from siren_megatron import platform

    platform.install()
    from megatron.core import parallel_state

    from siren_megatron.policy import initialize_model_parallel

    results = {}
    for layout in layouts:
        # Making process groups costs more than training a case: once a layout.
        initialize_model_parallel(config_of(checkpoint, **{**COMMON, **layout.options}))
        for name, case in cases.items():
            results[layout.name, name] = train_case(checkpoint, layout, case)
        parallel_state.destroy_model_parallel()
    return results
