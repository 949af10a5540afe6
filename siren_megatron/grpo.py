"""GRPO: group advantages and the clipped surrogate, as pure functions.

Legend: N = responses of an optimizer step (over all ranks), B = responses of a micro-batch, S = positions.
`loss_mask` is true where the label is a token of the response. Losses and metrics are SUMS with global
counts in the denominator: adding them over micro-batches and ranks gives the value of the whole step.

Departures from textbook GRPO (arXiv 2402.03300), each an option:
- advantages are not divided by the group's standard deviation (Dr. GRPO, arXiv 2503.20783);
- token losses are summed and divided by the maximum response length, not by the response's own length;
- the ratio of tokens with negative advantage is bounded (dual clip, arXiv 1912.09729, equation 5);
- there is no KL term to a reference model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossScale:
    """Global counts of one optimizer step, over all micro-batches and data-parallel ranks."""

    num_responses: int
    num_tokens: int
    max_response_length: int


def group_advantages(rewards: Tensor, group_size: int, *, normalize_std: bool = False) -> Tensor:
    """A_i = R_i - mean of its group, optionally divided by the group's standard deviation.

    Args:
        rewards: [N] one reward a response, the responses of a prompt side by side.
        group_size: responses of one prompt.
        normalize_std: divide by the (unbiased) standard deviation + 1e-6, as GRPO does.

    Returns:
        [N] fp32.

    Raises:
        ValueError: N is not a multiple of group_size.

    References: arXiv 2503.20783 (Dr. GRPO), section 3.2; arXiv 2402.03300, section 4.1.2.
    """
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not form groups of {group_size}")
    groups = rewards.double().view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_std:
        std = groups.std(dim=1, keepdim=True) if group_size > 1 else torch.zeros_like(groups)
        advantages = advantages / (std + 1e-6)
    return advantages.view(-1).float()


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
    # exp overflows fp32 at 88; a ratio of e^20 is far outside any clip.
    ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0).exp()
    plain = -ratio * advantages
    bounded = -ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high) * advantages
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip:
        ceiling = -dual_clip * advantages
        over = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(over, ceiling.expand_as(loss), loss), clipped | over
    return loss, clipped


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    scale: LossScale,
    loss_agg: str,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's policy loss, and of its metrics.

    Args:
        logprobs, old_logprobs: [B, S]; values outside loss_mask are ignored.
        advantages: [B].
        loss_mask: [B, S] bool.
        scale: global counts of the optimizer step.

    Returns:
        (loss, {"loss/policy", "clip_fraction", "kl_old_new"}): scalars that add up over micro-batches and
        ranks. kl_old_new is the k3 estimator mean(e^x - 1 - x), x = logprobs - old_logprobs, in nats
        (http://joschu.net/blog/kl-approx.html).
    """
    old_logprobs = torch.where(loss_mask, old_logprobs, logprobs.detach())
    token_loss, clipped = clipped_surrogate(
        logprobs,
        old_logprobs,
        advantages.unsqueeze(1),
        clip_ratio_low=clip_ratio_low,
        clip_ratio_high=clip_ratio_high,
        dual_clip=dual_clip,
    )
    loss = (token_weights(loss_mask, loss_agg, scale) * token_loss).sum()
    with torch.no_grad():
        tokens = max(scale.num_tokens, 1)
        x = (logprobs - old_logprobs).clamp(-20.0, 20.0)
        metrics = {
            "loss/policy": loss.detach(),
            "clip_fraction": (clipped & loss_mask).sum() / tokens,
            "kl_old_new": ((x.exp() - 1 - x) * loss_mask).sum() / tokens,
        }
    return loss, metrics
