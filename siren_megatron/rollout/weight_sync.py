"""Trainer's side of a weight update: full Hugging Face tensors -> shared memory -> the running vLLM servers.

The tensors stream: at most one chunk (a safetensors file in shared memory) is under way at a time, so the
model is never whole in memory a second time. `vllm_worker` is the other end. This module imports no vLLM.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from siren_megatron.conversion.files import HfReader
from siren_megatron.rollout.http_json import error_text
from siren_megatron.rollout.server import RolloutServer, ServerFailed


class WeightSyncError(RuntimeError):
    """The weights could not be replaced: the servers stay paused, and another complete update is needed."""


class ServerSyncFailed(WeightSyncError, ServerFailed):
    """They could not be replaced because a server died, hangs or fails by itself.

    Attributes:
        servers: those that failed; the others take a complete update as if nothing had happened.
    """

    def __init__(self, message: str, servers: Sequence[RolloutServer] = ()) -> None:
        super().__init__(message)
        self.servers = tuple(servers)


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

    Each chunk is written once and loaded by all servers side by side. All of them are paused before the first
    chunk and none resumes before the last has everything: no two generate with different weights.

    Args:
        servers: at least one, ready, with the same model and dtype, on this machine.
        chunk_bytes: size from which a chunk is sent, in bytes; a larger single tensor is a chunk of its own.
        timeout_s: seconds that any single call may take, waiting for running requests included.
    """

    def __init__(
        self,
        servers: Sequence[RolloutServer],
        *,
        chunk_bytes: int = 512 * 2**20,
        timeout_s: float = 300.0,
    ) -> None:
        if chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes is {chunk_bytes}; it has to be positive")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; it has to be positive")
        self._servers = tuple(servers)
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        options = self._servers[0].options
        self._shapes = checkpoint_shapes(options.model)
        self._dtype = getattr(torch, options.dtype)
        self._chunks_written = 0

    def init(self) -> None:
        """Set up vLLM's end; call it once, before the first update.

        Raises:
            ServerSyncFailed: a server refused or does not answer.
        """
        self._post("/init_weight_transfer_engine", {"init_info": {}})

    def update(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> UpdateStats:
        """Replace all weights: pause, send, reset the prefix cache, resume.

        On failure the servers stay paused: none may generate with half of the new weights. The next
        successful update puts them right. (Only after the last chunk is in force everywhere can a server fail
        while the others go on: they have the new weights.)

        Args:
            named_tensors: every tensor of the checkpoint, full (unsharded), under its Hugging Face name, on
                the CPU; cast to the server's dtype here. Tensors of one layer should follow each other; a
                yielded tensor must not be changed during the update. A tied head may be left out.

        Raises:
            WeightSyncError: a tensor is unknown, missing or of another shape, or shared memory is full.
            ServerSyncFailed: a server failed, died or took longer than timeout_s.
        """
        started = time.monotonic()
        self._post("/pause?mode=wait")
        try:
            self._post("/start_weight_update")
            num_tensors, num_bytes = self._send(named_tensors)
            self._post("/finish_weight_update")
        except BaseException:
            self._abort()
            raise
        # Pausing emptied the cache as well, by a parameter that vLLM calls deprecated.
        self._post("/reset_prefix_cache")
        self._post("/resume")
        return UpdateStats(num_bytes, time.monotonic() - started, num_tensors)

    def _send(self, named_tensors: Iterator[tuple[str, torch.Tensor]]) -> tuple[int, int]:
        sent: set[str] = set()
        total = 0
        chunk: dict[str, torch.Tensor] = {}
        chunk_size = 0
        for name, tensor in named_tensors:
            self._check(name, tensor, sent)
            sent.add(name)
            if name not in self._shapes:
                continue  # a tied head: the embedding stands for it
            chunk[name] = _compact(tensor, self._dtype)
            chunk_size += chunk[name].nbytes
            total += chunk[name].nbytes
            if chunk_size >= self._chunk_bytes:
                self._send_chunk(chunk, chunk_size)
                chunk, chunk_size = {}, 0
        missing = sorted(self._shapes.keys() - sent)
        if missing:
            raise WeightSyncError(f"a weight update lacks {len(missing)} tensors, among them {missing[0]}")
        if chunk:
            self._send_chunk(chunk, chunk_size)
        return len(sent), total

    def _check(self, name: str, tensor: torch.Tensor, sent: set[str]) -> None:
        if name in sent:
            raise WeightSyncError(f"a weight update has {name} twice")
        expected = self._shapes.get(name)
        if expected is None:
            if name == "lm_head.weight":
                return
            raise WeightSyncError(f"a weight update has {name}, which the served checkpoint has not")
        if tuple(tensor.shape) != expected:
            raise WeightSyncError(
                f"a weight update has {name} of shape {tuple(tensor.shape)}; the checkpoint's is {expected}"
            )

    def _send_chunk(self, chunk: dict[str, torch.Tensor], size: int) -> None:
        directory = self._servers[0].transfer_dir
        # A new name each time: vLLM may still have the last file mapped, and truncating that would crash it.
        path = directory / f"{self._chunks_written:06d}.safetensors"
        self._chunks_written += 1
        try:
            room = os.statvfs(directory)
            free = room.f_bavail * room.f_frsize
            # Shared memory that runs full while being written through a mapping is a SIGBUS, not an error.
            if free < size + 2**20:
                raise WeightSyncError(
                    f"{directory} has {free / 2**20:.0f} MiB left, a chunk of weights needs "
                    f"{size / 2**20:.0f} MiB: enlarge it (docker: --shm-size) or choose another transfer_dir"
                )
            save_file(chunk, path)
            self._post("/update_weights", {"update_info": {"path": str(path)}})
        except OSError as error:
            raise WeightSyncError(f"{path} can't be written: {error}") from error
        finally:
            path.unlink(missing_ok=True)

    def _abort(self) -> None:
        """Close vLLM's update sessions, so that the next update can start some. They answer with an error."""

        def abort(server: RolloutServer) -> None:
            try:
                server.request("POST", "/update_weights", {"update_info": {"abort": True}}, timeout_s=10.0)
            except (OSError, http.client.HTTPException):
                pass  # this server is gone or hangs: the error that brought us here says so

        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(abort, self._servers))

    def _post(self, path: str, body: Any = None) -> None:
        """The same call to all servers side by side; returns when every one has answered."""
        with ThreadPoolExecutor(len(self._servers)) as pool:
            errors = list(pool.map(lambda server: self._post_one(server, path, body), self._servers))
        failed = [(server, e) for server, e in zip(self._servers, errors, strict=True) if e is not None]
        if failed:
            servers, reasons = zip(*failed, strict=True)
            raise ServerSyncFailed("; ".join(reasons), servers)

    def _post_one(self, server: RolloutServer, path: str, body: Any) -> str | None:
        """None, or why it failed."""
        log_file = server.options.log_file
        try:
            status, answer = server.request("POST", path, body, timeout_s=self._timeout_s)
        except TimeoutError:
            return f"{path} took longer than {self._timeout_s:g} s; vLLM's log: {log_file}"
        except (OSError, http.client.HTTPException) as error:
            return f"{path} failed: {server.describe_death()} ({error!r})"
        if status != 200:
            return f"{path} failed: HTTP {status}: {error_text(answer)}; vLLM's log: {log_file}"
        return None


def _compact(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor on the CPU in dtype, contiguous and with a storage of its own (safetensors wants both)."""
    tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
