"""This rank's stage of the policy on megatron-core, and the forward passes that nothing learns from.

Legend: N = responses of a batch (over all ranks), B = responses of a micro-batch, S = padded length,
T = tokens of a packed micro-batch, V = vocabulary, tp and cp = tensor- and context-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from siren_megatron.architecture import Architecture
from siren_megatron.attention import sum_over_context
from siren_megatron.batch import TrainBatch
from siren_megatron.config import Config
from siren_megatron.conversion import live
from siren_megatron.entropy_methods import ENTROPY_METHODS
from siren_megatron.microbatch import (
    ContextShare,
    MicroBatch,
    contiguous_rows,
    packed_lengths,
    packed_micro_batch,
    packed_rows,
    padded_micro_batch,
)
from siren_megatron.model import build_model, check_architecture, transformer_config
from siren_megatron.output_head import OutputHead, defer_output_head
from siren_megatron.platform import Platform
from siren_megatron.vocab_parallel import TokenStats, TopPCounters


def initialize_model_parallel(config: Config) -> None:
    """megatron-core's process groups and RNG states; torch's process group is up."""
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
    )
    torch.manual_seed(config.train.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(config.train.seed)


class Policy:
    """The model of a checkpoint as this rank holds it, and what it makes of responses.

    Args:
        config: the run's options.
        hf_config: config.json of `--hf-checkpoint`.
        platform: device and backend; process groups are initialised.

    Attributes:
        chunks: this rank's part of the model; several under an interleaved pipeline.
        model: the same as the schedule runs them: wrapped, where something learns.

    Raises:
        ValueError: the checkpoint and the model do not fit.
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], platform: Platform):
        check_architecture(hf_config, config.train.seq_length)
        self.config, self.hf_config, self.device = config, hf_config, platform.device
        self.vocab_size = hf_config["vocab_size"]
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.dp_group = parallel_state.get_data_parallel_group()
        self.pp_group = parallel_state.get_pipeline_model_parallel_group()
        self.cp_group = parallel_state.get_context_parallel_group()
        self.share = ContextShare(self.cp_group.rank(), self.cp_group.size())
        self.is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.model_config = transformer_config(
            hf_config,
            config.parallel,
            platform,
            bf16=config.model.bf16,
            transformer_impl=config.model.transformer_impl,
        )
        self.chunks = build_model(hf_config, self.model_config)
        self.head = OutputHead(defer_output_head(self.chunks), config, Architecture.of(hf_config))
        if config.model.pretrained_checkpoint is not None:
            live.load_megatron_weights(self.chunks, config.model.pretrained_checkpoint)
        else:
            live.load_hf_weights(self.chunks, config.model.hf_checkpoint, hf_config)
        self.model: list[torch.nn.Module] = self.chunks
        self.counters = TopPCounters()

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: torch.nn.Module, loss_func: Any):
        """Megatron's contract: one micro-batch -> (output tensor, function of it on the last stage)."""
        micro = next(data_iterator)
        # Hidden states stay in the model's precision: the vocabulary operation sums in higher precision.
        precision = {"fp32_output": False} if self.config.model.bf16 else {}
        output = model(
            input_ids=micro.tokens,
            position_ids=micro.position_ids,
            attention_mask=None,
            packed_seq_params=micro.packed,
            **precision,
        )
        return output, partial(loss_func, micro)

    def token_stats(self, micro: MicroBatch, hidden: Tensor, *, top_p: float) -> TokenStats:
        """Log-prob, entropy and top-p entropy of the response tokens, under the sampling temperature.

        Args:
            hidden: [B, S/cp, h], or [1, T/cp, h] of a packed micro-batch, the head's input.
            top_p: mass of the top-p mask.

        Returns:
            TokenStats of [B, S], 0 outside the responses.
        """
        labels = micro.batch.labels.flatten()[micro.targets]
        stats = self.head.token_stats(_selected(micro, hidden), labels, top_p=top_p, counters=self.counters)
        return TokenStats(*self._to_rows(micro, torch.stack(list(stats))))

    def top_two_gap(self, micro: MicroBatch, hidden: Tensor) -> Tensor:
        """Log-prob gap [B, S] of the two likeliest tokens, in nats, 0 outside the responses."""
        return self._to_rows(micro, self.head.top_two_gap(_selected(micro, hidden)).unsqueeze(0))[0]

    def _to_rows(self, micro: MicroBatch, values: Tensor) -> Tensor:
        """Values [k, n] of this context rank's response tokens -> [k, B, S] of all, 0 elsewhere."""
        rows = micro.batch.tokens
        empty = torch.zeros(values.size(0), rows.numel(), device=values.device)
        placed = sum_over_context(empty.index_copy(1, micro.targets, values), self.cp_group)
        return placed.view(-1, *rows.shape)

    @torch.no_grad()
    def compute_logprobs(self, batch: TrainBatch) -> TrainBatch:
        """The log-prob pass: fill in old_logprobs, entropies and what else the entropy method wants.

        Args:
            batch: all responses of the rollout, the same on every rank.
        """
        uses_gap = ENTROPY_METHODS[self.config.entropy.entropy_method].uses_gap

        def collect(micro: MicroBatch, hidden: Tensor, non_loss_data: bool = True) -> list[Tensor]:
            stats = [*self.token_stats(micro, hidden, top_p=self.config.entropy.entropy_top_p)]
            return [*stats, self.top_two_gap(micro, hidden)] if uses_gap else stats

        names = ["old_logprobs", "entropy", "top_p_entropy"] + ["top_two_gap"] * uses_gap
        return batch.replace(**dict(zip(names, self._collect(batch, collect, len(names)), strict=True)))

    @torch.no_grad()
    def top_tokens(self, batch: TrainBatch, count: int) -> tuple[Tensor, Tensor]:
        """A collective: the policy's likeliest tokens at the positions of the responses.

        Args:
            batch: any number of rows, the same on every rank.
            count: tokens a position.

        Returns:
            (ids int64, log-probs fp32 in nats), both [N, S, count], the likeliest first; 0 outside loss_mask.
        """
        rows = batch.num_responses
        filled = batch.select([*range(rows), *[0] * (-rows % self.smallest_batch)])

        def collect(micro: MicroBatch, hidden: Tensor, non_loss_data: bool = True) -> list[Tensor]:
            top = self.head.top_tokens(_selected(micro, hidden), count)
            return [*self._to_rows(micro, torch.cat([part.T.float() for part in top]))]  # ids < 2^24: exact

        values = self._collect(filled, collect, 2 * count)[:, :rows].permute(1, 2, 0)
        return values[..., :count].long(), values[..., count:]

    def _collect(self, batch: TrainBatch, collect: Any, count: int) -> Tensor:
        """A forward pass over all rows: what `collect` returns, [count, N, S] on every rank."""
        micro_batches, rows = self.micro_batches(batch)
        outputs = self._run_schedule(micro_batches, collect, forward_only=True, collect_non_loss_data=True)
        values = torch.zeros(count, *batch.tokens.shape, device=self.device)
        if self.is_last_stage:
            for indices, tensors in zip(rows, outputs, strict=True):
                values[:, indices] = torch.stack(tensors)
            dist.all_reduce(values, group=self.dp_group)
        self._broadcast_from_last_stage(values)
        return values

    @property
    def length_multiple(self) -> int:
        """S and T are multiples of this: of 8 for speed, of 2·cp pieces that tp ranks can share."""
        parallel = self.config.parallel
        return math.lcm(8, 2 * parallel.context_parallel_size * parallel.tensor_model_parallel_size)

    @property
    def smallest_batch(self) -> int:
        """A forward pass takes a multiple of so many responses: a micro-batch of one for every rank."""
        return self.dp_group.size() * self._micro_batch_multiple

    @property
    def _micro_batch_multiple(self) -> int:
        return self.pp_group.size() if len(self.model) > 1 else 1

    def hf_weights(self, named_on: Collection[int] = ()) -> Iterator[tuple[str, Tensor | None]]:
        """A collective: whole tensors under Hugging Face names on rank 0, the names alone on `named_on`."""
        return live.iterate_hf_weights(self.chunks, self.hf_config, named_on=named_on)

    def export(self, target: Path) -> None:
        """A collective: write the policy as a Hugging Face checkpoint."""
        live.export_hf_checkpoint(self.chunks, self.config.model.hf_checkpoint, self.hf_config, target)

    def micro_batches(self, batch: TrainBatch) -> tuple[list[MicroBatch], list[list[int]]]:
        """This rank's micro-batches of the rows of `batch`, and which rows each of them holds."""
        train, rank, ranks = self.config.train, self.dp_group.rank(), self.dp_group.size()
        multiple = self._micro_batch_multiple
        if not train.max_tokens_per_microbatch:
            rows = contiguous_rows(
                batch.num_responses, train.micro_batch_size, rank, ranks, multiple=multiple
            )
            return [padded_micro_batch(batch.select(r), self.share) for r in rows], rows
        lengths = packed_lengths(batch, self.share.size)
        packs = packed_rows(lengths, train.max_tokens_per_microbatch, ranks, multiple=multiple)
        # One length for all of a schedule: pipeline stages then need not tell each other theirs.
        longest = max(sum(lengths[i] for i in pack) for of_rank in packs for pack in of_rank)
        total = -(-longest // self.length_multiple) * self.length_multiple
        rows = packs[rank]
        return [packed_micro_batch(batch.select(r), total, self.share) for r in rows], rows

    def _run_schedule(self, micro_batches: list[MicroBatch], loss_func: Any, **options: Any) -> list[Any]:
        rows, length = micro_batches[0].tokens.shape
        iterators = [iter(micro_batches) for _ in self.model]
        schedule = get_forward_backward_func(self.pp_group.size(), self.config.parallel.virtual_stages)
        return schedule(
            forward_step_func=partial(self.forward_step, loss_func=loss_func),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=length * self.share.size,
            micro_batch_size=rows,
            **{"forward_only": False, **options},
        )

    def _broadcast_from_last_stage(self, tensor: Tensor) -> None:
        if self.pp_group.size() > 1:
            dist.broadcast(tensor, src=dist.get_process_group_ranks(self.pp_group)[-1], group=self.pp_group)


def _selected(micro: MicroBatch, hidden: Tensor) -> Tensor:
    """The head's inputs [n, h] for this context rank's response tokens."""
    return hidden.flatten(0, 1).index_select(0, micro.sources)
