"""What an entropy method carries from step to step: coefficient, random numbers, and the plan of each step.

Legend: N = responses of an optimizer step (over all ranks), S = positions. All of it is computed alike on
every rank from the whole step's tensors, so it needs no collective and does not depend on the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from siren_megatron import grpo
from siren_megatron.batch import TrainBatch
from siren_megatron.entropy_methods import ENTROPY_METHODS, LossInputs, StepInputs, StepPlan, entropy_metric
from siren_megatron.grpo import LossScale, PolicyLossOptions
from siren_megatron.method_options import EntropyOptions
from siren_megatron.vocab_parallel import TokenStats


def scheduled_coeff(start: float, final: float, schedule: str, step: int, num_steps: int) -> float:
    """The coefficient at a rollout step: `start` at step 0, `final` at step num_steps - 1.

    Args:
        schedule: "constant" (final is ignored), "linear" or "cosine" (half a period).
        step: counted from 0.
        num_steps: steps of the run.
    """
    done = min(step / max(num_steps - 1, 1), 1.0)
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (final - start) * done
    if schedule == "cosine":
        return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"--entropy-coeff-schedule {schedule} is unknown")


@dataclass(frozen=True)
class EntropyStep:
    """The entropy method's numbers of one optimizer step: see `LossInputs`."""

    coeff: float
    target: float
    step_entropy: float | None


class EntropyControl:
    """The run's entropy method.

    Args:
        options: `--entropy-...`, `--siren-...`.
        num_steps: rollout steps of the run.
        seed: of the methods that choose at random.
        without_pass: there is no log-prob pass over most rollouts (`--rollout-logprobs-as-old`).
    """

    def __init__(self, options: EntropyOptions, *, num_steps: int, seed: int, without_pass: bool = False):
        self.without_pass = without_pass
        self.options, self.num_steps, self.seed = options, num_steps, seed
        self.name = options.entropy_method
        self.method = ENTROPY_METHODS[self.name]
        start = self.method.coeff if options.entropy_coeff is None else options.entropy_coeff
        self._coeff = start or 0.0

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: whose state, and the coefficient where the method moves it."""
        return {"method": self.name, "coeff": self._coeff if self.method.next_coeff else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is another method's: its anchor would be another entropy's."""
        if state["method"] != self.name:
            raise ValueError(
                f"--entropy-method {self.name}: the checkpoint of --load was made with {state['method']}"
            )
        if state["coeff"] is not None:
            self._coeff = state["coeff"]

    def coeff(self, step: int) -> float:
        """The coefficient at a rollout step (counted from 0)."""
        options = self.options
        return scheduled_coeff(
            self._coeff,
            options.entropy_coeff_final or 0.0,
            options.entropy_coeff_schedule,
            step,
            self.num_steps,
        )

    def target(self, anchor: float) -> float:
        """What H is held to, in nats: --entropy-target, or the anchor measured on the first rollout."""
        return anchor if self.options.entropy_target is None else self.options.entropy_target

    def needs_refresh(self, index: int) -> bool:
        """Whether optimizer step `index` (counted from 0) on a rollout wants the current policy's tensors."""
        return index > 0 and (self.options.entropy_refresh or self.method.always_refresh)

    def measure(self, batch: TrainBatch) -> float:
        """H: what the method regularises, in nats, from the log-prob pass; its first value is the anchor."""
        return self._mean_entropy(
            batch, self._plan(batch, batch, 0, 0, self._coeff, batch.loss_mask).entropy_weights
        )

    def _mean_entropy(self, batch: TrainBatch, weights: torch.Tensor | None) -> float:
        if weights is None:
            weights = batch.entropy_weights
        entropies = self.method.regularised(
            batch.entropy, batch.top_p_entropy, batch.loss_mask, weights, self.options
        )
        return float(entropies.double().mean())

    def _plan(
        self, batch: TrainBatch, now: TrainBatch, step: int, index: int, coeff: float, clipped: torch.Tensor
    ) -> StepPlan:
        if self.method.plan is None:
            return StepPlan()
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + index)
        return self.method.plan(
            StepInputs(
                logprobs=now.old_logprobs,
                entropy=now.entropy,
                top_p_entropy=now.top_p_entropy,
                top_two_gap=now.top_two_gap,
                loss_mask=batch.loss_mask,
                advantages=batch.token_advantages,
                clipped=clipped,
                moved=index > 0,
                coeff=coeff,
                generator=generator,
                options=self.options,
            )
        )

    def begin(
        self,
        batch: TrainBatch,
        now: TrainBatch,
        *,
        anchor: float,
        step: int,
        index: int,
        policy_options: PolicyLossOptions,
    ) -> tuple[TrainBatch, EntropyStep, dict[str, float]]:
        """Apply the method's plan to the N responses of an optimizer step.

        Args:
            batch: [N, S], the same on every rank.
            now: the same responses from the newest log-prob pass: `batch` itself, or refreshed.
            anchor: H of the initial policy, in nats.
            step, index: rollout step of the run, and optimizer step of the rollout, counted from 0.
            policy_options: of the policy loss, whose clip decides which tokens are clipped.

        Returns:
            (batch with the method's advantages, weights and marks; the step's numbers; metrics of the step).
        """
        coeff, options = self.coeff(step), self.options
        if self.without_pass:
            metrics = {} if self.method.coeff is None else {"entropy_coeff": coeff}
            return batch, EntropyStep(coeff, self.target(anchor), None), metrics
        with torch.no_grad():
            _, clipped = grpo.token_losses(
                now.old_logprobs, batch.old_logprobs, batch.token_advantages, batch.loss_mask, policy_options
            )
        plan = self._plan(batch, now, step, index, coeff, clipped)
        changes = {}
        if plan.advantages is not None:
            changes["token_advantages"] = plan.advantages
        if plan.keep is not None:
            changes["token_weights"] = batch.token_weights * plan.keep
        if plan.entropy_weights is not None:
            changes["entropy_weights"] = plan.entropy_weights
        step_entropy = None
        if options.siren_anchor_estimate == "step":
            step_entropy = self._mean_entropy(now, plan.entropy_weights)
        metrics = dict(plan.metrics)
        if self.method.coeff is not None:
            metrics["entropy_coeff"] = coeff
        return batch.replace(**changes), EntropyStep(coeff, self.target(anchor), step_entropy), metrics

    def training_entropy(self, batch: TrainBatch, stats: TokenStats) -> torch.Tensor | None:
        """Sum of h_i over a micro-batch, where H of the step has to come from the training's forward pass.

        That pass then sees all responses of the optimizer step at once, one micro-batch on each rank.
        """
        if not self.without_pass or self.method.penalty is None:
            return None
        if self.options.siren_anchor_estimate != "step" or not (
            self.name == "siren" and self.options.siren_anchor
        ):
            return None  # the penalty's slope does not depend on H
        entropies = self.method.regularised(
            stats.entropy, stats.top_p_entropy, batch.loss_mask, batch.entropy_weights, self.options
        )
        return entropies.detach().double().sum()

    def end(
        self, entropy_step: EntropyStep, metrics: dict[str, float], *, applied: bool = True
    ) -> dict[str, float]:
        """After the optimizer step: move the coefficient.

        Args:
            metrics: the step's, reduced; the same on every rank. H in it is the forward pass's own.
            applied: whether the step was; the coefficient stays where it was not.

        Returns:
            {"<method>/loss": the penalty's value} where there is a penalty.
        """
        if self.method.penalty is None:
            return {}
        entropy = metrics[entropy_metric(self.name)]
        if self.method.next_coeff is not None and applied:
            self._coeff = self.method.next_coeff(
                self._coeff, entropy, entropy_step.target, self.options.entropy_rate
            )
        value = self.method.penalty(
            torch.tensor(entropy, dtype=torch.float64), entropy_step.coeff, entropy_step.target, self.options
        )
        return {f"{self.name}/loss": float(value)}

    def loss_inputs(
        self, entropy_step: EntropyStep, batch: TrainBatch, stats: TokenStats, scale: LossScale, loss_agg: str
    ) -> LossInputs:
        """A micro-batch [B, S] and its forward pass, as the method's loss wants them."""
        return LossInputs(
            logprobs=stats.logprobs,
            entropy=stats.entropy,
            top_p_entropy=stats.top_p_entropy,
            old_logprobs=batch.old_logprobs,
            loss_mask=batch.loss_mask,
            entropy_weights=batch.entropy_weights,
            aggregation=grpo.token_weights(batch.loss_mask, loss_agg, scale),
            coeff=entropy_step.coeff,
            target=entropy_step.target,
            step_entropy=entropy_step.step_entropy,
            num_responses=scale.num_responses,
            options=self.options,
        )
