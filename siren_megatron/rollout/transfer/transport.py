"""The interface of all transports, and which transport a server was started for."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from siren_megatron.rollout.transfer.chunk import Chunk
from siren_megatron.rollout.transfer.server_group import ServerGroup


class Transport(abc.ABC):
    """Moves chunks from this process into all servers of a group.

    The caller allocates and fills the next chunk while `send` is moving the one before, in another thread.

    Args:
        group: the servers, all started for this transport.
    """

    def __init__(self, group: ServerGroup) -> None:
        self.group = group

    def open(self) -> None:
        """Agree with the servers; once, before the first chunk.

        Raises:
            ServerSyncFailed: a server refused or does not answer.
        """
        self.initialize([{}] * len(self.group.servers))

    def initialize(self, init_infos: list[dict[str, Any]]) -> None:
        """The call that sets up vLLM's end, one payload for each server."""
        self.group.begin("/init_weight_transfer_engine", [{"init_info": info} for info in init_infos]).wait()

    @abc.abstractmethod
    def allocate(self, size: int) -> Tensor:
        """New memory for a chunk: uint8 [size].

        Raises:
            WeightSyncError: there is not enough.
        """

    @abc.abstractmethod
    def send(self, chunk: Chunk) -> None:
        """Return when every server has loaded the chunk, whose buffer came from `allocate`.

        Raises:
            ServerSyncFailed: a server failed.
        """

    def release(self) -> None:  # noqa: B027
        """Give back what the chunks of an update held; after each, also after a failed one."""

    def close(self) -> None:  # noqa: B027
        """Give back everything; the transport is of no use afterwards."""
