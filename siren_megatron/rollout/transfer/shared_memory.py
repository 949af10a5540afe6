"""Chunks through a file in shared memory: for servers on this machine, on CPUs or any GPUs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from siren_megatron.rollout.transfer.chunk import Chunk
from siren_megatron.rollout.transfer.server_group import ServerGroup, ServerSyncFailed, WeightSyncError
from siren_megatron.rollout.transfer.transport import Transport


class SharedMemoryTransport(Transport):
    """Each chunk is written to the same file, which all servers map.

    Memory and file are used again within an update: to get new pages from the system takes longer than to
    fill them. Filling a mapping of the file would save a copy, but costs a fault for every page, and where
    shared memory runs full it is a SIGBUS, no error.
    """

    def __init__(self, group: ServerGroup) -> None:
        super().__init__(group)
        self._path = group.servers[0].transfer_dir / "chunk.weights"
        self._idle: list[Tensor] = []

    def allocate(self, size: int) -> Tensor:
        for number, memory in enumerate(self._idle):
            if len(memory) >= size:
                return self._idle.pop(number)[:size]
        return torch.empty(size, dtype=torch.uint8)

    def send(self, chunk: Chunk) -> None:
        self._write(chunk.buffer)
        self.group.post("/update_weights", {"update_info": {"path": str(self._path), **chunk.metadata}})
        self._idle.append(torch.empty(0, dtype=torch.uint8).set_(chunk.buffer.untyped_storage()))

    def release(self) -> None:
        self._idle.clear()
        # The next update has another file of this name: a server that failed may have this one mapped still.
        self._path.unlink(missing_ok=True)

    def _write(self, buffer: Tensor) -> None:
        """Put buffer, uint8 [bytes], at the file's start. It never shrinks: a server may have it mapped."""
        try:
            with open(os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(memoryview(buffer.numpy()))
        except FileNotFoundError as error:
            # The directory goes with its server.
            server = self.group.servers[0]
            raise ServerSyncFailed(f"{self._path} is gone: {server.describe_death()}", [server]) from error
        except OSError as error:
            raise WeightSyncError(
                f"{self._path} has no room for a chunk of weights of {len(buffer) / 2**20:.0f} MiB "
                f"({error.strerror}): enlarge it (docker: --shm-size) or choose another transfer_dir"
            ) from error
