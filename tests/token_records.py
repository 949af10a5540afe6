"""A step of a run made of real functions: a batch, its statistics from logits, and who looks at those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from siren_megatron.advantages import group_advantages
from siren_megatron.batch import Sample, TrainBatch, make_batch
from siren_megatron.config import Config
from siren_megatron.vocab_parallel import vocab_parallel_token_stats
from siren_megatron.vocab_parallel.top_tokens import vocab_parallel_top_tokens


def config_of(save: Path, **options: Any) -> Config:
    values = {
        "hf_checkpoint": Path("unused"),
        "prompt_data": Path("unused"),
        "save": save,
        "rollout_num_samples": 4,
        "rollout_max_response_length": 64,
        "num_steps": 20,
        **options,
    }
    return Config.of(**values)


class Policy:
    """Stands where the trainer does: logits that follow from the token before them, by a fixed table.

    Args:
        vocab_size: V.
        sharpness: larger means surer of itself.
    """

    length_multiple = 8

    def __init__(self, vocab_size: int, sharpness: float = 4.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Some tokens are followed by many others, some by one.
        scale = sharpness * torch.rand(vocab_size, 1, generator=generator)
        self.table = scale * torch.randn(vocab_size, vocab_size, generator=generator)
        # And some by three likely ones and a long tail: much entropy in all, little in the nucleus.
        self.table[:, :3] += 2 * sharpness * torch.rand(vocab_size, 1, generator=generator)

    def logits(self, batch: TrainBatch) -> torch.Tensor:
        """[N, S, V]"""
        return self.table[batch.tokens]

    def compute_logprobs(self, batch: TrainBatch, top_p: float = 0.8) -> TrainBatch:
        stats = vocab_parallel_token_stats(self.logits(batch), batch.labels, top_p=top_p)
        masked = [torch.where(batch.loss_mask, values, 0.0) for values in stats]
        return batch.replace(old_logprobs=masked[0], entropy=masked[1], top_p_entropy=masked[2])

    def top_tokens(self, batch: TrainBatch, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits(batch)
        ids, logprobs = vocab_parallel_top_tokens(logits.flatten(0, 1), count, vocab_size=logits.size(-1))
        return ids.view(*batch.tokens.shape, count), logprobs.view(*batch.tokens.shape, count)


def make_step(
    policy: Policy, groups: list[tuple[list[int], list[list[int]]]], rewards: list[float]
) -> TrainBatch:
    """A batch after the log-prob pass.

    Args:
        groups: (prompt ids, ids of each of its responses), as many for each prompt.
        rewards: one a response.
    """
    samples = [
        Sample(tuple(prompt), tuple(response), (0.0,) * len(response), "stop")
        for prompt, responses in groups
        for response in responses
    ]
    tensor = torch.tensor(rewards)
    advantages = group_advantages(tensor, len(groups[0][1]))
    return policy.compute_logprobs(make_batch(samples, tensor, advantages, multiple=policy.length_multiple))
