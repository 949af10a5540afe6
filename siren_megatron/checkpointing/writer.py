"""Writing a checkpoint's files with megatron-core, at once or in the background, whole or not at all.

What differs from `dist_checkpointing.save` alone: a rank whose disk is full, or whose writer is killed, is
noticed by all ranks, where megatron-core's own would wait for it; every file's checksum is taken; and no
server process is started to carry the writers' results (it would import torch, and outlive a killed rank).
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import queue
import signal
import sys
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from siren_megatron.checkpointing import files

_FORMAT = ("torch_dist", 1)
_PR_SET_PDEATHSIG = 1  # Linux prctl number (sys/prctl.h)
_RANK_0_FILES = ("common.pt", "metadata.json", ".metadata")


class SaveError(RuntimeError):
    """A checkpoint could not be written; the same one line on every rank."""


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's: all ranks agree before its first collective, and its writer is within reach."""

    def __init__(self) -> None:
        super().__init__(*_FORMAT, thread_count=1)
        self.has_agreed = False

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        # Rank 0 has written common.pt by now, or failed to and left `save`.
        self.agree(None)
        return super().async_save(sharded_state_dict, checkpoint_dir)

    def agree(self, error: str | None) -> None:
        self.has_agreed = True
        agree(error)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *rest: Any) -> AsyncRequest:
        self.writer, self.table = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *rest)


class CheckpointWriter:
    """Writes one checkpoint at a time. Every method is a collective.

    Args:
        directory: parent of the run's checkpoints.
        asynchronous: write in a process forked from each rank while the training goes on.
        total_limit: finished checkpoints to keep; 0 = all.
    """

    def __init__(self, directory: Path, *, asynchronous: bool = False, total_limit: int = 0):
        self.directory, self.asynchronous, self.total_limit = directory, asynchronous, total_limit
        self._calls = AsyncCallsQueue()
        # megatron-core would start a server for a queue that `_write` does not need.
        filesystem_async._results_queue = queue.Queue()

    def write(self, content: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Begin a checkpoint, after the end of the one before; without `asynchronous` also end it.

        Args:
            content: a sharded state dict of megatron-core, its plain values the same on every rank.
            manifest: "step", "versions" and "layout".

        Raises:
            SaveError: it could not be written. Nothing of it is left, the one before is untouched.
        """
        self.wait()
        unfinished = self._begin(manifest["step"])
        try:
            strategy = self._plan(content, unfinished)
            request = self._request(strategy, unfinished, manifest)
            if self.asynchronous:
                self._schedule(request)
        except SaveError as error:
            self._give_up(unfinished)
            raise SaveError(self._explain(unfinished, error)) from None
        if not self.asynchronous:
            request.execute_sync()

    def poll(self) -> None:
        """Finish the checkpoint that is being written if all ranks' writers are done.

        Raises:
            SaveError: as `write`.
        """
        self._calls.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """As `poll`, and wait for the writers."""
        self._calls.maybe_finalize_async_calls(blocking=True)

    # ---------------------------------------------------------------- stages

    def _begin(self, step: int) -> Path:
        unfinished = self.directory / (files.step_name(step) + files.PARTIAL)
        error = None
        if dist.get_rank() == 0:
            try:
                files.begin(self.directory, step)
            except OSError as failure:
                error = files.one_line(failure, self.directory)
        try:
            agree(error)
        except SaveError as failure:
            raise SaveError(self._explain(unfinished, failure)) from None
        return unfinished

    def _plan(self, content: dict[str, Any], unfinished: Path) -> _Strategy:
        strategy = _Strategy()
        try:
            dist_checkpointing.save(content, str(unfinished), strategy, async_sharded_save=True)
        except SaveError:
            raise
        except (OSError, RuntimeError) as error:
            # Of all that is done here only rank 0's common.pt touches the disk, before the ranks agree.
            if strategy.has_agreed:
                raise
            strategy.agree(f"common.pt: {files.one_line(error, unfinished)}")
        return strategy

    def _request(self, strategy: _Strategy, unfinished: Path, manifest: dict[str, Any]) -> AsyncRequest:
        buckets = strategy.writer.write_buckets
        # Shared with the writer's process without a file system: nothing of it can be left behind.
        outcome = os.fdopen(os.memfd_create("siren-checkpoint"), "w+b")
        transforms = [strategy.writer.transforms] if hasattr(strategy.writer, "transforms") else []

        def write(outcome: IO[bytes], buckets: list[Any], transforms: list[Any]) -> None:
            if self.asynchronous:
                _settle_in_writer()
            pickle.dump(_write(buckets, transforms), outcome)
            outcome.flush()

        def finalize() -> None:
            self._finalize(strategy, unfinished, manifest, outcome)

        return AsyncRequest(
            async_fn=write,
            async_fn_args=(outcome, buckets, transforms),
            finalize_fns=[finalize],
            # megatron-core puts what this returns in the place of the second argument.
            preload_fn=lambda: FileSystemWriterAsync.preload_tensors(buckets, True),
        )

    def _schedule(self, request: AsyncRequest) -> None:
        error = None
        try:
            self._calls.schedule_async_request(request)
        except OSError as failure:
            error = f"its writer could not be started: {failure.strerror}"
        agree(error)

    def _give_up(self, unfinished: Path) -> None:
        for call in self._calls.async_calls:
            call.async_caller.close(abort=True)
        self._calls.async_calls.clear()
        dist.barrier()
        if dist.get_rank() == 0:
            files.remove(unfinished)

    def _finalize(
        self, strategy: _Strategy, unfinished: Path, manifest: dict[str, Any], outcome: IO[bytes]
    ) -> None:
        """Every rank's writer has ended: name the checkpoint, or remove it."""
        mine = _read_outcome(outcome)
        gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, gathered)
        error = None
        if gathered is not None:
            try:
                self._publish(strategy, unfinished, manifest, gathered)
            except Exception as failure:
                # Whatever it is, the other ranks wait to hear of it.
                told_already = isinstance(failure, SaveError)
                error = str(failure) if told_already else files.one_line(failure, self.directory)
                files.remove(unfinished)
                files.remove(self.directory / (files.POINTER + files.PARTIAL))
        told = [error]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise SaveError(self._explain(unfinished, told[0]))

    def _publish(
        self, strategy: _Strategy, unfinished: Path, manifest: dict[str, Any], gathered: list[dict[str, Any]]
    ) -> None:
        for rank, outcome in enumerate(gathered):
            if outcome["error"] is not None:
                raise SaveError(f"rank {rank}: {outcome['error']}")
        strategy.writer.finish(strategy.table, [outcome["results"] for outcome in gathered])
        save_config(CheckpointingConfig(*_FORMAT), str(unfinished))
        entries = {name: files.describe_file(unfinished / name, sync=True) for name in _RANK_0_FILES}
        for outcome in gathered:
            entries.update(outcome["files"])
        files.write_manifest(unfinished, {**manifest, "files": entries})
        final = files.publish(unfinished)
        try:
            files.delete_old(final, self.total_limit)
        except OSError as error:
            print(f"--save-total-limit: an old checkpoint could not be deleted: {error}", flush=True)

    def _explain(self, unfinished: Path, error: object) -> str:
        name = unfinished.name.removesuffix(files.PARTIAL)
        last = next(iter(files.candidates(self.directory)), None)
        return f"checkpoint {name} could not be written to {self.directory}: {error}; " + (
            f"the last good one is {last.name}" if last is not None else "there is none before it"
        )


def agree(error: str | None) -> None:
    """A collective: go on where no rank has an error.

    Raises:
        SaveError: the first rank's error, on every rank.
    """
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, text in enumerate(errors):
        if text is not None:
            raise SaveError(f"rank {rank}: {text}")


def _settle_in_writer() -> None:
    """In a forked writer: end with the rank, and leave alone what only the rank may free (GPU tensors)."""
    gc.disable()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _write(buckets: list[Any], transforms: list[Any]) -> dict[str, Any]:
    """Write this rank's files: {"results": for the table of contents, "files": checksums, "error"}."""
    written: dict[str, Any] = {"results": [], "files": {}, "error": None}
    for bucket in buckets:
        path, name = Path(bucket[0]), bucket[1]
        results, pending = queue.Queue(), queue.Queue()
        pending.put(0)
        FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, pending, use_fsync=True)
        _, result = results.get()
        try:
            if isinstance(result, Exception):
                raise result
            written["results"] += result
            written["files"][name] = files.describe_file(path)
        except Exception as error:
            # Whatever it is, the other ranks wait to hear of it.
            return {**written, "error": f"{name}: {files.one_line(error, path.parent)}"}
    return written


def _read_outcome(outcome: IO[bytes]) -> dict[str, Any]:
    with outcome:
        outcome.seek(0)
        content = outcome.read()
    if not content:
        return {"results": [], "files": {}, "error": "the process that writes its share was killed"}
    return pickle.loads(content)
