"""Causal attention on `scaled_dot_product_attention`: padded or packed rows, whole or context-parallel.

Legend: s = positions of this context rank, b = micro-batch, t = packed tokens of this context rank,
np = query heads of this tensor rank, ng = its key-value heads, hn = head size, cp = context-parallel size.

Under context parallelism a rank keeps the queries of its two pieces of every row (see `microbatch.py`) and
gathers the keys and values of all ranks; in the backward pass their gradients are summed back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class CausalAttention(torch.nn.Module):
    """Megatron's core-attention interface: causal, grouped-query.

    Padded rows have their padding on the right, so the causal mask alone keeps real tokens from seeing it.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, pg_collection: Any = None, **_):
        super().__init__()
        self.softmax_scale = softmax_scale
        group = getattr(pg_collection, "cp", None)
        self.cp_group = group if group is not None and group.size() > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [s, b, np, hn] (packed: [t, np, hn]), key and value likewise with ng -> [s, b, np·hn]."""
        assert attention_bias is None
        if packed_seq_params is None:
            return self._rows(query, key, value).flatten(2)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
        size = 1 if self.cp_group is None else self.cp_group.size()
        if self.cp_group is not None:
            key, value = _gather_context(key, value, self.cp_group)
        outputs, start = [], 0
        for length in lengths:
            share = slice(start // size, (start + length) // size)
            # [cp, t, ...] gathered, else [t, ...]: the tokens of this row on every rank.
            k, v = (x[..., share, :, :].unsqueeze(-3) for x in (key, value))
            outputs.append(self._attend(query[share].unsqueeze(1), k, v).squeeze(1))
            start += length
        return torch.cat(outputs).unsqueeze(1).flatten(2)

    def _rows(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.cp_group is not None:
            key, value = _gather_context(key, value, self.cp_group)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [s, b, np, hn]; key and value [s, b, ng, hn], or [cp, s, b, ng, hn] when gathered."""
        if self.cp_group is None:
            return self._sdpa(query, key, value, is_causal=True)
        size, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = _in_order(key), _in_order(value)
        piece = query.size(0) // 2
        outputs = []
        for half, number in enumerate((rank, 2 * size - 1 - rank)):
            stop = (number + 1) * piece
            # Queries are the last `piece` positions of the prefix that they may see.
            mask = torch.ones(piece, stop, dtype=torch.bool, device=query.device).tril(stop - piece)
            part = query[half * piece : (half + 1) * piece]
            outputs.append(self._sdpa(part, key[:stop], value[:stop], attn_mask=mask))
        return torch.cat(outputs)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = key.size(1) != query.size(1)
        context = scaled_dot_product_attention(
            query, key, value, scale=self.softmax_scale, enable_gqa=grouped, **mask
        )
        return context.permute(2, 0, 1, 3)


def _in_order(gathered: Tensor) -> Tensor:
    """[cp, s, ...] of the ranks' pieces -> [cp·s, ...] in the row's own order."""
    size = gathered.size(0)
    pieces = gathered.unflatten(1, (2, -1))
    return torch.cat([pieces[r, 0] for r in range(size)] + [pieces[r, 1] for r in reversed(range(size))])


def _gather_context(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[s, ...] of key and value -> [cp, s, ...] of each, in one collective."""
    heads = key.size(-2)
    both = _GatherContext.apply(torch.cat([key, value], dim=-2), group)
    return both[..., :heads, :], both[..., heads:, :]


class _GatherContext(torch.autograd.Function):
    """All-gather forward, sum-scatter backward: every rank's queries send gradients to a key."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        shards = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(shards, local.contiguous(), group=group)
        return torch.stack(shards)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        local = torch.empty_like(gradient[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(local, gradient.flatten(0, 1).contiguous(), group=ctx.group)
        return local, None


class _SumOverContext(torch.autograd.Function):
    """All-reduce forward, identity backward: every rank goes on to compute the same loss of the sum."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def sum_over_context(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Each context rank's own values, zero elsewhere -> all values on every rank, differentiable."""
    return local if group.size() == 1 else _SumOverContext.apply(local, group)
