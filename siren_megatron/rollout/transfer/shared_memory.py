"""Chunks as files in shared memory: for servers on this machine, on CPUs or any GPUs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from siren_megatron.rollout.transfer.chunk import Chunk
from siren_megatron.rollout.transfer.server_group import ServerGroup, ServerSyncFailed, WeightSyncError
from siren_megatron.rollout.transfer.transport import Transport


class SharedMemoryTransport(Transport):
    """Each chunk is a file that this process fills and all servers map: its bytes exist once.

    Within an update files are used again: to get new pages from the system takes longer than to fill them.
    """

    def __init__(self, group: ServerGroup) -> None:
        super().__init__(group)
        self._directory = group.servers[0].transfer_dir
        self._created = 0
        self._idle: list[Tensor] = []

    def allocate(self, size: int) -> Tensor:
        for number, file in enumerate(self._idle):
            if len(file) >= size:
                return self._idle.pop(number)[:size]
        return self._create(size)

    def send(self, chunk: Chunk) -> None:
        storage = chunk.buffer.untyped_storage()
        self.group.post("/update_weights", {"update_info": {"path": storage.filename, **chunk.metadata}})
        self._idle.append(torch.empty(0, dtype=torch.uint8).set_(storage))

    def release(self) -> None:
        self._idle.clear()
        for path in self._directory.glob("*.weights"):
            path.unlink(missing_ok=True)

    def _create(self, size: int) -> Tensor:
        # A new name each time, also in the next update: a server may still have the last one's file mapped.
        path = self._directory / f"{self._created:06d}.weights"
        self._created += 1
        try:
            with open(path, "xb") as file:
                # Shared memory that runs full while being written through a mapping is a SIGBUS, no error.
                os.posix_fallocate(file.fileno(), 0, size)
        except FileNotFoundError as error:
            # The directory goes with its server.
            server = self.group.servers[0]
            raise ServerSyncFailed(
                f"{self._directory} is gone: {server.describe_death()}", [server]
            ) from error
        except OSError as error:
            raise WeightSyncError(
                f"{self._directory} has no room for a chunk of weights of {size / 2**20:.0f} MiB "
                f"({error.strerror}): enlarge it (docker: --shm-size) or choose another transfer_dir"
            ) from error
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
