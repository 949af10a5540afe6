"""The policy learns: optimizer steps on a rollout, and the one block that holds all loss scaling.

Legend: N = responses of an optimizer step (over all ranks), B = responses of a micro-batch, S = padded
length, T = tokens of a packed micro-batch, V = vocabulary, tp and cp = tensor- and context-parallel size.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from siren_megatron import grpo, siren
from siren_megatron.batch import TrainBatch
from siren_megatron.config import Config
from siren_megatron.correction import rollout_correction
from siren_megatron.entropy_control import EntropyControl, EntropyStep
from siren_megatron.entropy_methods import entropy_loss
from siren_megatron.grpo import LossScale, PolicyLossOptions
from siren_megatron.microbatch import MicroBatch
from siren_megatron.nonfinite import SkippedUpdates, any_non_finite
from siren_megatron.platform import Platform
from siren_megatron.policy import Policy
from siren_megatron.reference import ReferenceWeights
from siren_megatron.vocab_parallel import TokenStats, TopPCounters

_LOSS = "loss of the micro-batch"  # among its metrics on its way through the schedule


class Trainer(Policy):
    """This rank's stage of the policy with its optimizer, the reference, and the update.

    Args:
        config: the run's options.
        hf_config: config.json of `--hf-checkpoint`.
        platform: device and backend; process groups are initialised.

    Raises:
        ValueError: the checkpoint and the model do not fit.
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], platform: Platform):
        super().__init__(config, hf_config, platform)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.model.bf16,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        )
        self.model = [DistributedDataParallel(self.model_config, ddp_config, chunk) for chunk in self.chunks]
        self.optimizer = get_megatron_optimizer(self._optimizer_config(), self.model)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.train.lr,
            min_lr=config.train.lr,
            lr_warmup_steps=config.train.lr_warmup_steps,
            lr_decay_steps=max(config.train.lr_warmup_steps, 1) + 1,
            lr_decay_style="constant",
            start_wd=config.train.weight_decay,
            end_wd=config.train.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.entropy = EntropyControl(
            config.entropy,
            num_steps=config.train.num_steps,
            seed=config.train.seed,
            without_pass=config.correction.rollout_logprobs_as_old,
        )
        self.skips = SkippedUpdates(config.run.save / "bad_batches", config.train.max_consecutive_skips)
        self.policy_options = _policy_loss_options(config)
        # Before a checkpoint of the run is loaded: the reference is the policy that --hf-checkpoint holds.
        self.reference = (
            ReferenceWeights(p for chunk in self.chunks for p in chunk.parameters())
            if config.grpo.grpo_kl_coeff
            else None
        )
        self.model_config.finalize_model_grads_func = finalize_model_grads
        self.model_config.grad_scale_func = self.optimizer.scale_loss
        no_sync = [model.no_sync for model in self.model]
        self.model_config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync

    def _optimizer_config(self) -> OptimizerConfig:
        train = self.config.train
        return OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_eps=train.adam_eps,
            clip_grad=train.clip_grad,
            bf16=self.config.model.bf16,
            params_dtype=torch.bfloat16 if self.config.model.bf16 else torch.float32,
            use_distributed_optimizer=self.config.parallel.use_distributed_optimizer,
        )

    @torch.no_grad()
    def compute_ref_logprobs(self, batch: TrainBatch) -> TrainBatch:
        """Fill in ref_logprobs, by the same pass with the reference's weights in the policy's place."""

        def collect(micro: MicroBatch, hidden: Tensor, non_loss_data: bool = True) -> list[Tensor]:
            return [self.token_stats(micro, hidden, top_p=1.0).logprobs]

        with self.reference.swapped_in():
            return batch.replace(ref_logprobs=self._collect(batch, collect, 1)[0])

    def masked_entropy(self, batch: TrainBatch) -> float:
        """H, the mean over the responses of their masked top-p entropy, in nats, from the log-prob pass."""
        mask = siren.peak_entropy_mask(
            batch.top_p_entropy, batch.loss_mask, self.config.entropy.siren_peak_quantile
        )
        return float(siren.masked_entropy(batch.top_p_entropy, mask).double().mean())

    def update(self, batch: TrainBatch, entropy_anchor: float, *, step: int = 0) -> dict[str, float]:
        """All optimizer steps on one rollout.

        Args:
            batch: from `compute_logprobs`, the same on every rank.
            entropy_anchor: what `EntropyControl.measure` gave for the initial policy, in nats.
            step: rollout steps done before this one.

        Returns:
            Metrics, each the mean over the optimizer steps that were applied, or over all where none was
            ("lr": the last one's; "skipped_updates": their number).

        Raises:
            NonFiniteError: too many optimizer steps in a row had a loss or gradient that is not finite.
        """
        self.counters = TopPCounters()
        batch, correction_metrics = self._weigh_tokens(batch)
        size = self.config.train.global_batch_size
        starts = list(range(0, batch.num_responses, size)) * self.config.grpo.grpo_epochs
        steps = [
            self.optimizer_step(batch.rows(start, start + size), entropy_anchor, step=step, index=index)
            for index, start in enumerate(starts)
        ]
        skipped = sum(s["skipped_updates"] for s in steps)
        counted = [s for s in steps if not s["skipped_updates"]] or steps
        means = {name: sum(s[name] for s in counted) / len(counted) for name in counted[0]}
        own = {"skipped_updates": skipped, "lr": steps[-1]["lr"]}
        return {**means, **correction_metrics, **self._count_rows(), **own}

    def _count_rows(self) -> dict[str, float]:
        """Rows of logits that held a NaN, and that the vocabulary operation's fast path could not certify."""
        counts = torch.tensor([self.counters.nan_rows, self.counters.fallback_rows], device=self.device)
        if self.is_last_stage:
            dist.all_reduce(counts, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self._broadcast_from_last_stage(counts)
        return dict(zip(("nan_rows", "top_p_fallback_rows"), map(float, counts.tolist()), strict=True))

    def _weigh_tokens(self, batch: TrainBatch) -> tuple[TrainBatch, dict[str, float]]:
        """Constant weights of the tokens' policy loss: rollout correction, and 0 for truncated responses."""
        options = self.config.correction
        weights, metrics = rollout_correction(
            batch.old_logprobs,
            batch.rollout_logprobs,
            batch.loss_mask,
            mode=options.rollout_correction,
            maximum=options.rollout_correction_max,
            minimum=options.rollout_correction_min,
        )
        if self.config.grpo.grpo_mask_truncated:
            weights = weights * ~batch.truncated.unsqueeze(1)
        return batch.replace(token_weights=weights), metrics

    def optimizer_step(
        self, batch: TrainBatch, entropy_anchor: float, *, step: int = 0, index: int = 0
    ) -> dict[str, float]:
        """Forward, backward and one optimizer step on the N responses of `batch`.

        Where the loss or the gradient norm is not finite on any rank, no rank changes its parameters, its
        optimizer, its learning rate or the entropy method's coefficient.

        Args:
            batch: [N, S], the same on every rank; each data-parallel rank takes its own rows.
            entropy_anchor: in nats.
            step: rollout steps done before this one.
            index: optimizer steps taken on this rollout before this one.
        """
        batch = batch.trimmed(self.length_multiple)
        scale = LossScale(
            batch.num_responses, batch.num_tokens, self.config.rollout.rollout_max_response_length
        )
        now = self.compute_logprobs(batch) if self.entropy.needs_refresh(index) else batch
        batch, entropy_step, step_metrics = self.entropy.begin(
            batch, now, anchor=entropy_anchor, step=step, index=index, policy_options=self.policy_options
        )
        loss_func = partial(self.loss_func, scale, entropy_step)
        for model in self.model:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run_schedule(self.micro_batches(batch)[0], loss_func)
        losses = [float(output.pop(_LOSS)) for output in outputs]
        metrics = {**self._sum_metrics(outputs), **step_metrics}
        # The norm that the optimizer will clip by; `step` prepares the same gradients again.
        self.optimizer.prepare_grads()
        metrics["grad_norm"] = float(self.optimizer.get_grad_norm())
        if any_non_finite([*losses, metrics["grad_norm"]], self.device):
            metrics |= {"lr": self.optimizer.param_groups[0]["lr"], "skipped_updates": 1.0}
            self.skips.skipped(batch, metrics, step=step, index=index)
            return {**metrics, **self.entropy.end(entropy_step, metrics, applied=False)}
        # Step k of the warm-up uses lr·k/warm-up: the first update is not thrown away.
        self.scheduler.step(1)
        self.optimizer.step()
        self.skips.applied()
        metrics |= {"lr": self.optimizer.param_groups[0]["lr"], "skipped_updates": 0.0}
        return {**metrics, **self.entropy.end(entropy_step, metrics)}

    def loss_func(
        self, scale: LossScale, entropy_step: EntropyStep, micro: MicroBatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Megatron's contract on the last stage: hidden states of a micro-batch -> (loss, 0, metrics)."""
        config, control, batch = self.config, self.entropy, micro.batch
        top_p = config.entropy.entropy_top_p if control.method.uses_top_p else 1.0
        stats = self.token_stats(micro, hidden, top_p=top_p)
        loss, metrics = grpo.policy_loss(
            stats.logprobs,
            batch.old_logprobs,
            batch.token_advantages,
            batch.loss_mask,
            scale=scale,
            options=self.policy_options,
            weights=batch.token_weights,
            ref_logprobs=batch.ref_logprobs,
        )
        sums = control.training_entropy(batch, stats)
        if sums is not None:
            dist.all_reduce(sums, group=self.dp_group)
            entropy_step = dataclasses.replace(entropy_step, step_entropy=float(sums) / scale.num_responses)
        entropy_term, entropy_metrics = entropy_loss(
            control.name, control.loss_inputs(entropy_step, batch, stats, scale, config.grpo.loss_agg)
        )
        if entropy_term is not None:
            loss = loss + entropy_term
        # ALL LOSS SCALING. `loss` is this micro-batch's share of a sum over the whole optimizer step: its
        # denominators are the global counts in `scale`. So Megatron must add and never average:
        # - micro-batches: with calculate_per_token_loss the schedule does not divide by their number;
        # - context ranks compute the same loss of all tokens; each sends gradients through its own tokens;
        # - data-parallel ranks: with calculate_per_token_loss DDP sums gradients (factor 1, not 1/dp);
        # - "tokens" is 0, so that finalize_model_grads does not divide by a token count either;
        # - tensor ranks hold the same loss; its gradient is made whole by the layers' own collectives.
        shares = {_LOSS: loss.detach(), **metrics, **entropy_metrics}
        if control.without_pass:
            shares |= self._measured(stats, batch, scale.num_tokens)
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), shares

    def _measured(self, stats: TokenStats, batch: TrainBatch, num_tokens: int) -> dict[str, Tensor]:
        """What the log-prob pass would have told, from the training's forward pass: shares of means."""
        apart = (stats.logprobs - batch.rollout_logprobs).abs() * batch.loss_mask
        means = {"entropy": stats.entropy, "rollout_logprob_error": apart}
        if self.entropy.method.uses_top_p:
            means["entropy_top_p"] = stats.top_p_entropy
        return {name: values.detach().sum() / num_tokens for name, values in means.items()}

    def _sum_metrics(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Shares of micro-batches and data-parallel ranks, added; the same on every rank."""
        names: list[Any] = [sorted(outputs[0]) if self.is_last_stage else None]
        source = dist.get_process_group_ranks(self.pp_group)[-1]
        dist.broadcast_object_list(names, src=source, group=self.pp_group)
        values = torch.zeros(len(names[0]), dtype=torch.float64, device=self.device)
        if self.is_last_stage:
            values += torch.stack([torch.stack([o[n].double() for n in names[0]]) for o in outputs]).sum(0)
            dist.all_reduce(values, group=self.dp_group)
        self._broadcast_from_last_stage(values)
        return dict(zip(names[0], values.tolist(), strict=True))


def _policy_loss_options(config: Config) -> PolicyLossOptions:
    options = config.grpo
    return PolicyLossOptions(
        policy_loss=options.grpo_policy_loss,
        loss_agg=options.loss_agg,
        clip_ratio_low=options.grpo_clip_ratio_low,
        clip_ratio_high=options.grpo_clip_ratio_high,
        dual_clip=options.grpo_dual_clip,
        kl_coeff=options.grpo_kl_coeff if options.grpo_kl_in == "loss" else 0.0,
        kl_estimator=options.grpo_kl_estimator,
    )
