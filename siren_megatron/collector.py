"""What a step trains on: the next prompts, vLLM's responses and their rewards; on rank 0."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siren_megatron.batch import Sample
from siren_megatron.config import Config
from siren_megatron.data.cursor import MixtureCursor, PromptCursor
from siren_megatron.data.prompts import Prompt
from siren_megatron.dynamic_sampling import refill
from siren_megatron.rewards.pool import PendingReward, RewardPool, RewardResult
from siren_megatron.rollout.redraw import sample_with_redraws
from siren_megatron.rollout.service import RolloutService


@dataclass(frozen=True)
class Rollout:
    """Responses to the prompts of a step, with their rewards.

    Args:
        step: that it is for, from 1.
        groups: those of a prompt side by side.
        rewards: of all responses, with what failed among them.
        sampling_metrics: of dynamic sampling.
        seconds: "rollout" until the last response was there, "reward" from then to the last reward.
    """

    step: int
    groups: list[list[Sample]]
    rewards: RewardResult
    sampling_metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]

    @property
    def lags(self) -> list[int]:
        """Of each response: training steps between the weights that made it and those it trains."""
        return [self.step - 1 - sample.weight_version for sample in self.samples]

    def metrics(self) -> dict[str, float]:
        failed = {"reward_timeouts": self.rewards.num_timeouts, "reward_errors": self.rewards.num_errors}
        return {**self.sampling_metrics, **failed}

    def lag_metrics(self) -> dict[str, float]:
        lags = self.lags
        return {"rollout_weight_lag/mean": sum(lags) / len(lags), "rollout_weight_lag/max": max(lags)}

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and tensors, for a checkpoint."""
        samples, rewards = self.samples, self.rewards
        return {
            "step": self.step,
            "group_sizes": [len(group) for group in self.groups],
            "prompts": _flat([s.prompt_ids for s in samples], torch.int64),
            "responses": _flat([s.response_ids for s in samples], torch.int64),
            "logprobs": _flat([s.rollout_logprobs for s in samples], torch.float64),
            "finish_reasons": [s.finish_reason for s in samples],
            "weight_versions": [s.weight_version for s in samples],
            "rewards": list(rewards.rewards),
            "num_timeouts": rewards.num_timeouts,
            "num_errors": rewards.num_errors,
            "first_error": rewards.first_error,
            "sampling_metrics": dict(self.sampling_metrics),
            "seconds": dict(self.seconds),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollout:
        """The rollout whose `state_dict` it is."""
        parts = (_parts(state[name]) for name in ("prompts", "responses", "logprobs"))
        columns = zip(*parts, state["finish_reasons"], state["weight_versions"], strict=True)
        samples = iter([Sample(*fields) for fields in columns])
        return cls(
            state["step"],
            [[next(samples) for _ in range(size)] for size in state["group_sizes"]],
            RewardResult(state["rewards"], state["num_timeouts"], state["num_errors"], state["first_error"]),
            state["sampling_metrics"],
            state["seconds"],
        )


def _flat(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "values": torch.tensor([value for row in rows for value in row], dtype=dtype),
        "lengths": torch.tensor([len(row) for row in rows]),
    }


def _parts(flat: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    return [tuple(part.tolist()) for part in flat["values"].split(flat["lengths"].tolist())]


class _Graded(NamedTuple):
    samples: list[Sample]
    rewards: PendingReward


class Collector:
    """Makes the rollouts of a run; the same one for the same step, seed and weights.

    Args:
        config: the run's options.
        rollouts: the servers.
        tokenizer: decodes responses for their rewards; its end of sequence ends them.
        prompts: the data.
        cursor: over the data.
        rewards: the run's pool.
    """

    def __init__(
        self,
        config: Config,
        rollouts: RolloutService,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        cursor: PromptCursor | MixtureCursor,
        rewards: RewardPool,
    ) -> None:
        self._config, self._rollouts, self._tokenizer = config, rollouts, tokenizer
        self._prompts, self._cursor, self._rewards = prompts, cursor, rewards

    def collect(self, step: int) -> Rollout:
        """The rollout of a step, from 1, by the weights that the servers have now.

        A group is graded while others are still sampled.

        Raises:
            RolloutError: as `RolloutService.generate` and `sample_with_redraws`.
            RewardPoolError: the reward processes cannot be kept alive.
        """
        seconds = {"rollout": 0.0, "reward": 0.0}
        results: list[RewardResult] = []

        def draw(extra_round: int, count: int) -> tuple[list[list[Sample]], list[float]]:
            started = time.perf_counter()
            graded = self._generate(count, step, extra_round)
            sampled = time.perf_counter()
            results.append(_merged([one.rewards.result() for one in graded]))
            seconds["rollout"] += sampled - started
            seconds["reward"] += time.perf_counter() - sampled
            return [one.samples for one in graded], results[-1].rewards

        groups, rewards = draw(0, self._config.rollout.rollout_batch_size)
        metrics: dict[str, float] = {}
        if self._config.grpo.grpo_dynamic_sampling:
            rounds = self._config.grpo.grpo_dynamic_sampling_max_rounds
            refilled = refill(groups, rewards, draw=draw, max_rounds=rounds)
            groups, rewards, metrics = refilled.groups, refilled.rewards, refilled.metrics()
        total = _merged(results)
        kept = RewardResult(rewards, total.num_timeouts, total.num_errors, total.first_error)
        return Rollout(step, groups, kept, metrics, seconds)

    def _generate(self, count: int, step: int, extra_round: int) -> list[_Graded]:
        """Groups of the next `count` prompts; a dropped prompt has made room for the next one of the data."""
        seed = self._config.train.seed + step - 1 + 1_000_003 * extra_round
        _, graded = sample_with_redraws(
            self._draw(count),
            sample=lambda prompts, redraw: self._sample(prompts, seed + 7_000_003 * redraw),
            draw=self._draw,
        )
        return graded

    def _draw(self, count: int) -> list[Prompt]:
        return [self._prompts[index] for index in self._cursor.next(count)]

    def _sample(self, prompts: list[Prompt], seed: int) -> list[_Graded | None]:
        rollout, pending = self._config.rollout, {}

        def grade(index: int, samples: list[Sample]) -> None:
            texts = [self._tokenizer.decode(s.response_ids, skip_special_tokens=True) for s in samples]
            pending[index] = self._rewards.submit([(text, prompts[index].answer) for text in texts])

        groups = self._rollouts.generate(
            [prompt.token_ids for prompt in prompts],
            num_samples=rollout.rollout_num_samples,
            max_tokens=rollout.rollout_max_response_length,
            temperature=rollout.rollout_temperature,
            seed=seed,
            stop_token_ids=[self._tokenizer.eos_token_id],
            may_drop=True,
            on_group=grade,
        )
        return [_Graded(group, pending[k]) if group else None for k, group in enumerate(groups)]


def _merged(results: Sequence[RewardResult]) -> RewardResult:
    """The results of several submissions, in their order, as one."""
    errors = (result.first_error for result in results if result.first_error is not None)
    return RewardResult(
        [reward for result in results for reward in result.rewards],
        sum(result.num_timeouts for result in results),
        sum(result.num_errors for result in results),
        next(errors, None),
    )
