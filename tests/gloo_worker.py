"""vLLM's own NCCL engine inside a worker without a GPU: gloo in NCCL's place, nothing in that of streams."""

import contextlib
from types import SimpleNamespace

import torch
from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

from siren_megatron.rollout.vllm_worker import WorkerExtension
from tests.gloo_group import GlooMember

__all__ = ["WorkerExtension"]


def join(init_info, parallel_config) -> GlooMember:
    rank = init_info.rank_offset + parallel_config.rank
    return GlooMember(init_info.master_address, init_info.master_port, rank, init_info.world_size)


nccl_engine.worker_init_process_group = join
packed_tensor._get_streams = lambda device, count: [SimpleNamespace(synchronize=lambda: None)] * count
torch.cuda.stream = lambda stream: contextlib.nullcontext()
torch.accelerator.current_device_index = lambda: 0
torch.accelerator.synchronize = lambda: None
