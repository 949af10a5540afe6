"""Numbers of GPUs that plans are made with: memory, peak rates, links. Standard library only.

Peak rates are the makers' own (dense bfloat16, no sparsity), memory is what the driver reports as total.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its links.

    Args:
        memory_gib: memory in GiB.
        bf16_tflops: peak dense bfloat16 rate, in 1e12 floating-point operations a second.
        memory_gbps: memory bandwidth, in 1e9 bytes a second.
        link_gbps: to the other GPUs of its node, one direction, in 1e9 bytes a second.
        network_gbps: its share of the node's network, one direction, in 1e9 bytes a second.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    memory_gbps: float
    link_gbps: float
    network_gbps: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 39.4, 312, 1555, 300, 25),
        Gpu("a100-80gb", 79.3, 312, 2039, 300, 25),
        Gpu("h100-80gb", 79.6, 989, 3350, 450, 50),
        Gpu("h200-141gb", 139.8, 989, 4800, 450, 50),
        Gpu("b200-180gb", 178.4, 2250, 8000, 900, 50),
    )
}
"""Sources: NVIDIA's data sheets (A100, H100 SXM, H200 SXM, B200 SXM); one 200 or 400 Gb/s port a GPU."""


def find_gpu(name: str) -> Gpu:
    """A GPU by its name in `GPUS`.

    Raises:
        ValueError: it is not in the table.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name} is unknown (known: {', '.join(GPUS)})")
    return GPUS[name]
