"""Stands for NCCL where there is no GPU: the same broadcast over gloo, for trainer and vLLM's worker."""

from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore

TIMEOUT = timedelta(seconds=60)


class GlooGroup:
    """`BroadcastGroup` of the trainer; it is rank 0 and has the store."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, None, True, timeout=TIMEOUT, wait_for_workers=False)
        self.rendezvous = {"master_address": "127.0.0.1", "master_port": self._store.port}
        self._group = None

    def join(self, world_size: int) -> None:
        self._group = ProcessGroupGloo(self._store, 0, world_size, TIMEOUT)

    def broadcast(self, buffer: Tensor) -> None:
        self._group.broadcast(buffer, 0).wait()

    def abort(self) -> None:
        self._group = self._store = None


class GlooMember:
    """What vLLM's engine wants of PyNcclCommunicator."""

    def __init__(self, address: str, port: int, rank: int, world_size: int) -> None:
        store = TCPStore(address, port, None, False, timeout=TIMEOUT)
        self._group = ProcessGroupGloo(store, rank, world_size, TIMEOUT)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        self._group.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        self._group = None
