"""What the ranks of a run tell each other besides tensors: who was asked to stop, what rank 0 wants of all.

Over gloo on the CPU also where NCCL carries the tensors: a rank may wait here for as long as vLLM generates,
which NCCL's watchdog takes for a hang.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

import torch
import torch.distributed as dist

_FAILED_KEY = "siren_megatron/failed"
# A rank that dies breaks its connections, and the others notice: this is for no case that is known.
_TIMEOUT = datetime.timedelta(days=7)


class Control:
    """A collective to build: a group of all ranks."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def agree(self, value: int) -> int:
        """A collective: the largest of the ranks' values."""
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def tell(self, command: int, argument: int = 0) -> None:
        """On rank 0: the command that the others `hear`."""
        dist.broadcast(torch.tensor([command, argument]), src=0, group=self._group)

    def hear(self) -> tuple[int, int]:
        """On the other ranks: wait for rank 0's next command; it and its argument."""
        command = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(command, src=0, group=self._group)
        return tuple(command.tolist())

    def gather(self, value: Any) -> list[Any] | None:
        """A collective: the ranks' values, in rank order, on rank 0; None on the others."""
        values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values


def mark_failed() -> None:
    """Tell all ranks that this one gave up; without a word if they cannot be reached."""
    with contextlib.suppress(RuntimeError, ValueError):
        dist.distributed_c10d._get_default_store().set(_FAILED_KEY, "yes")


def another_rank_failed() -> bool:
    """Whether some rank has called `mark_failed`; never waits."""
    try:
        return dist.distributed_c10d._get_default_store().check([_FAILED_KEY])
    except (RuntimeError, ValueError):
        return False  # the store went with the launcher that kept it; the ranks may all be well
