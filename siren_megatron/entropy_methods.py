"""The entropy regularisers, one literal dict: `--entropy-method` names a row.

Legend: B = responses of a micro-batch, S = positions. A method is a pure function from `EntropyInputs` to
(loss, metrics); like the policy loss, both are shares that add up over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from siren_megatron import siren


@dataclass(frozen=True)
class EntropyInputs:
    """What a method may look at.

    Args:
        entropy: [B, S] full entropy in nats, with gradient.
        top_p_entropy: [B, S] entropy within the top-p mask, with gradient.
        loss_mask: [B, S] bool, the positions of the responses.
        coeff: `--entropy-coeff`.
        peak_quantile: `--siren-peak-quantile`.
        anchor: masked entropy of the initial policy, in nats.
        step_entropy: masked entropy over the optimizer step, from the log-prob pass; None = take the
            micro-batch's (`--siren-anchor-estimate microbatch`).
        num_responses: responses of the optimizer step, over all ranks.
    """

    entropy: Tensor
    top_p_entropy: Tensor
    loss_mask: Tensor
    coeff: float
    peak_quantile: float
    anchor: float
    step_entropy: float | None
    num_responses: int


def none(inputs: EntropyInputs) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Plain GRPO: no entropy term."""
    return None, {}


def siren_penalty(inputs: EntropyInputs) -> tuple[Tensor | None, dict[str, Tensor]]:
    """beta·(H - H_0)² of the entropies that both masks select (arXiv 2509.25133)."""
    mask = siren.peak_entropy_mask(inputs.top_p_entropy, inputs.loss_mask, inputs.peak_quantile)
    response_entropies = siren.masked_entropy(inputs.top_p_entropy, mask)
    loss = siren.anchored_penalty(
        response_entropies,
        coeff=inputs.coeff,
        anchor=inputs.anchor,
        num_responses=inputs.num_responses,
        step_entropy=inputs.step_entropy,
    )
    masked = response_entropies.detach().sum() / inputs.num_responses
    positions = torch.count_nonzero(mask) / inputs.num_responses
    return loss, {"siren/entropy_masked": masked, "siren/positions_per_response": positions}


EntropyMethod = Callable[[EntropyInputs], tuple[Tensor | None, dict[str, Tensor]]]

ENTROPY_METHODS: dict[str, EntropyMethod] = {
    "none": none,
    "siren": siren_penalty,
}
