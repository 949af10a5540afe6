"""What happens in which order when a server fails; real ones fail in tests/integration/test_chaos.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from siren_megatron.config import Config
from siren_megatron.rollout import service as rollout_service
from siren_megatron.rollout.client import RolloutError, ServerFailed
from siren_megatron.rollout.service import RolloutService
from siren_megatron.rollout.weight_sync import ServerSyncFailed, UpdateStats, WeightSyncError

DONE, GIVE_WEIGHTS, ABORT = 0, 1, 2


class World:
    """Stands for servers, their clients and the other ranks; `events` is what happened, in order."""

    def __init__(self, monkeypatch):
        self.events, self.failures, self.servers = [], [], 0
        for name in ("RolloutServer", "RolloutClient", "WeightPublisher", "HealthMonitor"):
            monkeypatch.setattr(rollout_service, name, getattr(self, name))
        self.RolloutServer.start = self.start

    def fail(self, *what):
        """The next calls of the given names fail, each once."""
        self.failures += what

    def happen(self, event, error=ServerFailed):
        self.events.append(event)
        if event.split()[0] in self.failures:
            self.failures.remove(event.split()[0])
            raise error(f"no {event}")

    class RolloutServer:
        pass

    def start(self, options):
        self.servers += 1
        number = self.servers
        return SimpleNamespace(
            url="",
            wait_ready=lambda: self.happen(f"ready {number}", RolloutError),
            stop=lambda: self.happen(f"stop {number}"),
        )

    def RolloutClient(self, url, timeout, in_flight, *, server, request_retries):
        def generate(prompts, *, stream_ids, on_group, seed, **_):
            for k, (prompt, stream) in enumerate(zip(prompts, stream_ids, strict=True)):
                self.happen(f"generate {prompt} {stream}")
                on_group(k, [f"{prompt} {seed} {stream}"])
            return [[f"{prompt} {seed} {stream}"] for prompt, stream in zip(prompts, stream_ids, strict=True)]

        return SimpleNamespace(generate=generate, num_retries=0, num_dropped=0)

    def WeightPublisher(self, servers):
        def update(weights):
            name, _ = next(weights)
            self.happen(f"update {name}", self.sync_error)
            self.events += [f"update {name}" for name, _ in weights]
            return UpdateStats(bytes=12, seconds=0.5, num_tensors=2)

        return SimpleNamespace(
            init=lambda: None, update=update, sleep=lambda: self.happen("sleep"), close=lambda: None
        )

    sync_error = ServerSyncFailed

    def HealthMonitor(self, server, limit_s):
        return SimpleNamespace(close=lambda: None)


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


@pytest.fixture
def make(world, tmp_path):
    """make(max_restarts) -> a connected service of rank 0; what the others hear is in world.events."""

    def make(max_restarts=3, is_main=True, heard=()):
        config = Config.of(
            hf_checkpoint=tmp_path, prompt_data=tmp_path, save=tmp_path, rollout_max_restarts=max_restarts
        )
        commands = iter(heard)
        control = SimpleNamespace(
            tell=lambda c: world.events.append(f"tell {c}"), hear=lambda: next(commands)
        )

        def weights():
            for name in ("a", "b"):
                world.events.append(f"give {name}")
                yield name, None

        service = RolloutService(config, None, control, is_main=is_main, report=world.events.append)
        service.connect(weights)
        world.events.clear()
        return service

    return make


ARGUMENTS = dict(num_samples=1, max_tokens=4, temperature=1.0, seed=7, stop_token_ids=[0])


def test_only_what_was_lost_is_asked_again_with_its_own_stream(world, make):
    service = make()
    failed = []

    def fail_at_the_second(index, samples):
        failed.append(index)
        if index == 0:
            world.fail("generate")

    groups = service.generate(["x", "y", "z"], **ARGUMENTS, on_group=fail_at_the_second)
    assert groups == [["x 7 0"], ["y 7 1"], ["z 7 2"]]
    assert failed == [0, 1, 2]
    assert [e for e in world.events if "starting" not in e] == [
        *("generate x 0", "generate y 1"),
        *("stop 1", "ready 2", "tell 1", "give a", "update a", "give b", "update b"),
        *("generate y 1", "generate z 2"),
    ]
    assert service.pop_counts() == {"rollout_restarts": 1, "rollout_retries": 0, "rollout_dropped": 0}
    assert service.pop_counts()["rollout_restarts"] == 0


def test_a_server_that_fails_to_sleep_has_a_successor_with_the_weights_that_does(world, make):
    service = make()
    world.fail("sleep")
    service.sleep()
    assert [e for e in world.events if "starting" not in e] == [
        *("sleep", "stop 1", "ready 2", "tell 1", "give a", "update a", "give b", "update b", "sleep"),
    ]
    assert service.sync_metrics == {"weight_sync_bytes": 12, "weight_sync_seconds": 0.5}


def test_a_failed_update_leaves_no_rank_behind_in_the_collective(world, make):
    service = make()
    world.fail("update")
    service.update_weights()
    gives = [e for e in world.events if e.startswith(("give", "tell"))]
    assert gives == ["tell 1", "give a", "give b"] * 2, "the tensors are made to the end, then all anew"


def test_a_server_that_does_not_start_again_is_tried_as_often_as_allowed(world, make):
    service = make(max_restarts=2)
    world.fail("generate", "ready", "ready")
    with pytest.raises(
        RolloutError, match="no ready 3; vLLM was started again 2 .*--rollout-max-restarts 2"
    ) as caught:
        service.generate(["x"], **ARGUMENTS)
    assert not isinstance(caught.value, ServerFailed) and "\n" not in str(caught.value)
    assert [e for e in world.events if e.startswith(("ready", "stop"))] == [
        "stop 1",
        "ready 2",
        "stop 2",
        "ready 3",
    ]


def test_without_restarts_the_first_failure_is_the_last(world, make):
    service = make(max_restarts=0)
    world.fail("generate")
    with pytest.raises(RolloutError, match="no generate x 0; vLLM was started again 0 time"):
        service.generate(["x"], **ARGUMENTS)
    assert "stop 1" not in world.events


def test_what_another_server_would_not_cure_is_no_reason_for_one(world, make):
    service = make()
    world.sync_error = WeightSyncError
    world.fail("update")
    with pytest.raises(WeightSyncError):
        service.update_weights()
    assert world.servers == 1


def test_an_error_of_rank_0_ends_the_ranks_that_wait_for_it(world, make):
    with pytest.raises(ZeroDivisionError), make() as service:
        service.lead()
        raise ZeroDivisionError
    assert world.events == [f"tell {ABORT}", "stop 1"]
    world.events.clear()
    with pytest.raises(ZeroDivisionError), make() as service:
        service.lead()
        service.assist()
        raise ZeroDivisionError
    assert world.events == [f"tell {DONE}", "stop 2"]


def test_the_other_ranks_give_weights_as_often_as_they_are_asked(world, make):
    make(is_main=False, heard=[GIVE_WEIGHTS, GIVE_WEIGHTS, DONE]).assist()
    assert world.events == ["give a", "give b"] * 2
    assert world.servers == 0
    with pytest.raises(SystemExit) as ended:
        make(is_main=False, heard=[ABORT]).assist()
    assert ended.value.code == 1
