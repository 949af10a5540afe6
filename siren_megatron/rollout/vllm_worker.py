"""Inside vLLM's worker: receives new weights from shared memory. Loaded by --worker-extension-cls.

The trainer (`weight_sync`) writes safetensors files and posts their paths; the worker maps each file, loads
it through vLLM's layerwise reload and forgets it. The files hold full tensors under Hugging Face names: each
worker of a tensor-parallel group takes its own shard, as when it loads a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

from siren_megatron.rollout.vllm_command import TRANSFER_BACKEND


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Payload of /init_weight_transfer_engine: nothing has to be agreed on."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """Payload of /update_weights.

    Args:
        path: safetensors file with the next tensors; the trainer may unlink it after the answer.
        abort: give up the update under way; the call then fails on purpose, which ends vLLM's session.
    """

    path: str = ""
    abort: bool = False


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads weights from safetensors files that the trainer wrote on the same machine."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing to set up: the files' paths come with each update."""

    def start_weight_update(self) -> None:
        """Prepare every layer for new weights."""
        self._drop_unfinished_update()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Load one file; the base class synchronizes an accelerator, which a CPU worker has not."""
        typed_update_info = self.parse_update_info(update_info)
        self.receive_weights(typed_update_info)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load the tensors of one file into the model."""
        if update_info.abort:
            self._drop_unfinished_update()
            raise RuntimeError("the trainer gave up this weight update")
        with safe_open(update_info.path, framework="pt", device="cpu") as tensors:
            self.model.load_weights((name, tensors.get_tensor(name)) for name in tensors.keys())

    def finish_weight_update(self) -> None:
        """Put the new weights in force."""
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_head()

    def shutdown(self) -> None:
        """Nothing is held between updates."""

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


class WorkerExtension:
    """Mixed into vLLM's worker class; importing its module has registered the engine, and that is all."""


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, SharedMemoryWeightTransferEngine)
