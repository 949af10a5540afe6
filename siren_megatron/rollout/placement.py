"""Which GPUs of a node its vLLM servers have. Standard library only."""

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


def split_devices(text: str | None, tensor_parallel: int) -> list[tuple[int, ...]]:
    """GPUs of each server of a node; none where a server shares the first rank's.

    Args:
        text: `--rollout-devices`.
        tensor_parallel: `--rollout-tensor-parallel-size`; 0 = one server has all of them.

    Raises:
        ValueError: they cannot be shared out.
    """
    if text is None:
        return []
    devices = parse_devices(text)
    size = tensor_parallel or len(devices)
    if len(devices) % size:
        raise ValueError(
            f"--rollout-tensor-parallel-size {size} does not divide the {len(devices)} GPU(s) of "
            f"--rollout-devices {text}"
        )
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def server_devices(
    text: str | None,
    environment: Mapping[str, str],
    *,
    gpus: int,
    servers: int = 1,
    tensor_parallel: int = 0,
) -> list[dict[str, Any]]:
    """For each server of a node the fields of `ServerOptions` that give it its GPUs.

    Args:
        text: `--rollout-devices`; its numbers count as torch's do, from 0. None: no fields.
        environment: of this rank; CUDA_VISIBLE_DEVICES is what SLURM allotted, where it set one, and
            LOCAL_WORLD_SIZE how many ranks torchrun started here: they have the first GPUs.
        gpus: GPUs that torch sees.
        servers: how many without `--rollout-devices`.
        tensor_parallel: `--rollout-tensor-parallel-size`.

    Raises:
        ValueError: there is no such GPU, or a trainer rank has it.
    """
    if text is None:
        if servers > 1 and gpus:
            raise ValueError(
                f"--rollout-num-servers {servers} is for CPUs; here it needs --rollout-devices with "
                "--rollout-tensor-parallel-size"
            )
        return [{}] * servers
    local_ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    for device in parse_devices(text):
        if device >= gpus:
            raise ValueError(f"--rollout-devices {text}: there is no GPU {device}, {gpus} are visible")
        if device < local_ranks:
            raise ValueError(
                f"--rollout-devices {text}: GPU {device} is that of a trainer rank "
                f"(ranks 0 to {local_ranks - 1} run on this node)"
            )
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [
        {
            "extra_env": {
                "CUDA_VISIBLE_DEVICES": ",".join(visible[d] if visible else str(d) for d in devices)
            },
            "tensor_parallel_size": len(devices),
        }
        for devices in split_devices(text, tensor_parallel)
    ]
