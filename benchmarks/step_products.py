"""The matrix products of a training step, alone: what torch on this machine cannot do faster.

Only the response tokens meet the output head.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Products:
    """Inputs of every product of one micro-batch.

    Args:
        pairs: (input [rows, in], weight [out, in], how often it occurs in the model).
        attention: query, key, value [B, heads, S, size].
        layers: how often attention occurs.
        micro_batches: of an optimizer step.
    """

    pairs: list[tuple[Tensor, Tensor, int]]
    attention: tuple[Tensor, Tensor, Tensor]
    layers: int
    micro_batches: int

    @classmethod
    def of(cls, work: dict[str, Any]) -> Products:
        """Those of benchmarks/step.py's work."""
        m, length = work["config"], work["prompt_tokens"] + work["tokens"]
        rows, hidden, layers = work["micro_batch"], m["hidden_size"], m["num_hidden_layers"]
        size = hidden // m["num_attention_heads"]
        key, ffn, vocab = m["num_key_value_heads"] * size, m["intermediate_size"], m["vocab_size"]
        shapes = [
            (rows * length, hidden, hidden + 2 * key, layers),
            (rows * length, hidden, hidden, layers),
            (rows * length, hidden, 2 * ffn, layers),
            (rows * length, ffn, hidden, layers),
            (rows * work["tokens"], hidden, vocab, 1),
        ]
        heads = torch.randn(3, rows, m["num_attention_heads"], length, size)
        return cls(
            [(torch.randn(r, i), torch.randn(o, i), count) for r, i, o, count in shapes],
            (heads[0], heads[1], heads[2]),
            layers,
            work["prompts_per_step"] * work["group"] // rows,
        )

    def forward(self) -> float:
        """Seconds of the products of a forward pass over all micro-batches."""
        return self._seconds(backward=False)

    def both(self) -> float:
        """Seconds of those of forward and backward passes."""
        return self._seconds(backward=True)

    def _seconds(self, *, backward: bool) -> float:
        total = 0.0
        for x, w, count in self.pairs:
            started = time.perf_counter()
            for _ in range(count):
                y = x @ w.t()
                if backward:
                    y @ w
                    y.t() @ x
            total += time.perf_counter() - started
        leaves = [part.detach().requires_grad_(backward) for part in self.attention]
        started = time.perf_counter()
        context = scaled_dot_product_attention(*leaves, is_causal=True)
        if backward:
            context.backward(torch.ones_like(context))
        total += self.layers * (time.perf_counter() - started)
        return total * self.micro_batches
