"""Updates whose loss or gradient is not finite: skipped, kept for a look, and no more than a few in a row."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from siren_megatron.batch import TrainBatch

MAX_KEPT = 20
"""Batches that a run keeps: a fault that comes back again and again must not fill the disk."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row were not finite; the message is one line."""


def any_non_finite(values: list[float], device: torch.device) -> bool:
    """A collective of all ranks: whether a value is NaN or infinite on any of them.

    Args:
        values: this rank's own.
        device: of the collective's tensor.
    """
    bad = torch.tensor([float(not all(map(math.isfinite, values)))], device=device)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bool(bad.item())


class SkippedUpdates:
    """Counts skipped updates and keeps their batches.

    Args:
        directory: `<save>/bad_batches`, made when it is needed.
        max_in_a_row: so many one after the other are too many.
    """

    def __init__(self, directory: Path, max_in_a_row: int) -> None:
        self.directory, self.max_in_a_row = directory, max_in_a_row
        self._in_a_row = 0

    def applied(self) -> None:
        """An update was finite."""
        self._in_a_row = 0

    def skipped(self, batch: TrainBatch, metrics: Mapping[str, float], *, step: int, index: int) -> None:
        """An update was not: every rank says so.

        Args:
            batch: [N, S] of the update, the same on every rank; rank 0 writes it.
            metrics: what is known of the update.
            step, index: rollout step (counted from 0) and optimizer step on that rollout.

        Raises:
            NonFiniteError: it was one too many.
        """
        self._in_a_row += 1
        if dist.get_rank() == 0:
            note = self._keep(batch, metrics, step, index)
            norm = metrics["grad_norm"]
            print(f"step {step + 1}: an update was skipped, gradient norm {norm:g}; {note}", flush=True)
        if self._in_a_row >= self.max_in_a_row:
            raise NonFiniteError(
                f"step {step + 1}: the loss or gradient was not finite {self._in_a_row} times in a row, "
                f"--max-consecutive-skips {self.max_in_a_row}; the batches: {self.directory}"
            )

    def _keep(self, batch: TrainBatch, metrics: Mapping[str, float], step: int, index: int) -> str:
        name = f"step_{step + 1:06d}_update_{index}.safetensors"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if sum(1 for _ in self.directory.glob("*.safetensors")) >= MAX_KEPT:
                return f"{self.directory} holds {MAX_KEPT} batches already, this one is not kept"
            save_batch(self.directory / name, batch, {"step": step + 1, "index": index, "metrics": metrics})
        except (OSError, SafetensorError) as error:
            return f"its batch can't be written: {error}"
        return f"its batch: {self.directory / name}"


def save_batch(path: Path, batch: TrainBatch, about: Mapping[str, object]) -> None:
    """Write all tensors of a batch, under a temporary name first.

    Args:
        path: a .safetensors file; each field of TrainBatch is a tensor of it.
        about: JSON in the file's metadata, under "about"; NaN and infinities become texts.
    """
    tensors: dict[str, Tensor] = {
        field.name: getattr(batch, field.name).detach().cpu().clone().contiguous()
        for field in dataclasses.fields(batch)
    }
    unfinished = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, unfinished, metadata={"about": json.dumps(_plain(about), allow_nan=False)})
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
