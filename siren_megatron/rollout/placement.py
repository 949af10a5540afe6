"""Which GPUs of the first node the vLLM server has. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parse_devices(text: str) -> tuple[int, ...]:
    """`4,5,6,7` -> (4, 5, 6, 7).

    Raises:
        ValueError: something else than different numbers with commas between them.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--rollout-devices {text!r} is no list of GPU numbers such as 4,5,6,7")
    devices = tuple(int(part) for part in parts)
    if len(set(devices)) < len(devices):
        raise ValueError(f"--rollout-devices {text} names a GPU twice")
    return devices


def server_devices(text: str | None, environment: Mapping[str, str], *, gpus: int) -> dict[str, Any]:
    """Fields of `ServerOptions` that give the server its GPUs; none where it shares the first rank's.

    Args:
        text: `--rollout-devices`; its numbers count as torch's do, from 0.
        environment: of this rank; CUDA_VISIBLE_DEVICES is what SLURM allotted, where it set one, and
            LOCAL_WORLD_SIZE how many ranks torchrun started here: they have the first GPUs.
        gpus: GPUs that torch sees.

    Raises:
        ValueError: there is no such GPU, or a trainer rank has it.
    """
    if text is None:
        return {}
    devices = parse_devices(text)
    local_ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    for device in devices:
        if device >= gpus:
            raise ValueError(f"--rollout-devices {text}: there is no GPU {device}, {gpus} are visible")
        if device < local_ranks:
            raise ValueError(
                f"--rollout-devices {text}: GPU {device} is that of a trainer rank "
                f"(ranks 0 to {local_ranks - 1} run on this node)"
            )
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = [visible[device] if visible else str(device) for device in devices]
    return {
        "extra_env": {"CUDA_VISIBLE_DEVICES": ",".join(names)},
        "tensor_parallel_size": len(devices),
    }
