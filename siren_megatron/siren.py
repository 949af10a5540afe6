"""SIREN (arXiv 2509.25133): peak-entropy mask, aggregation and self-anchored penalty, as pure functions.

Legend: N = responses of an optimizer step (over all ranks), B = responses of a micro-batch, S = positions,
H_t = top-p entropy of position t in nats (`vocab_parallel.py`).

How this differs from the code released with the paper:
- the peak mask is combined with the response mask: prompts and padding are never selected and never logged;
- the penalty's factor is a constant of the whole optimizer step, so that the gradient is the same for every
  micro-batch size and parallel layout (`--siren-anchor-estimate microbatch` is the released behaviour);
- the anchor is kept in every checkpoint, and a missing one is an error, not 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def peak_entropy_mask(entropy: Tensor, loss_mask: Tensor, quantile: float) -> Tensor:
    """S_i = {t in response i: H_t > tau_i}, tau_i = the response's own quantile of H (linear interpolation).

    Args:
        entropy: [B, S] H_t; values outside loss_mask are ignored.
        loss_mask: [B, S] bool, the positions of the responses.
        quantile: in [0, 1); 0 = no peak mask, every position of the response counts.

    Returns:
        [B, S] bool, a constant for the gradient. Empty for a response whose entropies are all equal.

    References: arXiv 2509.25133, section 4; `torch.quantile` (interpolation="linear").
    """
    if quantile == 0:
        return loss_mask
    entropy = entropy.detach()
    lengths = loss_mask.sum(dim=1)
    ordered = entropy.masked_fill(~loss_mask, float("inf")).sort(dim=1).values
    rank = quantile * (lengths - 1).clamp(min=0).to(entropy.dtype)
    below = rank.floor().long().unsqueeze(1)
    above = rank.ceil().long().unsqueeze(1)
    weight = (rank - rank.floor()).unsqueeze(1)
    threshold = torch.lerp(ordered.gather(1, below), ordered.gather(1, above), weight)
    return loss_mask & (entropy > threshold)


def masked_entropy(entropy: Tensor, mask: Tensor) -> Tensor:
    """h_i = mean of H_t over the selected positions; 0 where nothing is selected.

    Args:
        entropy: [B, S], with gradient.
        mask: [B, S] bool, from `peak_entropy_mask`.

    Returns:
        [B]
    """
    selected = torch.where(mask, entropy, torch.zeros_like(entropy))
    return selected.sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def anchored_penalty(entropy: Tensor, *, coeff: float, anchor: float) -> Tensor:
    """beta·(H - H_0)².

    Args:
        entropy: H in nats, the mean of h_i over the responses of the optimizer step.
        coeff: beta.
        anchor: H_0 in nats, of the initial policy on the first rollout.

    References: arXiv 2509.25133, section 4 (self-anchored regularisation).
    """
    return coeff * (entropy - anchor).square()
