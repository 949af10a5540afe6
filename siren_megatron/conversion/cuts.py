"""Where a rank's shard lies in a whole megatron-core tensor, and where each Hugging Face tensor lies in it.

Every cut is rows of the whole tensor (columns for "columns"), and every Hugging Face tensor is rows of it in
blocks. So each direction is a copy of boxes, and any part can be read without the rest.

Legend: tp = tensor-parallel size; a box is (first row, last row + 1, first column, last column + 1), the
columns (0, 0) for a vector; "whole" is the megatron-core tensor without a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from siren_megatron.architecture import Architecture
from siren_megatron.families import Rule


class Box(NamedTuple):
    """A rectangle of a whole tensor; see the head of this file."""

    row: int
    row_end: int
    column: int = 0
    column_end: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.row_end - self.row
        return (rows, self.column_end - self.column) if self.column_end else (rows,)

    def of(self, tensor: Tensor) -> Tensor:
        """The view of a tensor under this box."""
        rows = tensor[self.row : self.row_end]
        return rows[:, self.column : self.column_end] if self.column_end else rows

    def rows(self, row: int, row_end: int) -> Box:
        """This box's columns in other rows."""
        return self._replace(row=row, row_end=row_end)


class Block(NamedTuple):
    """Rows of the whole tensor that are rows of one Hugging Face tensor."""

    row: int
    source: int
    source_row: int
    rows: int


class Readable(Protocol):
    """A tensor that can be read in parts: `files.FileArray`, or `InMemory`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read_into(self, out: Tensor, box: Box) -> None:
        """Fill `out`, contiguous and of the box's shape."""


class InMemory:
    """A tensor in memory as a `Readable`."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype

    def read_into(self, out: Tensor, box: Box) -> None:
        out.copy_(box.of(self.tensor))


def blocks(rule: Rule, architecture: Architecture) -> list[Block]:
    """How the whole tensor is laid out, top to bottom; rows of padding are in no block."""
    rows = [shape[0] for shape in architecture.source_shapes(rule)]
    if rule.cut != "qkv":
        starts = [sum(rows[:i]) for i in range(len(rows))]
        return [Block(start, i, 0, size) for i, (start, size) in enumerate(zip(starts, rows, strict=True))]
    result, row = [], 0
    for group in range(architecture.kv_heads):
        for source, size in enumerate(rows):
            share = size // architecture.kv_heads
            result.append(Block(row, source, group * share, share))
            row += share
    return result


def whole_shape(rule: Rule, architecture: Architecture, tp: int) -> tuple[int, ...]:
    """Shape of the whole tensor: tp decides the vocabulary's padding."""
    shapes = architecture.source_shapes(rule)
    rows = architecture.padded_vocab(tp) if rule.cut == "vocab" else sum(shape[0] for shape in shapes)
    return (rows, *shapes[0][1:])


def boxes(rule: Rule, architecture: Architecture, tp: int, rank: int) -> list[Box]:
    """What tensor rank `rank` of tp holds: its shard is these boxes of the whole tensor, one below the other.

    Raises:
        ValueError: tp does not divide what is cut.
    """
    rows, *columns = whole_shape(rule, architecture, tp)
    width = columns[0] if columns else 0
    if rule.cut == "replicated":
        return [Box(0, rows, 0, width)]
    if rule.cut == "columns":
        share = _share(width, tp, rule)
        return [Box(0, rows, rank * share, (rank + 1) * share)]
    if rule.cut == "qkv":
        _share(architecture.kv_heads, tp, rule)
    parts = len(rule.sources) if rule.cut == "gated" else 1
    part = rows // parts
    share = _share(part, tp, rule)
    starts = [i * part + rank * share for i in range(parts)]
    return [Box(start, start + share, 0, width) for start in starts]


def _share(size: int, tp: int, rule: Rule) -> int:
    if size % tp:
        raise ValueError(
            f"{tp} tensor ranks do not divide the {size} rows or heads of {rule.sources[0].name}"
        )
    return size // tp


def read_box(
    rule: Rule, architecture: Architecture, sources: Sequence[Readable], box: Box, out: Tensor | None = None
) -> Tensor:
    """A box of the whole tensor, read from the Hugging Face tensors; rows of padding are zero.

    Args:
        out: contiguous, of the box's shape; a new tensor when None.
    """
    if out is None:
        out = torch.empty(box.shape, dtype=sources[0].dtype)
    filled = 0
    for block in blocks(rule, architecture):
        start, end = max(box.row, block.row), min(box.row_end, block.row + block.rows)
        if start < end:
            source_row = block.source_row + start - block.row
            part = box.rows(source_row, source_row + end - start)
            sources[block.source].read_into(out[start - box.row : end - box.row], part)
            filled += end - start
    if filled < out.size(0):
        # Only a vocabulary is padded, at its end.
        out[filled:].zero_()
    return out


def read_shard(
    rule: Rule, architecture: Architecture, sources: Sequence[Readable], tp: int, rank: int
) -> Tensor:
    """The shard of one tensor rank, read from the Hugging Face tensors."""
    parts = boxes(rule, architecture, tp, rank)
    rows = sum(part.shape[0] for part in parts)
    out = torch.empty((rows, *parts[0].shape[1:]), dtype=sources[0].dtype)
    row = 0
    for part in parts:
        read_box(rule, architecture, sources, part, out[row : row + part.shape[0]])
        row += part.shape[0]
    return out


def read_source_rows(
    rule: Rule, architecture: Architecture, whole: Readable, source: int, row: int, out: Tensor
) -> None:
    """The inverse of `read_box`: rows of one Hugging Face tensor, read from the whole tensor.

    Args:
        source: which of the rule's tensors.
        row: the first row; `out` says how many.
        out: contiguous, filled.
    """
    width = whole.shape[1] if len(whole.shape) == 2 else 0
    for block in blocks(rule, architecture):
        start = max(row, block.source_row)
        end = min(row + out.size(0), block.source_row + block.rows)
        if block.source == source and start < end:
            whole_row = block.row + start - block.source_row
            whole.read_into(out[start - row : end - row], Box(whole_row, whole_row + end - start, 0, width))


def split(rule: Rule, architecture: Architecture, sources: Sequence[Tensor], tp: int) -> list[Tensor]:
    """Whole Hugging Face tensors -> the shards of all tensor ranks."""
    readable = [InMemory(source) for source in sources]
    return [read_shard(rule, architecture, readable, tp, rank) for rank in range(tp)]


def join(rule: Rule, architecture: Architecture, shards: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `split`: the shards in rank order (one is enough of a replicated parameter)."""
    if rule.cut == "replicated":
        return [shards[0]]
    tp = len(shards)
    whole = shards[0]
    if tp > 1:
        whole = shards[0].new_empty(whole_shape(rule, architecture, tp))
        for rank, shard in enumerate(shards):
            row = 0
            for box in boxes(rule, architecture, tp, rank):
                box.of(whole).copy_(shard[row : row + box.shape[0]])
                row += box.shape[0]
    parts: list[list[Tensor]] = [[] for _ in rule.sources]
    for block in blocks(rule, architecture):
        parts[block.source].append(whole[block.row : block.row + block.rows])
    return [rows[0] if len(rows) == 1 else torch.cat(rows) for rows in parts]
