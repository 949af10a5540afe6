"""Whether vLLM serves the policy that is trained: both compute the log-probs of the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siren_megatron.batch import TrainBatch, make_batch
from siren_megatron.config import Config
from siren_megatron.rollout.server import RolloutError

if TYPE_CHECKING:
    from siren_megatron.rollout.service import RolloutService
    from siren_megatron.trainer import Trainer

CHECK_TOKENS = 4
"""Response tokens that each server and the trainer compare after a weight update."""


class PolicyCheck:
    """Compares log-probs of vLLM and of the trainer, within `--rollout-logprob-tolerance`.

    Args:
        config: the run's options.
        rollouts: the servers.
        trainer: the policy.
    """

    def __init__(self, config: Config, rollouts: RolloutService, trainer: Trainer) -> None:
        self._config, self._rollouts, self._trainer = config, rollouts, trainer

    def sample(self, prompt_ids: Sequence[int], stop_token_id: int) -> TrainBatch:
        """On rank 0, in the thread that samples: a few tokens from each server, a row of theirs at least.

        The batch is as large as every data-parallel rank needs for a share.
        """
        # As many requests at once as there are servers: each gets one.
        servers, smallest = self._rollouts.num_servers, self._trainer.smallest_batch
        rollout = self._config.rollout
        groups = self._rollouts.generate(
            [prompt_ids] * servers,
            stream_ids=[0] * servers,
            num_samples=1,
            max_tokens=min(CHECK_TOKENS, rollout.rollout_max_response_length),
            temperature=rollout.rollout_temperature,
            seed=self._config.train.seed,
            stop_token_ids=[stop_token_id],
        )
        rows = -(-servers // smallest) * smallest
        samples = [groups[row % servers][0] for row in range(rows)]
        zeros = torch.zeros(rows)
        return make_batch(samples, zeros, zeros, multiple=self._trainer.length_multiple)

    def compare(self, batch: TrainBatch, step: int, when: str) -> float:
        """Largest |log-prob difference| in nats, after the trainer's log-prob pass; on every rank.

        Raises:
            RolloutError: the mean is larger than the tolerance.
        """
        return check_logprobs(
            batch.old_logprobs,
            batch.rollout_logprobs,
            batch.loss_mask,
            tolerance=self._config.logprob_tolerance,
            step=step,
            when=when,
        )

    def compare_servers(self, batch: TrainBatch, step: int) -> float:
        """`compare` row by row: one server that has other weights must not hide among many."""
        rows = [batch.rows(row, row + 1) for row in range(batch.num_responses)]
        return max(self.compare(row, step, "weight update") for row in rows)


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
