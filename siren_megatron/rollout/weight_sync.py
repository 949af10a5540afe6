"""Trainer's side of a weight update: full Hugging Face tensors -> chunks -> the running vLLM servers.

The tensors stream: while the servers load one chunk the next is filled, and there are never more than these
two, so the model is never whole in memory a second time. How chunks travel is a transport's matter
(`transfer`); `vllm_worker` is the other end. This module imports no vLLM.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from siren_megatron.conversion.files import HfReader
from siren_megatron.rollout.server import RolloutServer
from siren_megatron.rollout.transfer.broadcast import BroadcastTransport
from siren_megatron.rollout.transfer.chunk import pack
from siren_megatron.rollout.transfer.ipc import IpcTransport
from siren_megatron.rollout.transfer.nccl_group import NcclGroup
from siren_megatron.rollout.transfer.server_group import ServerGroup, ServerSyncFailed, WeightSyncError
from siren_megatron.rollout.transfer.shared_memory import SharedMemoryTransport

__all__ = [
    "ServerSyncFailed",
    "UpdateStats",
    "WeightPublisher",
    "WeightSyncError",
    "checkpoint_shapes",
]

TRANSPORTS = {
    "shared-memory": SharedMemoryTransport,
    "ipc": IpcTransport,
    "nccl": lambda group: BroadcastTransport(group, NcclGroup),
}
"""Values of `ServerOptions.weight_transfer`, each with what makes the transport of a group of servers."""


@dataclass(frozen=True)
class UpdateStats:
    """What one update moved.

    Args:
        bytes: size of all tensors, in bytes; counted once, however many servers there are.
        seconds: wall time from pausing to resuming, the caller's making of the tensors included.
        num_tensors: tensors sent.
    """

    bytes: int
    seconds: float
    num_tensors: int


def checkpoint_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face checkpoint's tensors, read from its safetensors headers.

    A tied output head (`tie_word_embeddings`) is left out: its weight is the embedding's.

    Raises:
        ValueError: the directory holds no safetensors file, or a damaged one.
    """
    shapes = {name: array.shape for name, array in HfReader(Path(model)).arrays.items()}
    if json.loads((Path(model) / "config.json").read_text()).get("tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    return shapes


class WeightPublisher:
    """Replaces the weights of running RolloutServers; one in the whole run, in one process of the trainer.

    Each chunk is filled once and loaded by all servers side by side. All of them are paused before the first
    chunk and none resumes before the last has everything: no two generate with different weights.

    Args:
        servers: at least one, ready, with the same model, dtype and transport.
        chunk_bytes: largest size of a chunk, in bytes; a larger single tensor is a chunk of its own.
        timeout_s: seconds that any single call may take, waiting for running requests included.
    """

    def __init__(
        self,
        servers: Sequence[RolloutServer],
        *,
        chunk_bytes: int = 128 * 2**20,
        timeout_s: float = 300.0,
    ) -> None:
        if chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes is {chunk_bytes}; it has to be positive")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; it has to be positive")
        options = servers[0].options
        self._group = ServerGroup(servers, timeout_s)
        self._transport = TRANSPORTS[options.weight_transfer](self._group)
        self._sleep_level = options.sleep_level
        self._chunk_bytes = chunk_bytes
        self._shapes = checkpoint_shapes(options.model)
        self._dtype = getattr(torch, options.dtype)

    def init(self) -> None:
        """Set up vLLM's end; call it once, before the first update.

        Raises:
            ServerSyncFailed: a server refused or does not answer.
        """
        self._transport.open()

    def sleep(self) -> None:
        """Free the GPU memory of vLLM's caches (and weights) until the next update, which wakes the servers.

        What is asked of them meanwhile waits. Nothing happens at sleep level 0.

        Raises:
            ServerSyncFailed: a server refused or does not answer.
        """
        if self._sleep_level:
            self._group.post(f"/sleep?level={self._sleep_level}&mode=wait")

    def update(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> UpdateStats:
        """Replace all weights: pause, wake, send, reset the prefix cache, resume.

        On failure the servers stay paused: none may generate with half of the new weights. The next
        successful update puts them right. (Only after the last chunk is in force everywhere can a server fail
        while the others go on: they have the new weights.)

        Args:
            named_tensors: every tensor of the checkpoint, full (unsharded), under its Hugging Face name, on
                any device; cast to the servers' dtype here. Tensors of one layer should follow each other. It
                is iterated in the calling thread. A tied head may be left out.

        Raises:
            WeightSyncError: a tensor is unknown, missing or of another shape, or shared memory is full.
            ServerSyncFailed: a server failed, died or took longer than timeout_s.
        """
        started = time.monotonic()
        self._group.post("/pause?mode=wait")
        # The caches sleep on: their memory is not needed before the weights are there.
        self._wake("weights")
        try:
            self._group.post("/start_weight_update")
            num_tensors, num_bytes = self._send(named_tensors)
            self._group.post("/finish_weight_update")
        except BaseException:
            self._group.abort_update()
            raise
        finally:
            self._transport.release()
        self._wake("kv_cache")
        # Pausing emptied the cache as well, by a parameter that vLLM calls deprecated.
        self._group.post("/reset_prefix_cache")
        self._group.post("/resume")
        return UpdateStats(num_bytes, time.monotonic() - started, num_tensors)

    def close(self) -> None:
        """Let go of the servers; it does not end them."""
        self._transport.close()

    def _wake(self, what: str) -> None:
        if self._sleep_level:
            torch.cuda.empty_cache()  # what this process keeps for later is room that vLLM needs now
            self._group.post(f"/wake_up?tags={what}")

    def _send(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> tuple[int, int]:
        sent: set[str] = set()
        total = 0
        chunks = pack(
            self._checked(named_tensors, sent),
            self._shapes,
            self._dtype,
            self._chunk_bytes,
            self._transport.allocate,
        )
        sending: Future[None] | None = None
        # One thread sends, in order. Leaving waits for it, whatever happens: no chunk is under way behind us.
        with ThreadPoolExecutor(1) as sender:
            for chunk in chunks:
                if sending is not None:
                    sending.result()
                total += len(chunk.buffer)
                sending = sender.submit(self._transport.send, chunk)
            if sending is not None:
                sending.result()
        return len(sent), total

    def _checked(
        self, named_tensors: Iterator[tuple[str, torch.Tensor]], sent: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors to send; every name that came is in `sent` afterwards."""
        for name, tensor in named_tensors:
            if name in sent:
                raise WeightSyncError(f"a weight update has {name} twice")
            sent.add(name)
            expected = self._shapes.get(name)
            if expected is None and name == "lm_head.weight":
                continue  # tied: the embedding stands for it
            if expected is None:
                raise WeightSyncError(f"a weight update has {name}, which the served checkpoint has not")
            if tuple(tensor.shape) != expected:
                raise WeightSyncError(
                    f"a weight update has {name} of shape {tuple(tensor.shape)}; "
                    f"the checkpoint's is {expected}"
                )
            yield name, tensor
        if missing := sorted(self._shapes.keys() - sent):
            raise WeightSyncError(f"a weight update lacks {len(missing)} tensors, among them {missing[0]}")
