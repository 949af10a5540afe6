"""The states of a rank's random generators, as plain tensors that go into a checkpoint."""

from __future__ import annotations

import random
import struct

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

_KEY = "rng_state"


def random_states(device: torch.device) -> dict[str, Tensor]:
    """This rank's states: Python's, NumPy's, torch's on the CPU and the GPU, megatron-core's by name.

    Returns:
        name -> [n], int64 of Mersenne Twisters and uint8 of torch's generators.
    """
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": _pack(words, gauss is not None, gauss or 0.0),
        "numpy": _pack([*keys.tolist(), position], bool(has_gauss), cached),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    tracker = get_cuda_rng_tracker().get_states()
    return states | {f"megatron.{name}": state.clone() for name, state in sorted(tracker.items())}


def restore(states: dict[str, Tensor], device: torch.device) -> None:
    """Put this rank's generators where `random_states` found them."""
    words, has_gauss, gauss = _unpack(states["python"])
    random.setstate((3, tuple(words), gauss if has_gauss else None))
    (*keys, position), has_gauss, cached = _unpack(states["numpy"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    tracker = get_cuda_rng_tracker()
    names = {name: f"megatron.{name}" for name in tracker.get_states()}
    tracker.set_states({name: states[key].clone() for name, key in names.items()})


def sharded(states: dict[str, Tensor]) -> dict[str, ShardedTensor]:
    """Each state as this rank's row of a tensor [ranks, n], which needs no pickle."""
    rows = (0, dist.get_rank(), dist.get_world_size())
    return {
        name: ShardedTensor.from_rank_offsets(f"{_KEY}/{name}", state.unsqueeze(0).clone(), rows)
        for name, state in states.items()
    }


def _pack(words, has_gauss: bool, gauss: float) -> Tensor:
    """[words..., whether a second normal number waits, that number's bits]."""
    (bits,) = struct.unpack("<q", struct.pack("<d", gauss))
    return torch.tensor([*words, int(has_gauss), bits], dtype=torch.int64)


def _unpack(packed: Tensor) -> tuple[list[int], bool, float]:
    *words, has_gauss, bits = packed.flatten().tolist()
    (gauss,) = struct.unpack("<d", struct.pack("<q", bits))
    return words, bool(has_gauss), gauss
