"""The calls of a weight update, and failures that a real server can't be made to show."""

import json
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from siren_megatron.rollout import weight_sync
from siren_megatron.rollout.http_json import http_json
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
    save_file({**WEIGHTS, "lm_head.weight": torch.zeros(2, 2)}, model / "model.safetensors")

    def make_server(name, url):
        transfer_dir = tmp_path / f"transfer-{name}"
        transfer_dir.mkdir(exist_ok=True)
        return SimpleNamespace(
            name=name,
            transfer_dir=transfer_dir,
            options=SimpleNamespace(model=model, dtype="float32", log_file=Path(f"vllm-{name}.log")),
            describe_death=lambda: f"the vLLM server {name} died (exit code 0)",
            request=partial(http_json, url),
        )

    @contextmanager
    def make(*answers, **options):
        answers = answers or (lambda path, body: (200, {}),)
        calls = [[] for _ in answers]

        def recorded(answer, mine):
            def record(path, body):
                mine.append("abort" if body == {"update_info": {"abort": True}} else path)
                return answer(path, body)

            return record

        with ExitStack() as stack:
            servers = [
                make_server(str(i), stack.enter_context(fake_server(recorded(answer, mine))))
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


def test_chunks_are_files_of_their_own_that_are_gone_afterwards(publisher, tmp_path):
    seen = []

    def answer(path, body):
        if path == "/update_weights":
            seen.append(checkpoint_names(body["update_info"]["path"]))
        return 200, {}

    def checkpoint_names(path):
        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())

    with publisher(answer, chunk_bytes=8) as (weights, _, _):
        weights.update(iter(WEIGHTS.items()))
    assert seen == [["a.weight"], ["b.weight"]]
    assert list((tmp_path / "transfer-0").iterdir()) == []


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
    received = {}

    def answer(path, body):
        if path == "/update_weights":
            with safe_open(body["update_info"]["path"], framework="pt") as tensors:
                received.update({name: tensors.get_tensor(name) for name in tensors.keys()})
        return 200, {}

    whole = torch.arange(11.0)
    with publisher(answer) as (weights, _, _):
        weights.update(iter([("a.weight", whole[:8].view(2, 4).t()), ("b.weight", whole[8:].bfloat16())]))
    assert torch.equal(received["a.weight"], whole[:8].view(2, 4).t())
    assert torch.equal(received["b.weight"], torch.tensor([8.0, 9.0, 10.0]))


def test_full_shared_memory_is_told_before_anything_is_written(publisher, monkeypatch):
    monkeypatch.setattr(weight_sync.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with publisher() as (weights, calls, _):
        with pytest.raises(WeightSyncError, match="MiB left, a chunk of weights needs"):
            weights.update(iter(WEIGHTS.items()))
    assert "/update_weights" not in calls


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
