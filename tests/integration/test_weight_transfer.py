"""Weights by broadcast into two real vLLM servers, gloo for NCCL; and what vLLM makes of an IPC payload."""

import json
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from siren_megatron.rollout import weight_sync
from siren_megatron.rollout.client import RolloutClient, RolloutServer, ServerOptions
from siren_megatron.rollout.transfer import ipc
from siren_megatron.rollout.transfer.broadcast import BroadcastTransport
from siren_megatron.rollout.transfer.chunk import pack
from siren_megatron.rollout.transfer.ipc import IpcTransport
from siren_megatron.rollout.weight_sync import WeightPublisher
from tests.gloo_group import GlooGroup
from tests.tiny_qwen import MAX_MODEL_LEN, TOLERANCE, largest_difference, make_model, randomize, weights_of

pytestmark = pytest.mark.vllm


def test_a_broadcast_reaches_every_server_and_a_broken_one_is_made_good(tmp_path, monkeypatch):
    """vLLM's NCCL engine and its consumer of packed tensors, on gloo: `tests/gloo_worker.py`."""
    model = make_model(tied=True)
    model.save_pretrained(tmp_path / "model")
    gloo = ("--worker-extension-cls", "tests.gloo_worker.WorkerExtension")
    gloo += ("--weight-transfer-config", json.dumps({"backend": "siren_nccl"}))
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                RolloutServer.start(
                    ServerOptions(
                        model=tmp_path / "model",
                        log_file=tmp_path / f"vllm-{number}.log",
                        max_model_len=MAX_MODEL_LEN,
                        extra_args=gloo,
                    )
                )
            )
            for number in range(2)
        ]
        for server in servers:
            server.wait_ready()
        broadcast = lambda group: BroadcastTransport(group, GlooGroup)  # noqa: E731
        monkeypatch.setitem(weight_sync.TRANSPORTS, "shared-memory", broadcast)
        publisher = WeightPublisher(servers, chunk_bytes=4096, timeout_s=60.0)
        publisher.init()

        def broken():
            for name, tensor in weights_of(model):
                yield name, tensor + 1
                if name.endswith("layers.1.self_attn.k_proj.weight"):
                    raise ZeroDivisionError("in the trainer")

        for seed in (21, 22):
            randomize(model, seed)
            stats = publisher.update(weights_of(model))
            assert stats.bytes == sum(parameter.nbytes for parameter in model.parameters())
            for server in servers:
                client = RolloutClient(server.url, 60.0, 64, server=server)
                groups = client.generate(
                    [[3, 5, 7], [11, 13]],
                    num_samples=4,
                    max_tokens=12,
                    temperature=1.0,
                    seed=seed,
                    stop_token_ids=[],
                )
                assert largest_difference(model, groups, 1.0) < TOLERANCE
            with pytest.raises(ZeroDivisionError):
                publisher.update(broken())
        publisher.close()


def test_vllm_finds_every_tensor_in_what_the_ipc_transport_posts(monkeypatch):
    """CUDA's handle of a buffer is a stand-in; the payload and vLLM's reading of it are the real ones."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import packed_ipc_consumer

    buffers = {}

    def reduce_tensor(buffer):
        buffers[buffer.data_ptr()] = buffer
        return None, (0, 1, 2, 3, 4, 5, 0, buffer.data_ptr())

    monkeypatch.setattr(ipc, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    bodies = []
    group = SimpleNamespace(
        servers=[None, None],
        begin=lambda path, posted: bodies.extend(posted) or SimpleNamespace(wait=lambda: None),
    )
    transport = IpcTransport(group)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 2)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def allocate(size):
        return torch.empty(size, dtype=torch.uint8)

    for chunk in pack(iter(tensors.items()), shapes, torch.bfloat16, 48, allocate):
        transport.send(chunk)
    assert len(bodies) == 4  # two chunks, each exported once for each of two servers
    received = {}
    for body in json.loads(json.dumps(bodies)):
        info = IPCWeightTransferUpdateInfo(**body["update_info"])
        received.update(
            packed_ipc_consumer(
                info.ipc_handles,
                info.names,
                info.shapes,
                info.dtype_names,
                info.tensor_sizes,
                device_index=0,
                importer=SimpleNamespace(rebuild=lambda arguments: buffers[arguments[7]]),
            )
        )
    assert received.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(received[name], tensor.bfloat16())
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION")
    with pytest.raises(ValueError, match="Refusing to deserialize"):
        IPCWeightTransferUpdateInfo(**bodies[0]["update_info"])
