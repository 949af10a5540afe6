"""Which transport a run has, how its server is started for it, and the broadcast without a GPU."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from siren_megatron.rollout.options import RolloutOptions
from siren_megatron.rollout.transfer.broadcast import BroadcastTransport
from siren_megatron.rollout.transfer.choice import check_sharing, weight_transfer
from siren_megatron.rollout.transfer.chunk import pack
from siren_megatron.rollout.transfer.server_group import ServerGroup, ServerSyncFailed
from siren_megatron.rollout.vllm_command import ServerOptions, server_arguments, server_environment

DEVICES = {"rollout_devices": "4,5"}


@pytest.mark.parametrize(
    ("options", "on_cpu", "transport"),
    [
        ({}, True, "shared-memory"),
        ({}, False, "ipc"),
        (DEVICES, False, "nccl"),
        ({"weight_transfer": "shared-memory"}, False, "shared-memory"),
        ({"weight_transfer": "shared-memory", **DEVICES}, False, "shared-memory"),
    ],
)
def test_auto_is_what_the_placement_needs(options, on_cpu, transport):
    assert weight_transfer(RolloutOptions(**options), on_cpu=on_cpu) == transport


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weight_transfer": "nccl"}, "--weight-transfer nccl .*--rollout-devices"),
        ({"weight_transfer": "ipc", **DEVICES}, "--weight-transfer ipc .*--rollout-devices 4,5"),
        ({"rollout_sleep": 1, **DEVICES}, "--rollout-sleep 1 .*--rollout-devices 4,5"),
    ],
)
def test_contradictions_name_both_options(options, named):
    with pytest.raises(ValueError, match=named):
        check_sharing(RolloutOptions(**options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weight_transfer": "ipc"}, "--weight-transfer ipc needs GPUs"),
        ({"weight_transfer": "nccl", **DEVICES}, "--weight-transfer nccl needs GPUs"),
        ({"rollout_sleep": 2}, "--rollout-sleep 2: on a CPU"),
    ],
)
def test_a_cpu_has_only_shared_memory(options, named):
    with pytest.raises(ValueError, match=named):
        weight_transfer(RolloutOptions(**options), on_cpu=True)


def test_a_server_is_started_for_its_transport_and_for_sleeping(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    log_file = Path("vllm.log")
    plain = ServerOptions(tmp_path, log_file)
    assert "--enable-sleep-mode" not in server_arguments(plain, 1, "m")
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in server_environment(plain, {}, "key")
    ipc = ServerOptions(tmp_path, log_file, device="cuda", weight_transfer="ipc", sleep_level=1)
    assert '{"backend": "siren_ipc"}' in server_arguments(ipc, 1, "m")
    assert "--enable-sleep-mode" in server_arguments(ipc, 1, "m")
    assert server_environment(ipc, {}, "key")["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    for wrong in (
        {"weight_transfer": "pigeon"},
        {"sleep_level": 3, "device": "cuda"},
        {"weight_transfer": "nccl"},  # on a CPU
        {"sleep_level": 1},
    ):
        with pytest.raises(ValueError):
            ServerOptions(tmp_path, log_file, **wrong)


def test_chunks_hold_what_fits_and_a_large_tensor_alone():
    tensors = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(9), "d": torch.ones(1, 1)}
    allocated = []

    def allocate(size):
        allocated.append(size)
        return torch.empty(size, dtype=torch.uint8)

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    chunks = list(pack(iter(tensors.items()), shapes, torch.bfloat16, 8, allocate))
    assert [chunk.names for chunk in chunks] == [["a", "b"], ["c"], ["d"]]
    # Never more than a chunk, but for one tensor; and no more than there is to come.
    assert allocated == [8, 18, 2] and [len(chunk.buffer) for chunk in chunks] == [8, 18, 2]
    assert chunks[0].sizes == [4, 4]
    assert chunks[2].metadata == {"names": ["d"], "dtype_names": ["bfloat16"], "shapes": [[1, 1]]}


class FakeRanks:
    """Stands for NCCL: what was joined, sent and given up, in order."""

    device = torch.device("cpu")
    rendezvous = {"nccl_unique_id_b64": "abc"}

    def __init__(self, join_fails=False):
        self.events, self._join_fails = [], join_fails

    def join(self, world_size):
        self.events.append(f"join {world_size}")
        if self._join_fails:
            raise RuntimeError("NCCL: unhandled system error")

    def broadcast(self, buffer):
        self.events.append(f"broadcast {bytes(buffer.tolist())}")

    def abort(self):
        self.events.append("abort")


def fake_group(answers, calls):
    """Two servers of 1 and 2 workers; answers = {path: what to do instead of answering at once}."""

    def server(number):
        def request(method, path, body, *, timeout_s):
            calls.append((number, path, body))
            return answers.get((number, path), lambda: (200, {}))()

        options = SimpleNamespace(log_file="vllm.log", tensor_parallel_size=number)
        return SimpleNamespace(number=number, options=options, request=request)

    return ServerGroup([server(1), server(2)], 30.0)


def one_chunk():
    def allocate(size):
        return torch.zeros(size, dtype=torch.uint8)

    return next(pack(iter([("a", torch.zeros(1))]), {"a": (1,)}, torch.float32, 4, allocate))


def test_every_worker_has_its_rank_and_a_chunk_is_one_broadcast():
    calls, ranks = [], FakeRanks()
    transport = BroadcastTransport(fake_group({}, calls), lambda: ranks)
    transport.open()
    transport.send(one_chunk())
    infos = {number: body["init_info"] for number, path, body in calls if path.startswith("/init")}
    # Rank 0 is the trainer, 1 the worker of the first server, 2 and 3 those of the second.
    assert {number: info["rank_offset"] for number, info in infos.items()} == {1: 1, 2: 2}
    assert all(info["world_size"] == 4 and info["packed"] for info in infos.values())
    update = {"update_info": {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}}
    assert [body for _, path, body in calls if path == "/update_weights"] == [update, update]
    assert ranks.events == ["join 4", f"broadcast {bytes(4)}"]


def test_a_server_that_fails_in_a_broadcast_takes_the_group_with_it():
    release = threading.Event()

    def hangs():
        release.wait(20)
        return 200, {}

    calls, ranks = [], FakeRanks()
    answers = {(1, "/update_weights"): hangs, (2, "/update_weights"): lambda: (500, {"error": "upset"})}
    transport = BroadcastTransport(fake_group(answers, calls), lambda: ranks)
    transport.open()
    try:
        with pytest.raises(ServerSyncFailed, match="HTTP 500: upset") as caught:
            transport.send(one_chunk())  # the other server waits in NCCL, and is not waited for
    finally:
        release.set()
    assert [server.number for server in caught.value.servers] == [1, 2]
    assert ranks.events[-1] == "abort"


def test_nccl_that_fails_to_start_is_told_in_its_words():
    transport = BroadcastTransport(fake_group({}, []), lambda: FakeRanks(join_fails=True))
    with pytest.raises(ServerSyncFailed, match="/init_weight_transfer_engine: NCCL: unhandled system error"):
        transport.open()
