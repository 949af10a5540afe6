"""Whether vLLM serves the policy that is trained: both compute the log-probs of the same tokens."""

from __future__ import annotations

import math

from torch import Tensor

from siren_megatron.rollout.server import RolloutError


def check_logprobs(
    ours: Tensor, theirs: Tensor, mask: Tensor, *, tolerance: float, step: int, when: str
) -> float:
    """Largest |log-prob difference| of vLLM and the trainer, in nats.

    Every rank holds the same tensors, so all of them stop together. The trainer's own NaN is no matter of
    vLLM's: the update that meets it is skipped. NaN where nothing can be compared.

    Args:
        ours, theirs: [N, S] log-probs of the trainer and of vLLM.
        mask: [N, S] bool, what to compare.
        tolerance: largest mean |difference|, in nats.
        step, when: for the message.

    Raises:
        RolloutError: they differ by more.
    """
    difference = (ours - theirs).abs()[mask & ours.isfinite()]
    if not difference.numel():
        return math.nan
    mean, largest = float(difference.mean()), float(difference.max())
    if not mean <= tolerance:
        raise RolloutError(
            f"step {step}: after the {when} vLLM's and the trainer's log-probs differ by {mean:.3g} "
            f"nats on average (largest {largest:.3g}), more than --rollout-logprob-tolerance "
            f"{tolerance:g}: vLLM serves another policy than the one that is trained"
        )
    return largest
