"""Which ranks start vLLM servers on their nodes: rank 0, or the first rank of every node."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Hosts:
    """The ranks with servers, in the order of their nodes; build it on every rank with `Hosts.agree`.

    Args:
        ranks: of the whole job; rank 0 is always first.
        node: which of them this rank is; None where it is none.
        group: of these ranks, over gloo; None where there is only one, or this rank is none.
    """

    ranks: tuple[int, ...] = (0,)
    node: int | None = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def agree(cls, where: str) -> Hosts:
        """A collective.

        Args:
            where: `--rollout-nodes`.
        """
        rank = dist.get_rank()
        leads = rank == 0 or (where == "all" and os.environ.get("LOCAL_RANK") == "0")
        everyone: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(everyone, leads)
        ranks = tuple(r for r, leading in enumerate(everyone) if leading)
        group = dist.new_group(list(ranks), backend="gloo") if len(ranks) > 1 else None
        return cls(ranks, ranks.index(rank) if leads else None, group if leads else None)

    @property
    def several(self) -> bool:
        return len(self.ranks) > 1

    def share(self, tensors: Iterator[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor]]:
        """A collective of the hosts: rank 0's tensors on all of them, one at a time, on the CPU.

        Args:
            tensors: the same names in the same order on every host, the tensors on rank 0; where there is
                one host, and on other ranks, it is passed through.
        """
        if self.group is None:
            yield from tensors
            return
        for name, tensor in tensors:
            told: list[Any] = [None if tensor is None else (tensor.shape, tensor.dtype)]
            dist.broadcast_object_list(told, src=0, group=self.group)
            shape, dtype = told[0]
            whole = torch.empty(shape, dtype=dtype) if tensor is None else tensor.detach().cpu().contiguous()
            dist.broadcast(whole, src=0, group=self.group)
            yield name, whole


def node_address() -> str:
    """This node's address on the way to torchrun's rendezvous, as the other nodes reach it.

    Raises:
        ValueError: torchrun's MASTER_ADDR is no host that can be reached.
    """
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "1"))
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"the rendezvous at {host}:{port} cannot be reached: {error}") from None
