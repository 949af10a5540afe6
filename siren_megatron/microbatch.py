"""How responses become the inputs of a forward pass: padded or packed, over data and context ranks.

Legend: N = responses of an optimizer step, B = responses of a micro-batch, S = padded length of a row,
T = tokens of a packed micro-batch, cp = context-parallel size, dp = data-parallel size.

A padded micro-batch is [B, S]. A packed one is [1, T]: the rows' tokens one after the other, each row filled
up to a multiple of 2·cp, and a last fill-up to the T that all micro-batches share. Under context parallelism
every row is cut into 2·cp pieces, and rank r holds pieces r and 2·cp - 1 - r: under a causal mask each rank
then has the same work (Megatron's load-balanced split).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siren_megatron.batch import TrainBatch


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of this rank.

    Args:
        batch: its rows, whole and padded, [B, S]: what losses are computed on.
        tokens: what the model is fed, [B, S / cp] or [1, T / cp].
        position_ids: of the same shape.
        sources: [n] positions in the flattened `tokens` that predict response tokens of this context rank.
        targets: [n] the same response tokens' places in the flattened [B, S].
        packed: megatron-core's PackedSeqParams, or None where rows are padded.
    """

    batch: TrainBatch
    tokens: Tensor
    position_ids: Tensor
    sources: Tensor
    targets: Tensor
    packed: Any = None


@dataclass(frozen=True)
class ContextShare:
    """This rank's place among the context-parallel ranks."""

    rank: int = 0
    size: int = 1

    def positions(self, length: int, device: torch.device) -> Tensor:
        """This rank's positions of a row of `length` tokens (a multiple of 2·size), [length / size]."""
        if self.size == 1:
            return torch.arange(length, device=device)
        pieces = torch.arange(length, device=device).view(2 * self.size, -1)
        return torch.cat([pieces[self.rank], pieces[2 * self.size - 1 - self.rank]])


def padded_micro_batch(batch: TrainBatch, share: ContextShare) -> MicroBatch:
    """The rows of `batch` [B, S] as they are, this context rank's positions of each."""
    rows, length = batch.tokens.shape
    positions = share.positions(length, batch.tokens.device)
    mask = batch.loss_mask[:, positions]
    flat = torch.arange(rows * length, device=positions.device).view(rows, length)[:, positions]
    return MicroBatch(
        batch=batch,
        tokens=batch.tokens[:, positions].contiguous(),
        position_ids=positions.expand(rows, -1),
        sources=mask.flatten().nonzero().squeeze(1),
        targets=flat[mask],
    )


def packed_micro_batch(batch: TrainBatch, total: int, share: ContextShare) -> MicroBatch:
    """The rows of `batch` without their padding, one after the other, filled up to `total` tokens.

    Args:
        batch: [B, S].
        total: T, at least the sum of the rows' `packed_lengths`, a multiple of 2·cp.
    """
    from megatron.core.packed_seq_params import PackedSeqParams

    device = batch.tokens.device
    lengths = packed_lengths(batch, share.size)
    if sum(lengths) < total:
        lengths = [*lengths, total - sum(lengths)]
    tokens, position_ids, sources, targets, start = [], [], [], [], 0
    for row, length in enumerate(lengths):
        positions = share.positions(length, device)
        inside = positions < batch.tokens.size(1) if row < batch.num_responses else positions < 0
        real = positions[inside]
        values = torch.zeros_like(positions)
        if row < batch.num_responses:
            values[inside] = batch.tokens[row, real]
            wanted = torch.zeros_like(inside)
            wanted[inside] = batch.loss_mask[row, real]
            sources.append(start + wanted.nonzero().squeeze(1))
            targets.append(row * batch.tokens.size(1) + positions[wanted])
        tokens.append(values)
        position_ids.append(positions)
        start += len(positions)
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return MicroBatch(
        batch=batch,
        tokens=torch.cat(tokens).unsqueeze(0),
        position_ids=torch.cat(position_ids).unsqueeze(0),
        sources=torch.cat(sources),
        targets=torch.cat(targets),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
    )


def packed_lengths(batch: TrainBatch, context_size: int) -> list[int]:
    """Tokens that each row takes in a pack: up to its last label, filled up to a multiple of 2·cp."""
    multiple = 2 * context_size if context_size > 1 else 1
    last = batch.loss_mask.int().cumsum(1).argmax(1) + 2
    return [-(-length // multiple) * multiple for length in last.tolist()]


def contiguous_rows(num_rows: int, size: int, rank: int, ranks: int, *, multiple: int = 1) -> list[list[int]]:
    """Padded: this data-parallel rank's consecutive rows, in micro-batches of at most `size`, all alike.

    Args:
        num_rows: a multiple of ranks · multiple.
        multiple: the number of micro-batches is a multiple of this (interleaved pipelines need one).
    """
    share = num_rows // ranks
    size = max(n for n in range(1, size + 1) if share % (n * multiple) == 0)
    start = rank * share
    return [list(range(i, i + size)) for i in range(start, start + share, size)]


def packed_rows(
    lengths: Sequence[int], budget: int, ranks: int, *, multiple: int = 1
) -> list[list[list[int]]]:
    """Rows of every micro-batch of every data-parallel rank: balanced, and the same number for every rank.

    Rows go, longest first, to the rank with the fewest tokens so far, and within a rank to the emptiest
    micro-batch (longest processing time first: at most 4/3 of the best balance, Graham 1969).

    Args:
        lengths: tokens of each row.
        budget: most tokens of a micro-batch.
        ranks: dp.
        multiple: the number of micro-batches is a multiple of this (interleaved pipelines need one).

    Returns:
        [dp][micro-batches] lists of row numbers; none is empty.

    Raises:
        ValueError: a row is longer than the budget, or there are too few rows for every micro-batch.
    """
    if max(lengths) > budget:
        raise ValueError(
            f"--max-tokens-per-microbatch {budget} is less than a sequence of {max(lengths)} tokens"
        )
    of_rank = _spread(range(len(lengths)), lengths, ranks)
    count = max(-(-sum(lengths[i] for i in rows) // budget) for rows in of_rank)
    while True:
        count = -(-count // multiple) * multiple
        packs = [_spread(rows, lengths, count) for rows in of_rank]
        if not all(all(pack) for pack in packs):
            raise ValueError(
                f"{len(lengths)} responses are too few for {count} micro-batches on {ranks} rank(s)"
            )
        if all(sum(lengths[i] for i in pack) <= budget for rank in packs for pack in rank):
            return packs
        count += 1


def _spread(rows: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    filled: list[list[int]] = [[] for _ in range(bins)]
    sizes = [0] * bins
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        # Fewest rows first where sizes are equal, so that no bin stays empty while rows are left.
        emptiest = min(range(bins), key=lambda b: (sizes[b], len(filled[b]), b))
        filled[emptiest].append(row)
        sizes[emptiest] += lengths[row]
    return [sorted(b) for b in filled]
