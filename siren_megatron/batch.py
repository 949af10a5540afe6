"""What flows through a step: samples from the rollout, and the tensors the trainer eats.

Legend: N = responses of a rollout step or of one optimizer step, S = padded length (prompt + response).
Position t of a row holds token t and predicts token t + 1; everything per token (labels, masks, log-probs,
entropies) stands at the position that PREDICTS the token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One response of one prompt, as the rollout engine produced it.

    Args:
        prompt_ids: token ids of the prompt.
        response_ids: token ids of the response, the end-of-sequence token included when it was sampled.
        rollout_logprobs: natural-log probability of each response token under the distribution it was
            sampled from (temperature applied), one per response token; () where nobody asked for them.
        finish_reason: "stop" (end of sequence) or "length" (cut at the token budget).
        weight_version: training steps that the weights which made it had seen.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: str
    weight_version: int = 0


@dataclass(frozen=True)
class TrainBatch:
    """Responses as tensors, padded on the right; the same on every rank.

    Args:
        tokens: [N, S] int64.
        labels: [N, S] int64, tokens shifted left by one.
        loss_mask: [N, S] bool, true where the label is a token of the response.
        rollout_logprobs: [N, S] fp32 of the rollout engine, 0 outside loss_mask.
        old_logprobs: [N, S] fp32 of the policy at the start of the step, 0 outside loss_mask.
        entropy, top_p_entropy: [N, S] fp32 of the policy at the start of the step, 0 outside loss_mask.
        rewards, advantages: [N] fp32.
        truncated: [N] bool, the response was cut at the token budget.
        ref_logprobs: [N, S] fp32 of the reference model, 0 where there is none.
        top_two_gap: [N, S] fp32, log-prob of the likeliest token minus that of the second, of the policy at
            the start of the step; 0 unless the entropy method asks for it.
        token_advantages: [N, S] fp32, `advantages` after the entropy method's changes.
        token_weights: [N, S] fp32 constants on each token's policy loss: rollout correction and masks.
        entropy_weights: [N, S] fp32 constants by which the entropy method marks positions.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor
    entropy: Tensor
    top_p_entropy: Tensor
    rewards: Tensor
    advantages: Tensor
    truncated: Tensor
    ref_logprobs: Tensor
    top_two_gap: Tensor
    token_advantages: Tensor
    token_weights: Tensor
    entropy_weights: Tensor

    @property
    def num_responses(self) -> int:
        return self.tokens.size(0)

    @property
    def lengths(self) -> Tensor:
        """[N] response tokens of each response."""
        return self.loss_mask.sum(dim=1)

    @property
    def num_tokens(self) -> int:
        """Response tokens."""
        return int(self.loss_mask.sum())

    def replace(self, **tensors: Tensor) -> TrainBatch:
        return dataclasses.replace(self, **tensors)

    def rows(self, start: int, stop: int) -> TrainBatch:
        return TrainBatch(*(getattr(self, f.name)[start:stop] for f in dataclasses.fields(self)))

    def select(self, rows: Sequence[int]) -> TrainBatch:
        """The rows of the given numbers, in that order."""
        index = torch.tensor(rows, device=self.tokens.device)
        return TrainBatch(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))

    def trimmed(self, multiple: int) -> TrainBatch:
        """The same rows without the padding that they all share.

        Args:
            multiple: S stays a multiple of this.
        """
        longest = int(self.loss_mask.any(dim=0).nonzero().max()) + 2
        length = min(-(-longest // multiple) * multiple, self.tokens.size(1))
        columns = {
            f.name: getattr(self, f.name)[:, :length].contiguous()
            for f in dataclasses.fields(self)
            if getattr(self, f.name).dim() == 2
        }
        return self.replace(**columns)

    def to(self, device: torch.device) -> TrainBatch:
        return TrainBatch(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))


def make_batch(
    samples: Sequence[Sample], rewards: Tensor, advantages: Tensor, *, multiple: int
) -> TrainBatch:
    """Samples as padded tensors; log-probs and entropies of the policy are zero until the log-prob pass.

    Args:
        samples: N responses, those of a prompt side by side; none is empty.
        rewards, advantages: [N].
        multiple: S is rounded up to a multiple of this.
    """
    longest = max(len(s.prompt_ids) + len(s.response_ids) for s in samples)
    length = -(-longest // multiple) * multiple
    shape = (len(samples), length)
    tokens = torch.zeros(shape, dtype=torch.int64)
    labels = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    rollout_logprobs = torch.zeros(shape)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample.prompt_ids + sample.response_ids)
        # The last prompt token predicts the first response token.
        span = slice(len(sample.prompt_ids) - 1, len(ids) - 1)
        tokens[row, : len(ids)] = ids
        labels[row, : len(ids) - 1] = ids[1:]
        loss_mask[row, span] = True
        rollout_logprobs[row, span] = torch.tensor(sample.rollout_logprobs)
    zeros, advantages = torch.zeros(shape), advantages.float()
    return TrainBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        old_logprobs=zeros,
        entropy=zeros,
        top_p_entropy=zeros,
        rewards=rewards.float(),
        advantages=advantages,
        truncated=torch.tensor([s.finish_reason == "length" for s in samples]),
        ref_logprobs=zeros,
        top_two_gap=zeros,
        token_advantages=advantages.unsqueeze(1) * loss_mask,
        token_weights=loss_mask.float(),
        entropy_weights=zeros,
    )


def broadcast_batch(batch: TrainBatch | None, device: torch.device) -> TrainBatch:
    """Rank 0's batch on every rank.

    Args:
        batch: the batch on rank 0, None elsewhere.
    """
    shape = torch.zeros(2, dtype=torch.int64, device=device)
    if batch is not None:
        shape.copy_(torch.tensor(batch.tokens.shape))
    dist.broadcast(shape, src=0)
    rows, length = shape.tolist()
    kinds = {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.uint8,
        "truncated": torch.uint8,
    }
    received = {}
    for field in dataclasses.fields(TrainBatch):
        size = (rows,) if field.name in ("rewards", "advantages", "truncated") else (rows, length)
        kind = kinds.get(field.name, torch.float32)
        if batch is None:
            tensor = torch.empty(size, dtype=kind, device=device)
        else:
            tensor = getattr(batch, field.name).to(device=device, dtype=kind).contiguous()
        dist.broadcast(tensor, src=0)
        received[field.name] = tensor.bool() if kind == torch.uint8 else tensor
    return TrainBatch(**received)
