"""One run: the trainer on every rank; server, prompts, rewards and metrics on rank 0. Its methods are stages.

A stage that only rank 0 does returns None on the other ranks; tensors reach them in `make_batch`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from siren_megatron.advantages import assign_advantages
from siren_megatron.batch import TrainBatch, broadcast_batch, make_batch
from siren_megatron.checkpointing import random_states
from siren_megatron.checkpointing.checkpoint import CheckpointSaver, LoadedRun, SaveError, load_checkpoint
from siren_megatron.collector import Collector, Rollout
from siren_megatron.config import Config, read_hf_config
from siren_megatron.control import Control, another_rank_failed, mark_failed
from siren_megatron.data.prompts import load_data_tokenizer, load_dataset, make_cursor
from siren_megatron.data.tokenizer import replace_tokenizer_files
from siren_megatron.evaluation.during_training import TrainingEvaluation
from siren_megatron.implementations import find_implementations
from siren_megatron.metrics import MetricsLogger, StageTimer
from siren_megatron.nonfinite import NonFiniteError
from siren_megatron.platform import Platform, init_process_group
from siren_megatron.policy import initialize_model_parallel
from siren_megatron.profiling import StepProfiler
from siren_megatron.rewards.pool import RewardPool, RewardPoolError
from siren_megatron.rollout.client import RolloutError
from siren_megatron.rollout.hosts import Hosts
from siren_megatron.rollout.node_servers import server_options
from siren_megatron.rollout.policy_check import PolicyCheck
from siren_megatron.rollout.schedule import RolloutSchedule
from siren_megatron.rollout.service import RolloutService
from siren_megatron.rollout.weight_sync import WeightSyncError
from siren_megatron.signals import StopSignals, describe
from siren_megatron.token_record import TokenRecorder
from siren_megatron.trainer import Trainer

_ONE_LINE = (RolloutError, WeightSyncError, NonFiniteError, RewardPoolError, SaveError)


class Job:
    """Build a run, hold its state, and end everything it started. A context manager.

    On an error it prints one line and exits with code 1 (2 for a user's mistake).

    Args:
        config: the run's options.
        device: from `platform.install`.
        signals: made before the heavy imports.

    Attributes:
        step: steps done.
        entropy_anchor: masked entropy of the initial policy in nats; None before the first step.
    """

    def __init__(self, config: Config, device: Platform, signals: StopSignals):
        self.config, self.platform, self.signals = config, device, signals
        self.step = 0
        self.stopped_by = 0
        self.entropy_anchor: float | None = None
        self.rollout_metrics: dict[str, float] = {}
        self._loaded: LoadedRun | None = None
        self.recorder = TokenRecorder(config)
        self._log_error: str | None = None
        self._stack = contextlib.ExitStack()
        self._built = False

    # ---------------------------------------------------------------- life

    def __enter__(self) -> Job:
        try:
            self._build()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        # Options and files are judged while the run is built; a later ValueError is a bug and keeps its
        # traceback, but for those that name an option.
        mistake = isinstance(error, ValueError) and (not self._built or str(error).startswith("--"))
        in_one_line = mistake or isinstance(error, _ONE_LINE)
        # Before the server is ended, which takes its time: torchrun ends this rank once another has ended.
        if in_one_line and os.environ.get("LOCAL_RANK", "0") == "0":
            # One write, the line's end included: torchrun and the other ranks write there as well.
            sys.stderr.write(f"pretrain_siren.py: error: {error}\n")
            sys.stderr.flush()
        if kind is not None:
            mark_failed()
        self._stack.__exit__(kind, error, traceback)
        if kind is None:
            dist.destroy_process_group()
        if in_one_line:
            raise SystemExit(2 if mistake else 1) from None

    def _build(self) -> None:
        config = self.config
        init_process_group(self.platform, config.parallel.distributed_timeout_minutes * 60)
        self.is_main = dist.get_rank() == 0
        self.hf_config = read_hf_config(config.model.hf_checkpoint)
        if self.is_main:
            if config.run.overwrite and config.run.save.is_dir():
                shutil.rmtree(config.run.save)
            config.run.save.mkdir(parents=True, exist_ok=True)
        # vLLM takes longest to start: let it load while this process builds the model.
        hosts = Hosts.agree(config.rollout.rollout_nodes)
        on_cpu = not self.platform.is_cuda
        options = server_options(config, hosts, on_cpu=on_cpu) if hosts.node is not None else []
        self.rollouts = self._stack.enter_context(
            RolloutService(config, options, Control(), hosts=hosts, is_main=self.is_main, report=self._print)
        )
        if self.is_main:
            self._load_data()
        initialize_model_parallel(config)
        self.trainer = Trainer(config, self.hf_config, self.platform)
        if config.run.load is not None:
            self._resume()
        self.rollouts.connect(
            weights=lambda: hosts.share(self.trainer.hf_weights(named_on=hosts.ranks)),
            version=lambda: self.step,
        )
        self.policy_check = PolicyCheck(config, self.rollouts, self.trainer)
        if self.is_main:
            self.logger = self._stack.enter_context(self._make_logger())
            self.trainer.skips.report = self.logger.print
            if self.step:
                self.logger.truncate_after(self.step)
            self.recorder.open(self.step, self.tokenizer, self.dataset.prompts)
        self.timer = StageTimer()
        self.profiler = StepProfiler(config.run.save, config.run.profile or (), dist.get_rank(), self.timer)
        # The server has loaded --hf-checkpoint's weights.
        if self.step or config.model.pretrained_checkpoint is not None:
            self.update_weights()
            # The first step's times and counts are its own.
            self.timer.pop()
            self.rollouts.pop_counts()
        if self._loaded is not None and self._loaded.random_states is not None:
            # After all else that may draw: the next step finds them as the saved one left them.
            random_states.restore(self._loaded.random_states, self.platform.device)
        self._built = True
        self.signals.arm(another_rank_failed)

    def _load_data(self) -> None:
        config = self.config
        data = config.data
        self.tokenizer = load_data_tokenizer(data, config.model.hf_checkpoint)
        max_prompt_length = config.train.seq_length - config.rollout.rollout_max_response_length
        self.dataset = load_dataset(
            data, self.tokenizer, max_prompt_length=max_prompt_length, vocab_size=self.hf_config["vocab_size"]
        )
        if self.dataset.num_skipped_too_long:
            print(f"{self.dataset.num_skipped_too_long} prompts are too long and left out", flush=True)
        self.cursor = make_cursor(self.dataset.sizes, seed=config.train.seed, weights=data.prompt_weights)
        self.rewards = RewardPool(
            data.reward_name, num_workers=data.reward_num_workers, time_limit_s=data.reward_time_limit
        )
        self._stack.callback(self.rewards.close)
        collector = Collector(
            config, self.rollouts, self.tokenizer, self.dataset.prompts, self.cursor, self.rewards
        )
        self.schedule = RolloutSchedule(
            collector.collect,
            self.rollouts,
            steps_ahead=config.rollout.rollout_async_steps,
            num_steps=config.train.num_steps,
        )
        self.evaluation = TrainingEvaluation(config, self.tokenizer, self.rewards)
        self._stack.callback(self.evaluation.close)

    def _make_logger(self) -> MetricsLogger:
        run = self.config.run
        return MetricsLogger(
            run.save,
            self.config.train.num_steps,
            tensorboard_dir=run.tensorboard_dir,
            wandb_project=run.wandb_project,
            config=self.config.flat(),
            implementations=find_implementations(self.trainer.chunks, self.trainer.optimizer),
            log_interval=run.log_interval,
        )

    # ---------------------------------------------------------------- stages

    def goes_on(self) -> bool:
        """Whether there is another step to do; begins it."""
        if self.step >= self.config.train.num_steps or self.stopped_by:
            return False
        self.rollouts.lead()
        self.profiler.begin(self.step + 1)
        return True

    def rollout(self) -> Rollout | None:
        """Responses to the next prompts and their rewards; --rollout-async-steps makes them in advance.

        Raises:
            RolloutError: vLLM fails more often than it may.
        """
        if not self.is_main:
            return None
        if self.config.rollout.rollout_async_steps:
            with self.timer.stage("rollout"):
                rollout = self.schedule.next(self.step + 1)
            self.timer.add("rollout_ahead", sum(rollout.seconds.values()))
        else:
            start = time.time()
            rollout = self.schedule.next(self.step + 1)
            for stage, seconds in rollout.seconds.items():
                self.timer.add(stage, seconds, start)
                start += seconds
        if rollout.rewards.first_error:
            self.logger.print(
                f"step {rollout.step}: {rollout.rewards.num_errors} reward(s) failed and count as 0; the "
                f"first: {rollout.rewards.first_error}"
            )
        self.rollout_metrics = rollout.metrics()
        if self.config.rollout.rollout_async_steps:
            self.rollout_metrics |= rollout.lag_metrics()
        return rollout

    def make_batch(self, rollout: Rollout | None) -> TrainBatch:
        """Samples and rewards as tensors, on every rank; vLLM may sleep from here on."""
        if self.is_main:
            self.rollouts.sleep()
        self.rollouts.assist()
        batch, lag = None, 0
        if self.is_main:
            rewards, lag = torch.tensor(rollout.rewards.rewards), max(rollout.lags)
            batch = make_batch(
                rollout.samples, rewards, torch.zeros_like(rewards), multiple=self.trainer.length_multiple
            )
        self._is_stale = self.rollouts.control.agree(lag) > 0
        return broadcast_batch(batch, self.platform.device)

    def compute_logprobs(self, batch: TrainBatch) -> TrainBatch:
        """Log-probs and entropies of the policy (and the reference's); the first call sets the anchor.

        With --rollout-logprobs-as-old vLLM's log-probs are the old ones, and the policy's own are computed
        only where the anchor or a record needs them.

        Raises:
            RolloutError: vLLM sampled from another policy than the trainer holds. (One that is known to be
                older was compared when vLLM got it.)
        """
        as_old = self.config.correction.rollout_logprobs_as_old
        no_anchor = self.entropy_anchor is None or not math.isfinite(self.entropy_anchor)
        measured = not as_old or no_anchor or self.recorder.is_due(self.step + 1)
        with self.timer.stage("logprob"):
            if measured:
                batch = self.trainer.compute_logprobs(batch)
            if self.trainer.reference is not None:
                batch = self.trainer.compute_ref_logprobs(batch)
        if measured and not self._is_stale:
            self.policy_check.compare(batch, self.step, "rollout")
        if no_anchor:
            self.entropy_anchor = self.trainer.entropy.measure(batch)
        return batch.replace(old_logprobs=batch.rollout_logprobs) if as_old else batch

    def compute_advantages(self, batch: TrainBatch) -> TrainBatch:
        """Advantages from rewards, and from the log-probs where a KL is taken from the reward."""
        return assign_advantages(
            batch,
            self.config.grpo,
            group_size=self.config.rollout.rollout_num_samples,
            max_response_length=self.config.rollout.rollout_max_response_length,
        )

    def update(self, batch: TrainBatch) -> dict[str, float]:
        with self._despite_a_full_disk():
            self.recorder.record(self.step + 1, batch, self.trainer)
        with self.timer.stage("train"):
            metrics = self.trainer.update(batch, self.entropy_anchor, step=self.step)
        self.step += 1
        return metrics

    def update_weights(self) -> None:
        """Send the policy to vLLM once it has sampled what was under way; see that it computes its log-probs.

        Raises:
            RolloutError: vLLM still serves another policy.
        """
        self.rollouts.lead()
        if self.is_main:
            with self.timer.stage("rollout"):
                self.schedule.settle()
        with self.timer.stage("weight_sync"):
            batch = None
            if self.is_main:
                self.rollouts.update_weights()
                prompt, stop = (
                    self.dataset.prompts[self.step % len(self.dataset)],
                    self.tokenizer.eos_token_id,
                )
                batch = self.rollouts.run(lambda: self.policy_check.sample(prompt.token_ids, stop))
            self.rollouts.assist()
            batch = self.trainer.compute_logprobs(broadcast_batch(batch, self.platform.device))
            self.weight_sync_diff = self.policy_check.compare_servers(batch, self.step)

    def evaluate_if_due(self) -> None:
        """Sample and grade the benchmarks every `--eval-interval` steps; `log` records it with the step."""
        self.rollouts.lead()
        if self.is_main and self.evaluation.is_due(self.step):
            with self.timer.stage("eval"), self._despite_a_full_disk():
                self.rollouts.run(lambda: self.evaluation.run(self.step, self.rollouts, self.logger.print))
            if self.step == 0:
                self.timer.pop()  # the first step's times are its own
        self.rollouts.assist()

    # ---------------------------------------------------------------- record

    @property
    def _anchor_name(self) -> str:
        """The anchor is of the entropy that the method acts on: SIREN's masked one, or another."""
        return "siren/entropy_anchor" if self.trainer.entropy.name == "siren" else "entropy_anchor"

    def log(self, batch: TrainBatch, metrics: dict[str, float]) -> None:
        """Write one row of metrics."""
        with self._despite_a_full_disk():
            self.profiler.end()
            self._log(batch, metrics)

    @contextlib.contextmanager
    def _despite_a_full_disk(self) -> Iterator[None]:
        """A file of rank 0's that cannot be written: the other ranks hear of it in `save_if_due`."""
        try:
            yield
        except OSError as error:
            self._log_error = f"{error.filename or 'metrics'} could not be written: {error.strerror or error}"

    def _log(self, batch: TrainBatch, metrics: dict[str, float]) -> None:
        times, tokens = self.timer.pop(), batch.num_tokens
        if not self.is_main:
            return
        self.logger.log(
            self.step,
            {
                "reward": float(batch.rewards.mean()),
                **(self._entropies(batch) if not self.trainer.entropy.without_pass else {}),
                self._anchor_name: self.trainer.entropy.target(self.entropy_anchor),
                **self.evaluation.metrics_of(self.step),
                **metrics,
                "response_length": tokens / batch.num_responses,
                "weight_sync_logprob_diff": self.weight_sync_diff,
                **self.rollout_metrics,
                **self.rollouts.pop_counts(),
                **self.rollouts.sync_metrics,
                "tokens_per_second": tokens / times["time/step"],
                **times,
            },
        )

    def _entropies(self, batch: TrainBatch) -> dict[str, float]:
        """Of the log-prob pass; without it the update tells them of its own forward pass."""
        mask = batch.loss_mask
        return {
            "entropy": float(batch.entropy[mask].mean()),
            "entropy_top_p": float(batch.top_p_entropy[mask].mean()),
            "siren/entropy_masked": self.trainer.masked_entropy(batch),
            "rollout_logprob_diff": float((batch.old_logprobs - batch.rollout_logprobs).abs()[mask].max()),
        }

    @functools.cached_property
    def saver(self) -> CheckpointSaver:
        run = self.config.run
        return CheckpointSaver(
            run.save / "checkpoints",
            self.trainer,
            asynchronous=run.async_save,
            total_limit=run.save_total_limit,
        )

    def save_if_due(self) -> None:
        """Write a checkpoint every `--save-interval` steps, after the last one, and when a signal came.

        Raises:
            SaveError: it could not be written, or the one that `--async-save` was writing could not, or the
                metrics of this step.
        """
        self.saver.poll()
        self._agree_on_log()
        # A signal may reach some ranks only.
        self.stopped_by = self.rollouts.control.agree(self.signals.received())
        interval = self.config.run.save_interval
        due = self.step == self.config.train.num_steps or (interval and self.step % interval == 0)
        if due or self.stopped_by:
            self.saver.save(
                {
                    "step": self.step,
                    "entropy_anchor": self.entropy_anchor,
                    "entropy": self.trainer.entropy.state_dict(),
                    "cursor": self.cursor.state_dict() if self.is_main else None,
                    "rollouts": [r.state_dict() for r in self.schedule.ready] if self.is_main else None,
                    "config": self.config.flat(),
                }
            )

    def _agree_on_log(self) -> None:
        told = [self._log_error]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            self.saver.wait()  # may be what filled the disk, and then says so
            raise SaveError(told[0])

    def finish_saves(self) -> None:
        """Wait for a checkpoint that `--async-save` is writing. Raises as `save_if_due`."""
        self.saver.wait()

    def _resume(self) -> None:
        """Go on from the newest good checkpoint."""
        self._loaded = load_checkpoint(self.config.run.load / "checkpoints", self.trainer)
        state = self._loaded.state
        self.step, self.entropy_anchor = state["step"], state["entropy_anchor"]
        self.trainer.entropy.load_state_dict(state["entropy"])
        mistake: list[str | None] = [None]
        if self.is_main:
            try:
                self.cursor.load_state_dict(state["cursor"])
                ready = [Rollout.from_state(one) for one in state.get("rollouts", ())]
                self.schedule.restore(self.step, ready)
            except ValueError as error:
                mistake = [str(error)]
        dist.broadcast_object_list(mistake, src=0)
        if mistake[0] is not None:
            raise ValueError(mistake[0])

    def export(self) -> None:
        """Write the policy as a Hugging Face checkpoint to `<save>/hf`; a stopped run says how to resume."""
        if self.stopped_by and self.step < self.config.train.num_steps:
            return self._tell_how_to_resume()
        self.trainer.export(self.config.run.save / "hf")
        if self.is_main:
            if self.config.data.tokenizer is not None:
                replace_tokenizer_files(self.config.data.tokenizer, self.config.run.save / "hf")
            self.logger.print(f"policy as a Hugging Face checkpoint: {self.config.run.save / 'hf'}")

    def _tell_how_to_resume(self) -> None:
        if not self.is_main:
            return
        steps, save = f"{self.step} of {self.config.train.num_steps}", self.config.run.save
        cause = describe(self.stopped_by)
        self.logger.close(f"stopped by {cause}")
        self._print(f"stopped by {cause} after step {steps}, saved; go on with --load {save} --save {save}")

    def _print(self, message: str) -> None:
        """A line above the progress bar; before there is one, on standard output."""
        if hasattr(self, "logger"):
            self.logger.print(message)
        else:
            print(message, flush=True)
