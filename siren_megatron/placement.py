"""Which GPUs of the first node the vLLM server has. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping


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


def server_environment(
    text: str, environment: Mapping[str, str], *, local_ranks: int, gpus: int
) -> dict[str, str]:
    """The server's CUDA_VISIBLE_DEVICES: the chosen GPUs among those that this process may use.

    Args:
        text: `--rollout-devices`; its numbers count as torch's do, from 0.
        environment: of this process; its CUDA_VISIBLE_DEVICES is what SLURM allotted, where it set one.
        local_ranks: trainer ranks on this node; they have the GPUs 0 to local_ranks - 1.
        gpus: GPUs that torch sees.

    Raises:
        ValueError: there is no such GPU, or a trainer rank has it.
    """
    devices = parse_devices(text)
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
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}
