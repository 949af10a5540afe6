"""Tensors of a weight update, packed: a chunk is one run of bytes, with names and shapes beside it.

Each tensor is copied to its place as soon as it is there, so a transport gives the memory that it sends from
and no tensor is held twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Chunk:
    """Tensors that travel together.

    Args:
        buffer: uint8 [bytes], the tensors one after the other, row-major and in `dtype`.
        dtype: of all of them.
        names: their Hugging Face names, in the buffer's order.
        shapes: their shapes.
    """

    buffer: Tensor
    dtype: torch.dtype
    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [math.prod(shape) * self.dtype.itemsize for shape in self.shapes]

    @property
    def metadata(self) -> dict[str, Any]:
        """What vLLM's engines want to know of the tensors, in their words and ready for JSON."""
        dtype_name = str(self.dtype).removeprefix("torch.")
        return {
            "names": self.names,
            "dtype_names": [dtype_name] * len(self.names),
            "shapes": [list(shape) for shape in self.shapes],
        }


def pack(
    named_tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    chunk_bytes: int,
    allocate: Callable[[int], Tensor],
) -> Iterator[Chunk]:
    """Chunks of at most chunk_bytes; a larger tensor is a chunk of its own.

    Args:
        named_tensors: tensors of any dtype, device and strides, each at most once.
        shapes: of all tensors that will come.
        dtype: what they are sent in.
        chunk_bytes: size in bytes.
        allocate: bytes -> uint8 [at least so many], new memory.
    """
    left = sum(map(math.prod, shapes.values())) * dtype.itemsize
    chunk, used = None, 0
    for name, tensor in named_tensors:
        size = tensor.numel() * dtype.itemsize
        if chunk is not None and used + size > len(chunk.buffer):
            yield _filled(chunk, used)
            chunk, used = None, 0
        if chunk is None:
            chunk = Chunk(allocate(max(size, min(left, chunk_bytes))), dtype)
        place = chunk.buffer[used : used + size].view(dtype).view(tensor.shape)
        place.copy_(tensor.detach())
        chunk.names.append(name)
        chunk.shapes.append(tuple(tensor.shape))
        used += size
        left -= size
    if chunk is not None:
        yield _filled(chunk, used)


def _filled(chunk: Chunk, used: int) -> Chunk:
    """The chunk without the room behind its last tensor; on CUDA all copies are done."""
    chunk.buffer = chunk.buffer[:used]
    if chunk.buffer.is_cuda:
        torch.cuda.synchronize(chunk.buffer.device)  # another thread and another process read it
    return chunk
