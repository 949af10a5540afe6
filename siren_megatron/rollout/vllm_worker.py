"""Inside vLLM's worker: receives new weights from the trainer. Loaded by --worker-extension-cls.

The trainer (`transfer`) packs full tensors under Hugging Face names into chunks, and each chunk goes through
vLLM's layerwise reload: each worker of a tensor-parallel group takes its own shard, as when it loads a
checkpoint. Over NCCL and CUDA IPC they are received by vLLM's own engines, shared memory is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

from siren_megatron.rollout.vllm_command import TRANSFER_BACKENDS


class Recovering(WeightTransferEngine):
    """What all engines have beyond vLLM's: an update that broke off leaves nothing behind.

    An update_info of {"abort": true} gives up the update under way; the call then fails on purpose, which
    ends vLLM's session.
    """

    def start_weight_update(self) -> None:
        """Prepare every layer for new weights."""
        self._drop_unfinished_update()
        super().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk."""
        if update_info.get("abort"):
            self._drop_unfinished_update()
            raise RuntimeError("the trainer gave up this weight update")
        super().update_weights(update_info)

    def finish_weight_update(self) -> None:
        """Put the new weights in force."""
        super().finish_weight_update()
        self._repack_tied_head()

    def _drop_unfinished_update(self) -> None:
        """Forget the weights of an update that broke off.

        vLLM's own start skips layers that are already being loaded: the next update's q, k and v would then
        be counted on top of the broken one's, and the layer be built before its last part has come.
        """
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                if info.kernel_tensors is not None:
                    _place_kernel_tensors(layer, info)
                info.reset()

    def _repack_tied_head(self) -> None:
        """Rebuild the packed copy of a tied output head.

        vLLM's CPU build computes logits from a copy that it packs when a layer is loaded. A tied head is
        never loaded (its weight is the embedding's): without this the old head stays, silently.
        """
        embeddings = {id(p) for n, p in self.model.named_parameters() if n.endswith("embed_tokens.weight")}
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead) and id(layer.weight) in embeddings:
                layer.quant_method.process_weights_after_loading(layer)


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Payload of /init_weight_transfer_engine: nothing has to be agreed on."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """Payload of /update_weights.

    Args:
        path: file with the next tensors, one after the other; after the answer the trainer may put others
            in their place, or unlink it.
        names: of the tensors, in the file's order.
        dtype_names: their types, such as "bfloat16".
        shapes: their shapes.
    """

    path: str
    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Maps files that the trainer wrote on the same machine."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing to set up: the files' paths come with each update."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class synchronizes an accelerator, which a CPU worker has not."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load the tensors of one file into the model."""
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize
            for shape, dtype in zip(update_info.shapes, dtypes, strict=True)
        ]
        # Not shared: a file that is missing or too short is an error then, and not made good with zeros.
        packed = torch.from_file(update_info.path, shared=False, size=sum(sizes), dtype=torch.uint8)
        self.model.load_weights(unpack_tensor(packed, update_info.names, update_info.shapes, dtypes, sizes))
        self._keep_unfinished(packed.untyped_storage().data_ptr())

    def _keep_unfinished(self, storage: int) -> None:
        """Copy what vLLM keeps of layers that have not all their tensors yet: the file gets others now."""
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == storage:
                        call.arguments[name] = value.clone()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class RecoveringSharedMemoryEngine(Recovering, SharedMemoryEngine):
    pass


class RecoveringIpcEngine(Recovering, IPCWeightTransferEngine):
    pass


class RecoveringNcclEngine(Recovering, NCCLWeightTransferEngine):
    pass


class WorkerExtension:
    """Mixed into vLLM's worker class; importing its module has registered the engines, and that is all."""


for _name, _engine in {
    "shared-memory": RecoveringSharedMemoryEngine,
    "ipc": RecoveringIpcEngine,
    "nccl": RecoveringNcclEngine,
}.items():
    WeightTransferEngineFactory.register_engine(TRANSFER_BACKENDS[_name], _engine)
