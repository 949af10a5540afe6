"""A broadcast from this process to all workers of all servers: NCCL, between different GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor

from siren_megatron.rollout.transfer.chunk import Chunk
from siren_megatron.rollout.transfer.server_group import ServerGroup, ServerSyncFailed
from siren_megatron.rollout.transfer.transport import Transport

_WHOLE_CHUNK = 2**62  # vLLM would cut a chunk into several broadcasts from here on


class BroadcastGroup(Protocol):
    """This process (rank 0) and the servers' workers; `nccl_group` is the real one.

    Attributes:
        device: where the buffers lie.
        rendezvous: what the others need to find this process, as vLLM's engine takes it.
    """

    device: torch.device
    rendezvous: dict[str, Any]

    def join(self, world_size: int) -> None:
        """Return when all ranks have joined. Raises RuntimeError."""

    def broadcast(self, buffer: Tensor) -> None:
        """Return when buffer, uint8 [bytes], is sent. Raises RuntimeError."""

    def abort(self) -> None:
        """Give up what another thread has under way; nothing can be sent any more."""


class BroadcastTransport(Transport):
    """vLLM's backend `nccl`, packed: a chunk is posted by its names, and its bytes are one broadcast.

    A broadcast needs all its ranks: when one server fails in it, the others may hang in it too. So a failure
    in `open` or `send` names all servers.

    Args:
        make_group: called by each `open`.
    """

    def __init__(self, group: ServerGroup, make_group: Callable[[], BroadcastGroup]) -> None:
        super().__init__(group)
        self._make_group = make_group
        self._ranks: BroadcastGroup | None = None

    def open(self) -> None:
        self.close()
        self._ranks = ranks = self._make_group()
        first_ranks, world_size = [], 1
        for server in self.group.servers:
            first_ranks.append(world_size)
            world_size += server.options.tensor_parallel_size
        wire = {**ranks.rendezvous, "world_size": world_size, "packed": True}
        wire["packed_buffer_size_bytes"] = _WHOLE_CHUNK
        bodies = [{"init_info": {**wire, "rank_offset": first}} for first in first_ranks]
        self._together("/init_weight_transfer_engine", bodies, lambda: ranks.join(world_size))

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._ranks.device)

    def send(self, chunk: Chunk) -> None:
        ranks, bodies = self._ranks, [{"update_info": chunk.metadata}] * len(self.group.servers)
        self._together("/update_weights", bodies, lambda: ranks.broadcast(chunk.buffer))

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.abort()
            self._ranks = None

    def _together(self, path: str, bodies: list[Any], action: Callable[[], None]) -> None:
        """Call the servers, and do what they wait for in their calls."""
        ours: Future[None] = Future()

        def act() -> None:
            try:
                action()
            except RuntimeError as error:
                ours.set_exception(ServerSyncFailed(f"{path}: {error}", self.group.servers))
            else:
                ours.set_result(None)

        calls = self.group.begin(path, bodies)
        # In a thread: where a server refuses, nobody comes to meet us, and this would wait for ever.
        threading.Thread(target=act, daemon=True).start()
        try:
            calls.wait(at_first_failure=True, beside=ours)
        except ServerSyncFailed as failure:
            self.close()
            raise ServerSyncFailed(str(failure), self.group.servers) from failure
