"""CUDA IPC: chunks in this process's GPU memory, opened by a server on the same GPU."""

from __future__ import annotations

import base64
import pickle

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from siren_megatron.rollout.transfer.chunk import Chunk
from siren_megatron.rollout.transfer.transport import Transport


class IpcTransport(Transport):
    """vLLM's backend `ipc`, packed. The bytes never leave the GPU; only their handle is posted.

    Its payload is a pickle, which vLLM opens only with VLLM_ALLOW_INSECURE_SERIALIZATION=1: the server is
    started with it for this transport alone, and asks for its key before.
    """

    def open(self) -> None:
        self.initialize([{"packed": True}] * len(self.group.servers))

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    def send(self, chunk: Chunk) -> None:
        gpu = str(torch.cuda.get_device_properties(chunk.buffer.device).uuid)
        # torch counts one reader for one export: every server gets an export of its own.
        bodies = [{"update_info": _update_info(chunk, gpu)} for _ in self.group.servers]
        self.group.begin("/update_weights", bodies).wait()

    def release(self) -> None:
        torch.cuda.ipc_collect()  # frees what the servers have let go of


def _update_info(chunk: Chunk, gpu: str) -> dict[str, object]:
    _, handle = reduce_tensor(chunk.buffer)
    pickled = base64.b64encode(pickle.dumps({gpu: handle})).decode()
    return {**chunk.metadata, "tensor_sizes": chunk.sizes, "ipc_handles_pickled": pickled}
