"""What flows through a step: samples from the rollout, groups of them, and the tensors the trainer eats.

Legend: B = responses of a micro-batch, S = padded sequence length (prompt + response),
N = responses of an optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One response of one prompt, as the rollout engine produced it.

    Args:
        prompt_ids: token ids of the prompt.
        response_ids: token ids of the response, the end-of-sequence token included when it was sampled.
        rollout_logprobs: natural-log probability of each response token under the distribution it was
            sampled from (temperature applied), one per response token.
        finish_reason: "stop" (end of sequence) or "length" (cut at the token budget).
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: str
