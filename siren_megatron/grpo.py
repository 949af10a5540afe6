"""The policy loss: clipped surrogates of PPO, GSPO and CISPO, and the KL term, as pure functions.

Legend: N = responses of an optimizer step (over all ranks), B = responses of a micro-batch, S = positions.
`loss_mask` is true where the label is a token of the response. Losses and metrics are SUMS with global
counts in the denominator: adding them over micro-batches and ranks gives the value of the whole step.

Departures from textbook GRPO (arXiv 2402.03300), each an option:
- advantages are not divided by the group's standard deviation (Dr. GRPO, arXiv 2503.20783);
- token losses are summed and divided by the maximum response length, not by the response's own length;
- the ratio of tokens with negative advantage is bounded (dual clip, arXiv 1912.09729, equation 5);
- there is no KL term to a reference model (`--grpo-kl-coeff` adds one).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from siren_megatron.divergence import kl_estimate

LIMIT = 20.0
"""Log-ratios are held within ±20 nats: exp overflows fp32 at 88, and e^20 is far outside any clip."""


@dataclass(frozen=True)
class LossScale:
    """Global counts of one optimizer step, over all micro-batches and data-parallel ranks."""

    num_responses: int
    num_tokens: int
    max_response_length: int


def token_weights(loss_mask: Tensor, loss_agg: str, scale: LossScale) -> Tensor:
    """Weight w of every token, so that the step's loss is the sum of w times the token losses.

    Args:
        loss_mask: [B, S] bool.
        loss_agg: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" or "seq-mean-token-sum-norm".
        scale: global counts of the optimizer step.

    Returns:
        [B, S] fp32, 0 outside loss_mask.
    """
    mask = loss_mask.float()
    if loss_agg == "token-mean":
        return mask / max(scale.num_tokens, 1)
    if loss_agg == "seq-mean-token-mean":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / scale.num_responses
    if loss_agg == "seq-mean-token-sum":
        return mask / scale.num_responses
    if loss_agg == "seq-mean-token-sum-norm":
        return mask / (scale.num_responses * scale.max_response_length)
    raise ValueError(f"--loss-agg {loss_agg} is unknown")


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """max(-r·A, -clip(r, 1-low, 1+high)·A) with r = exp(logprobs - old_logprobs), a loss for each token.

    For A < 0 the loss is at most -dual_clip·A, so that a ratio that ran away cannot dominate a step.

    Args:
        logprobs: [B, S] of the policy that is trained, with gradient.
        old_logprobs: [B, S] of the policy at the start of the step.
        advantages: [B, S] or broadcastable, e.g. [B, 1].
        clip_ratio_low, clip_ratio_high: epsilons of the clip.
        dual_clip: bound of the ratio where A < 0; 0 = none.

    Returns:
        (loss [B, S], clipped [B, S] bool: the clip decides the loss and the gradient is zero there).

    References: arXiv 1707.06347 (PPO), equation 7; arXiv 1912.09729 (dual clip), equation 5.
    """
    ratio = (logprobs - old_logprobs).clamp(-LIMIT, LIMIT).exp()
    return clip_ratio(
        ratio,
        advantages,
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        dual_clip=dual_clip,
    )


def clip_ratio(
    ratio: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The surrogate of `clipped_surrogate` from a ratio [B, S]."""
    plain = -ratio * advantages
    bounded = -ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high) * advantages
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip:
        ceiling = -dual_clip * advantages
        over = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(over, ceiling.expand_as(loss), loss), clipped | over
    return loss, clipped


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """GSPO's ratio of a response, spread over its tokens: s_i · exp(logp - stopgrad(logp)).

    s_i = exp(mean over the response of (logprobs - old_logprobs)). Each token's value is s_i; the gradient of
    their mean is that of s_i (GSPO-token with one advantage a response).

    Args:
        logprobs: [B, S], with gradient; whole responses.
        old_logprobs: [B, S].
        loss_mask: [B, S] bool.

    Returns:
        [B, S]

    References: arXiv 2507.18071 (GSPO), equations 7 and 14.
    """
    x = torch.where(loss_mask, (logprobs - old_logprobs).detach(), torch.zeros_like(logprobs))
    mean = x.sum(dim=1, keepdim=True) / loss_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.clamp(-LIMIT, LIMIT).exp() * (logprobs - logprobs.detach()).exp()


def clipped_importance(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> tuple[Tensor, Tensor]:
    """CISPO: -stopgrad(clip(r, 1 - low, 1 + high))·A·logprobs: weights are clipped, no gradient is lost.

    Args and returns: as `clipped_surrogate`; "clipped" marks tokens whose weight the clip changed.

    References: arXiv 2506.13585 (MiniMax-M1), equations 4 and 5.
    """
    ratio = (logprobs - old_logprobs).detach().clamp(-LIMIT, LIMIT).exp()
    weight = ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    return -weight * advantages * logprobs, weight != ratio


@dataclass(frozen=True)
class PolicyLossOptions:
    """`--grpo-...` as plain values; see `method_options.GrpoOptions`."""

    policy_loss: str = "ppo"
    loss_agg: str = "seq-mean-token-sum-norm"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    dual_clip: float = 0.0
    kl_coeff: float = 0.0
    kl_estimator: str = "k3"


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    scale: LossScale,
    options: PolicyLossOptions,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's policy loss, and of its metrics.

    L = sum over tokens of w_agg · (weights · surrogate + kl_coeff · KL).

    Args:
        logprobs, old_logprobs: [B, S]; values outside loss_mask are ignored.
        advantages: [B, S].
        loss_mask: [B, S] bool.
        scale: global counts of the optimizer step.
        weights: [B, S] constants on the tokens' surrogates, not on the KL; None = 1.
        ref_logprobs: [B, S] of the reference, needed for kl_coeff > 0.

    Returns:
        (loss, {"loss/policy", "clip_fraction", "kl_old_new"[, "loss/kl", "kl_ref"]}): scalars that add up
        over micro-batches and ranks. kl_old_new is the k3 estimate of KL(old || new), in nats a token
        (http://joschu.net/blog/kl-approx.html); kl_ref is that of --grpo-kl-estimator.
    """
    old_logprobs = torch.where(loss_mask, old_logprobs, logprobs.detach())
    token_loss, clipped = token_losses(logprobs, old_logprobs, advantages, loss_mask, options)
    if weights is not None:
        token_loss = token_loss * weights
    aggregation = token_weights(loss_mask, options.loss_agg, scale)
    loss = (aggregation * token_loss).sum()
    tokens = max(scale.num_tokens, 1)
    with torch.no_grad():
        x = (logprobs - old_logprobs).clamp(-LIMIT, LIMIT)
        metrics = {
            "loss/policy": loss.detach(),
            "clip_fraction": (clipped & loss_mask).sum() / tokens,
            "kl_old_new": ((x.expm1() - x) * loss_mask).sum() / tokens,
        }
    if options.kl_coeff:
        ref_logprobs = torch.where(loss_mask, ref_logprobs, logprobs.detach())
        kl = kl_estimate(logprobs, ref_logprobs, options.kl_estimator)
        kl_loss = options.kl_coeff * (aggregation * kl).sum()
        metrics["loss/kl"] = kl_loss.detach()
        metrics["kl_ref"] = (kl.detach() * loss_mask).sum() / tokens
        loss = loss + kl_loss
    return loss, metrics


def token_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, options: PolicyLossOptions
) -> tuple[Tensor, Tensor]:
    """(loss, clipped) of each token by `options.policy_loss`, as `clipped_surrogate` returns them.

    Args:
        logprobs, old_logprobs, advantages: [B, S].
        loss_mask: [B, S] bool.
    """
    clip = {"clip_ratio_low": options.clip_ratio_low, "clip_ratio_high": options.clip_ratio_high}
    if options.policy_loss == "cispo":
        return clipped_importance(logprobs, old_logprobs, advantages, **clip)
    if options.policy_loss == "gspo":
        ratio = sequence_ratio(logprobs, old_logprobs, loss_mask)
        return clip_ratio(ratio, advantages, **clip)
    if options.policy_loss == "ppo":
        return clipped_surrogate(logprobs, old_logprobs, advantages, dual_clip=options.dual_clip, **clip)
    raise ValueError(f"--grpo-policy-loss {options.policy_loss} is unknown")
