"""The output head, left to the losses: the last stage gives hidden states, and only response tokens meet it.

megatron-core multiplies every position by the vocabulary, prompts and padding included, and copies the logits
from [s, b, V] to [b, s, V]. Here the last stage ends with its hidden states, and `OutputHead` takes the rows
that are asked for.

Legend: n = response tokens of a micro-batch on this context rank, h = hidden size, V = vocabulary,
tp = tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor

from siren_megatron.architecture import Architecture
from siren_megatron.config import Config
from siren_megatron.planning.memory_model import chunk_bytes, fuses_linear, state_bytes
from siren_megatron.vocab_parallel import TokenStats, TopPCounters, linear_token_stats
from siren_megatron.vocab_parallel.top_tokens import vocab_parallel_top_tokens
from siren_megatron.vocab_parallel.top_two import vocab_parallel_top_two_gap


class _DeferredHead(ColumnParallelLinear):
    """A head that hands on its input: whole on every tensor rank under sequence parallelism."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ):
        """[s, b, h], or [s / tp, b, h] under sequence parallelism -> ([s, b, h], None)."""
        # Backward sums the tensor ranks' gradients while it scatters them.
        return (gather_from_sequence_parallel_region(input_) if self.sequence_parallel else input_), None


def defer_output_head(chunks: Iterable[torch.nn.Module]) -> Tensor | None:
    """Let the chunks of this rank end with hidden states in place of logits.

    Args:
        chunks: from `build_model`, before they are wrapped for data parallelism.

    Returns:
        The head's weight [V/tp, h], the embedding's where they are tied; None on a rank without the head.
    """
    weight = None
    for chunk in chunks:
        model: GPTModel = unwrap_model(chunk)
        if model.post_process:
            # Another class for the same module: GPTModel builds the layer itself, and its parameters' names,
            # marks and checkpoints stay what they are.
            model.output_layer.__class__ = _DeferredHead
            tied = model.share_embeddings_and_output_weights
            weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return weight


class OutputHead:
    """What the losses want of the head, for hidden states [n, h], under the sampling temperature.

    Args:
        weight: from `defer_output_head`; None on a rank that calls no method.
        config: the run's options.
        architecture: of the model.
    """

    def __init__(self, weight: Tensor | None, config: Config, architecture: Architecture):
        self.weight, self._config, self._vocab_size = weight, config, architecture.vocab
        group = parallel_state.get_tensor_model_parallel_group()
        self._tp_group = group if group.size() > 1 else None
        self._state_bytes = sum(
            state_bytes(
                architecture,
                config.parallel,
                stage=parallel_state.get_pipeline_model_parallel_rank(),
                world_size=dist.get_world_size(),
                bf16=config.model.bf16,
            )
        )

    def token_stats(
        self, hidden: Tensor, labels: Tensor, *, top_p: float, counters: TopPCounters
    ) -> TokenStats:
        """Log-prob of the labels [n], entropy and top-p entropy, each [n].

        Args:
            top_p: mass of the top-p mask.
            counters: added to.
        """
        entropy = self._config.entropy
        return linear_token_stats(
            hidden,
            self.weight,
            labels,
            top_p=top_p,
            top_p_boundary=entropy.entropy_top_p_boundary,
            vocab_size=self._vocab_size,
            tp_group=self._tp_group,
            temperature=self._config.rollout.rollout_temperature,
            chunk_mb=chunk_bytes(entropy.entropy_chunk_mb, self._row_bytes(hidden)) / 2**20,
            path="fused" if self._fuses(hidden) else "logits",
            # Under sequence parallelism the gather before the head sums the gradients.
            reduce_hidden_grad=not self._config.parallel.sequence_parallel,
            counters=counters,
        )

    def _fuses(self, hidden: Tensor) -> bool:
        """Whether logits are computed by chunks, and again in the backward pass."""
        if not hidden.requires_grad:
            return True  # without a backward pass nothing is computed twice
        logits = hidden.size(0) * self._row_bytes(hidden)
        return fuses_linear(self._config.train.fused_linear, logits, self._state_bytes)

    def _row_bytes(self, hidden: Tensor) -> int:
        """Of the logits of one token on this rank."""
        return self.weight.size(0) * hidden.element_size()

    def top_two_gap(self, hidden: Tensor) -> Tensor:
        """Log-prob gap [n] of the two likeliest tokens, in nats; without gradient."""
        return vocab_parallel_top_two_gap(
            self._logits(hidden), vocab_size=self._vocab_size, tp_group=self._tp_group
        )

    def top_tokens(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probs, both [n, count], of the likeliest tokens; without gradient."""
        return vocab_parallel_top_tokens(
            self._logits(hidden), count, vocab_size=self._vocab_size, tp_group=self._tp_group
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = hidden @ self.weight.t()
        temperature = self._config.rollout.rollout_temperature
        return logits if temperature == 1.0 else logits / temperature
