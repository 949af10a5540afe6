"""The output head, left to the losses: the last stage gives hidden states, and only response tokens meet it.

megatron-core multiplies every position by the vocabulary, prompts and padding included, and copies the logits
from [s, b, V] to [b, s, V]. Here the last stage ends with its hidden states; `linear_token_stats` takes the
rows that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor


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
    head = None
    for chunk in chunks:
        model: GPTModel = unwrap_model(chunk)
        if model.post_process:
            # Another class for the same module: GPTModel builds the layer itself, and its parameters' names,
            # marks and checkpoints stay what they are.
            model.output_layer.__class__ = _DeferredHead
            tied = model.share_embeddings_and_output_weights
            head = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return head
