"""Weights into a real vLLM on GPUs: CUDA IPC and sleeping on one, NCCL between two. Not run without GPUs."""

from __future__ import annotations

import pytest
import torch

from siren_megatron.rollout.client import RolloutClient, RolloutServer, ServerOptions
from siren_megatron.rollout.weight_sync import WeightPublisher
from tests.tiny_qwen import MAX_MODEL_LEN, largest_difference, make_model, randomize, weights_of

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-2  # vLLM's kernels on a GPU may use TF32


def free_bytes() -> int:
    return torch.cuda.mem_get_info(0)[0]


def update_and_check(tmp_path, *, tied: bool = True, **options) -> None:
    """Three updates, after each of which vLLM's log-probs are those of the new weights."""
    model = make_model(tied)
    model.save_pretrained(tmp_path / "model")
    server_options = ServerOptions(
        model=tmp_path / "model",
        log_file=tmp_path / "vllm.log",
        max_model_len=MAX_MODEL_LEN,
        device="cuda",
        kv_cache_bytes=2**30,
        **options,
    )
    with RolloutServer.start(server_options) as server:
        server.wait_ready()
        publisher = WeightPublisher([server], chunk_bytes=4096, timeout_s=120.0)
        publisher.init()
        for seed in (31, 32, 33):
            if server_options.sleep_level:
                awake = free_bytes()
                publisher.sleep()
                assert free_bytes() - awake > 2**30 - 2**26, "the KV cache is freed"
            randomize(model, seed)
            publisher.update((name, tensor.cuda()) for name, tensor in weights_of(model))
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
        publisher.close()


@pytest.mark.gpus(1)
@pytest.mark.parametrize("sleep_level", [0, 1, 2])
def test_ipc_into_a_server_on_the_same_gpu(tmp_path, sleep_level):
    update_and_check(tmp_path, weight_transfer="ipc", sleep_level=sleep_level)


@pytest.mark.gpus(1)
def test_shared_memory_into_a_server_on_a_gpu(tmp_path):
    update_and_check(tmp_path, weight_transfer="shared-memory")


@pytest.mark.gpus(2)
def test_nccl_into_a_server_on_another_gpu(tmp_path):
    update_and_check(tmp_path, weight_transfer="nccl", extra_env={"CUDA_VISIBLE_DEVICES": "1"})
