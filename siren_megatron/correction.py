"""Rollout correction: weights for tokens that another engine sampled than the one that trains.

Legend: N = responses of a rollout, S = positions. The rollout engine and the trainer hold the same weights
but not the same kernels: in bf16 their log-probs differ by 0.01 to 0.1 nats a token. Tokens were drawn from
the engine's distribution, so their policy gradient wants the weight w = p_trainer / p_engine.
Every rank holds all N responses: weights and metrics, the largest ratio included, are the same in any layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 20.0


def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    mode: str,
    maximum: float,
    minimum: float,
) -> tuple[Tensor, dict[str, float]]:
    """A constant weight for every token's policy loss, and what the ratios look like.

    With w = exp(old - rollout) of a token, or exp of the sum over its response ("sequence-..."):
    "...-truncate": min(w, maximum); "...-mask": w where minimum <= w <= maximum, else 0.

    Args:
        old_logprobs, rollout_logprobs: [N, S] of trainer and engine, same weights; outside loss_mask ignored.
        loss_mask: [N, S] bool.
        mode: "none" (weights 1), "token-truncate", "sequence-truncate", "token-mask" or "sequence-mask".
        maximum, minimum: bounds of the ratio.

    Returns:
        (weights [N, S] fp32, 0 outside loss_mask;
        metrics, before any bound: "rollout_ratio/mean" and "/max" of w, "/effective_samples" =
        (sum w)² / (n sum w²) over tokens or responses (1 = as good as n samples), "/kl" = k3 estimate of
        KL(engine || trainer) in nats a token, and "/bounded" = the share that the bounds touch).

    References: truncated importance sampling: Ionides 2008, and Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"; token masks: IcePop, arXiv 2510.18855.
    """
    log_ratio = torch.where(loss_mask, old_logprobs - rollout_logprobs, 0.0).double().clamp(-LIMIT, LIMIT)
    if mode.startswith("sequence"):
        ratio = log_ratio.sum(dim=1, keepdim=True).clamp(-LIMIT, LIMIT).exp()
        counted = ratio.flatten()
    else:
        ratio = log_ratio.exp()
        counted = ratio[loss_mask]
    if mode == "none":
        weights, bounded = torch.ones_like(ratio), torch.zeros_like(counted)
    elif mode.endswith("truncate"):
        weights, bounded = ratio.clamp(max=maximum), counted > maximum
    elif mode.endswith("mask"):
        inside = (ratio >= minimum) & (ratio <= maximum)
        weights, bounded = ratio * inside, (counted < minimum) | (counted > maximum)
    else:
        raise ValueError(f"--rollout-correction {mode} is unknown")
    x = log_ratio[loss_mask]
    metrics = {
        "rollout_ratio/mean": float(counted.mean()),
        "rollout_ratio/max": float(counted.max()),
        "rollout_ratio/effective_samples": float(
            counted.sum().square() / (counted.numel() * counted.square().sum())
        ),
        "rollout_ratio/kl": float((x.expm1() - x).mean()),
        "rollout_ratio/bounded": float(bounded.double().mean()),
    }
    return (weights * loss_mask).float(), metrics
