"""Estimators of KL(policy || reference) from the sampled tokens' log-probs, as pure functions.

Legend: B = responses, S = positions; x = reference log-prob - policy log-prob of the sampled token, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 20.0
"""x is held within ±20 nats: exp overflows fp32 at 88, and nothing sensible is that far."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL of each token: k1 = -x, k2 = x² / 2, k3 = e^x - 1 - x.

    k1 and k3 have the KL as their mean under the policy. As a term of a loss, on policy, k2 has the gradient
    of KL(policy || reference), k3 that of KL(reference || policy), and k1's has mean 0 (docs/methods.md).

    Args:
        logprobs: [...] of the policy.
        ref_logprobs: [...] of the reference.
        estimator: "k1", "k2" or "k3".

    Returns:
        [...] in nats.

    References: http://joschu.net/blog/kl-approx.html.
    """
    x = (ref_logprobs - logprobs).clamp(-LIMIT, LIMIT)
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    if estimator == "k3":
        return x.expm1() - x
    raise ValueError(f"--grpo-kl-estimator {estimator} is unknown")


def response_kl(logprobs: Tensor, ref_logprobs: Tensor, loss_mask: Tensor, estimator: str) -> Tensor:
    """[B] KL of each response in nats: the sum over its tokens (`--grpo-kl-in reward`)."""
    kl = kl_estimate(logprobs, ref_logprobs, estimator)
    return torch.where(loss_mask, kl, torch.zeros_like(kl)).double().sum(dim=1).float()
