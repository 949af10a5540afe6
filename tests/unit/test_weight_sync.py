"""The calls of a weight update, and failures that a real server can't be made to show."""

import errno
import json
import math
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from siren_megatron.rollout.http_json import http_json
from siren_megatron.rollout.transfer import shared_memory
from siren_megatron.rollout.weight_sync import (
    ServerSyncFailed,
    WeightPublisher,
    WeightSyncError,
    checkpoint_shapes,
)
from tests.fake_server import fake_server

WEIGHTS = {"a.weight": torch.zeros(4, 2), "b.weight": torch.zeros(3)}


@pytest.fixture
def publisher(tmp_path):
    """make(*answers) -> (WeightPublisher on a fake server for each, the calls of the first, those of all)."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))

    def make_server(name, url, sleep_level):
        transfer_dir = tmp_path / f"transfer-{name}"
        transfer_dir.mkdir(exist_ok=True)
        return SimpleNamespace(
            name=name,
            transfer_dir=transfer_dir,
            options=SimpleNamespace(
                model=model,
                dtype="float32",
                log_file=Path(f"vllm-{name}.log"),
                weight_transfer="shared-memory",
                sleep_level=sleep_level,
            ),
            describe_death=lambda: f"the vLLM server {name} died (exit code 0)",
            request=partial(http_json, url),
        )

    @contextmanager
    def make(*answers, tensors=WEIGHTS, sleep_level=0, **options):
        save_file({**tensors, "lm_head.weight": torch.zeros(2, 2)}, model / "model.safetensors")
        answers = answers or (lambda path, body: (200, {}),)
        calls = [[] for _ in answers]

        def recorded(answer, mine):
            def record(path, body):
                mine.append("abort" if body == {"update_info": {"abort": True}} else path)
                return answer(path, body)

            return record

        with ExitStack() as stack:
            servers = [
                make_server(str(i), stack.enter_context(fake_server(recorded(answer, mine))), sleep_level)
                for i, (answer, mine) in enumerate(zip(answers, calls, strict=True))
            ]
            yield WeightPublisher(servers, **options), calls[0], calls

    return make


UPDATE = [
    "/pause?mode=wait",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
]


def test_the_calls_of_an_update_and_its_statistics(publisher):
    with publisher() as (weights, calls, _):
        weights.init()
        stats = weights.update(iter(WEIGHTS.items()))
    assert calls == ["/init_weight_transfer_engine", *UPDATE]
    assert (stats.bytes, stats.num_tensors) == (44, 2)
    assert stats.seconds > 0


def received(body):
    """{name: tensor} of the chunk that a call to /update_weights tells of, as vLLM's worker reads it."""
    info = body["update_info"]
    dtypes = [getattr(torch, name) for name in info["dtype_names"]]
    sizes = [math.prod(s) * d.itemsize for s, d in zip(info["shapes"], dtypes, strict=True)]
    packed = torch.frombuffer(bytearray(Path(info["path"]).read_bytes()), dtype=torch.uint8)
    # Behind the last tensor a file may have room, which is not part of the chunk.
    parts = packed[: sum(sizes)].split(sizes)
    return {
        name: part.view(dtype).view(shape)
        for name, part, dtype, shape in zip(info["names"], parts, dtypes, info["shapes"], strict=True)
    }


def test_chunks_pass_through_one_file_that_is_gone_afterwards(publisher, tmp_path):
    seen, paths = {}, []
    parts = {f"{letter}.weight": torch.full((2,), float(ord(letter))) for letter in "abcde"}

    def answer(path, body):
        if path == "/update_weights":
            chunk = received(body)
            assert len(chunk) == 1
            seen.update(chunk)
            paths.append(body["update_info"]["path"])
        return 200, {}

    with publisher(answer, tensors=parts, chunk_bytes=8) as (weights, _, _):
        weights.update(iter(parts.items()))
        assert list((tmp_path / "transfer-0").iterdir()) == []
        weights.update(iter(parts.items()))
    assert seen.keys() == parts.keys()
    for name, tensor in parts.items():
        assert torch.equal(seen[name], tensor)
    assert len(paths) == 10 and len(set(paths)) == 1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": torch.zeros(4, 2)}, "lacks 1 tensors, among them b.weight"),
        ({"a.weight": torch.zeros(2, 4)}, r"a.weight of shape \(2, 4\); the checkpoint's is \(4, 2\)"),
        ({"c.weight": torch.zeros(1)}, "c.weight, which the served checkpoint has not"),
    ],
)
def test_wrong_tensors_end_the_update_before_it_is_finished(publisher, tensors, message):
    with publisher() as (weights, calls, _):
        with pytest.raises(WeightSyncError, match=message):
            weights.update(iter(tensors.items()))
    assert calls[-1] == "abort"
    assert "/finish_weight_update" not in calls
    assert "/resume" not in calls


def test_a_tensor_sent_twice_is_refused(publisher):
    with publisher() as (weights, _, _):
        with pytest.raises(WeightSyncError, match="has b.weight twice"):
            weights.update(iter([*WEIGHTS.items(), ("b.weight", torch.zeros(3))]))


def test_an_error_in_making_the_tensors_is_passed_on(publisher):
    def broken():
        yield "a.weight", torch.zeros(4, 2)
        raise ZeroDivisionError("in the trainer")

    with publisher() as (weights, calls, _):
        with pytest.raises(ZeroDivisionError):
            weights.update(broken())
    assert calls[-1] == "abort"
    assert "/resume" not in calls


def test_views_and_other_dtypes_are_sent_as_the_servers_own(publisher):
    tensors = {}

    def answer(path, body):
        if path == "/update_weights":
            tensors.update(received(body))
        return 200, {}

    whole = torch.arange(11.0)
    with publisher(answer) as (weights, _, _):
        weights.update(iter([("a.weight", whole[:8].view(2, 4).t()), ("b.weight", whole[8:].bfloat16())]))
    assert torch.equal(tensors["a.weight"], whole[:8].view(2, 4).t())
    assert torch.equal(tensors["b.weight"], torch.tensor([8.0, 9.0, 10.0]))


def test_full_shared_memory_is_told(publisher, monkeypatch, tmp_path):
    def full(path, flags, mode):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_memory, "os", SimpleNamespace(open=full, O_WRONLY=1, O_CREAT=64))
    with publisher() as (weights, calls, _):
        with pytest.raises(WeightSyncError, match=r"no room for a chunk .* \(No space left"):
            weights.update(iter(WEIGHTS.items()))
    assert "/update_weights" not in calls
    assert list((tmp_path / "transfer-0").iterdir()) == []


def test_the_next_chunk_is_made_while_one_is_loaded_and_no_more_than_that(publisher):
    events, two_made, lock = [], threading.Event(), threading.Lock()

    def answer(path, body):
        if path == "/update_weights" and "names" in body["update_info"]:
            name = body["update_info"]["names"][0]
            if name == "a.weight":
                assert two_made.wait(20)  # it comes while this one is under way
                time.sleep(0.2)  # a third would have the time to come
            with lock:
                events.append(f"loaded {name}")
        return 200, {}

    parts = {f"{letter}.weight": torch.zeros(1) for letter in "abcd"}

    def tensors():
        for name, tensor in parts.items():
            with lock:
                events.append(f"made {name}")
            if name == "c.weight":
                two_made.set()
            yield name, tensor

    with publisher(answer, tensors=parts, chunk_bytes=4) as (weights, _, _):
        weights.update(tensors())
    # b is a chunk that waits, and c has to come before it is known that b is whole.
    assert events[:4] == ["made a.weight", "made b.weight", "made c.weight", "loaded a.weight"]
    assert [event for event in events if event.startswith("loaded")] == [f"loaded {name}" for name in parts]


def test_a_sleeping_server_wakes_its_weights_before_and_its_cache_after_the_update(publisher):
    with publisher(sleep_level=2) as (weights, calls, _):
        weights.sleep()
        weights.update(iter(WEIGHTS.items()))
    assert calls == [
        "/sleep?level=2&mode=wait",
        "/pause?mode=wait",
        "/wake_up?tags=weights",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/wake_up?tags=kv_cache",
        "/reset_prefix_cache",
        "/resume",
    ]
    with publisher() as (weights, calls, _):
        weights.sleep()
    assert calls == []


@pytest.mark.parametrize("path", ["/pause?mode=wait", "/start_weight_update", "/finish_weight_update"])
def test_a_refused_call_is_an_error_and_never_resumes(publisher, path):
    def answer(called, body):
        return (500, {"error": {"message": "the engine is upset"}}) if called == path else (200, {})

    with publisher(answer) as (weights, calls, _):
        with pytest.raises(
            WeightSyncError, match="failed: HTTP 500: the engine is upset; vLLM's log: vllm-0.log"
        ):
            weights.update(iter(WEIGHTS.items()))
    assert "/resume" not in calls


def test_a_dead_server_and_one_that_hangs_are_told_apart(publisher):
    with publisher(lambda path, body: None) as (weights, _, _):
        with pytest.raises(WeightSyncError, match=r"died \(exit code 0\)"):
            weights.init()
    release = threading.Event()

    def hangs(path, body):
        release.wait(20)
        return 200, {}

    with publisher(hangs, timeout_s=0.3) as (weights, _, _):
        try:
            with pytest.raises(WeightSyncError, match=r"took longer than 0\.3 s"):
                weights.init()
        finally:
            release.set()


def test_shapes_are_read_from_the_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    save_file({"lm_head.weight": torch.zeros(2, 3)}, tmp_path / "model-00001.safetensors")
    save_file({"a.weight": torch.zeros(5)}, tmp_path / "model-00002.safetensors")
    assert checkpoint_shapes(tmp_path) == {"lm_head.weight": (2, 3), "a.weight": (5,)}
    with pytest.raises(ValueError, match="holds no"):
        checkpoint_shapes(tmp_path / "nothing")


def test_each_chunk_is_written_once_and_loaded_by_all_servers_side_by_side(publisher):
    paths = [[], []]
    both = threading.Barrier(2, timeout=20)

    def answer_of(number):
        def answer(path, body):
            if path == "/update_weights":
                paths[number].append(body["update_info"]["path"])
                both.wait()  # breaks where the second were only asked after the first has answered
            return 200, {}

        return answer

    with publisher(answer_of(0), answer_of(1), chunk_bytes=8) as (weights, _, calls):
        stats = weights.update(iter(WEIGHTS.items()))
    assert len(paths[0]) == 2 and paths[0] == paths[1]
    assert stats.bytes == 44
    # No server goes on before all have everything.
    for mine in calls:
        assert mine == [*UPDATE[:2], "/update_weights", *UPDATE[2:]]


@pytest.mark.parametrize("path", UPDATE)
@pytest.mark.parametrize("dies", [False, True])
def test_a_failing_server_is_named_and_all_take_the_next_update(publisher, path, dies):
    failing = True

    def answer(called, body):
        if failing and called == path and body != {"update_info": {"abort": True}}:
            return None if dies else (500, {"error": {"message": "the engine is upset"}})
        return 200, {}

    with publisher(lambda called, body: (200, {}), answer) as (weights, _, calls):
        reason = r"failed: the vLLM server 1 died" if dies else r"upset; vLLM's log: vllm-1\.log$"
        with pytest.raises(ServerSyncFailed, match=reason) as caught:
            weights.update(iter(WEIGHTS.items()))
        assert [server.name for server in caught.value.servers] == ["1"]
        assert calls[0][-1] == (path if path in (UPDATE[0], *UPDATE[4:]) else "abort")
        assert ("/resume" in calls[0]) == (path == "/resume")
        failing = False
        for mine in calls:
            mine.clear()
        weights.update(iter(WEIGHTS.items()))
        assert calls == [UPDATE, UPDATE]
