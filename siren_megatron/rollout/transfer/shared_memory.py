"""Chunks as files in shared memory: for servers on this machine, on CPUs or any GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from siren_megatron.rollout.transfer.chunk import Chunk
from siren_megatron.rollout.transfer.server_group import ServerGroup, ServerSyncFailed, WeightSyncError
from siren_megatron.rollout.transfer.transport import Transport


class SharedMemoryTransport(Transport):
    """Each chunk is a file that this process fills and all servers map: its bytes exist once."""

    def __init__(self, group: ServerGroup) -> None:
        super().__init__(group)
        self._directory = group.servers[0].transfer_dir
        self._files = 0

    def allocate(self, size: int) -> Tensor:
        # A new name each time: vLLM may still have the last file mapped, and truncating that would crash it.
        path = self._directory / f"{self._files:06d}.weights"
        self._files += 1
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
            path.unlink(missing_ok=True)
            raise WeightSyncError(
                f"{self._directory} has no room for a chunk of weights of {size / 2**20:.0f} MiB "
                f"({error.strerror}): enlarge it (docker: --shm-size) or choose another transfer_dir"
            ) from error
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)

    def send(self, chunk: Chunk) -> None:
        path = Path(chunk.buffer.untyped_storage().filename)
        try:
            self.group.post("/update_weights", {"update_info": {"path": str(path), **chunk.metadata}})
        finally:
            path.unlink(missing_ok=True)

    def release(self) -> None:
        for path in self._directory.glob("*.weights"):  # filled, but not sent because of a failure
            path.unlink(missing_ok=True)
