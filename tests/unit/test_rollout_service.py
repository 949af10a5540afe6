"""What happens in which order when a server fails; real ones fail in tests/integration/test_chaos.py."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from siren_megatron.batch import Sample
from siren_megatron.config import Config
from siren_megatron.rollout import client as rollout_client
from siren_megatron.rollout import node_servers
from siren_megatron.rollout import service as rollout_service
from siren_megatron.rollout.balancer import prompt_seed
from siren_megatron.rollout.hosts import Hosts
from siren_megatron.rollout.server import RolloutError, ServerFailed
from siren_megatron.rollout.service import RolloutService
from siren_megatron.rollout.weight_sync import ServerSyncFailed, UpdateStats, WeightSyncError

DONE, GIVE_WEIGHTS, ABORT, RESTART, SLEEP = range(5)
ALL = -1


class World:
    """Stands for servers, their clients and the other ranks; `events` is what happened, in order."""

    def __init__(self, monkeypatch):
        self.events, self.failures, self.servers, self.version = [], [], 0, 0
        for name in ("RolloutServer", "WeightPublisher", "HealthMonitor"):
            monkeypatch.setattr(node_servers, name, getattr(self, name))
        self.RolloutServer.start = self.start
        world = self

        class Client(rollout_client.RolloutClient):
            async def answer(self, session, index, request):
                prompt = tuple(request["prompt"])
                world.happen(f"generate {prompt[0]} {request['seed']}")
                return [Sample(prompt, (1,), (-1.0,), "stop", self.weight_version)]

        monkeypatch.setattr(rollout_service, "RolloutClient", Client)

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

    def start(self, options, taken_ports):
        self.servers += 1
        number = self.servers
        return SimpleNamespace(
            url="",
            name="",
            api_key="",
            port=20000 + number,
            options=SimpleNamespace(max_model_len=100, log_file=""),
            vocab_size=None,
            alive=lambda: True,
            describe_death=lambda: f"server {number} died",
            remote=lambda address: SimpleNamespace(url=f"http://{address}", name=number, api_key=""),
            wait_ready=lambda: self.happen(f"ready {number}", RolloutError),
            stop=lambda: self.happen(f"stop {number}"),
        )

    def WeightPublisher(self, servers):
        def failure(message):
            broken = servers[:1] if self.sync_error is ServerSyncFailed else None
            return ServerSyncFailed(message, broken) if broken else self.sync_error(message)

        def update(weights):
            name, _ = next(weights)
            self.happen(f"update {name}", failure)
            self.events += [f"update {name}" for name, _ in weights]
            return UpdateStats(bytes=12, seconds=0.5, num_tensors=2)

        return SimpleNamespace(
            init=lambda: None,
            update=update,
            sleep=lambda: self.happen("sleep", failure),
            close=lambda: None,
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

    def make(max_restarts=3, is_main=True, heard=(), servers=1, hosts=None, gather=None, sleep=0):
        config = Config.of(
            hf_checkpoint=tmp_path,
            prompt_data=tmp_path,
            save=tmp_path,
            rollout_max_restarts=max_restarts,
            rollout_sleep=sleep,
        )
        commands = iter(heard)
        control = SimpleNamespace(
            tell=lambda command, argument=0: world.events.append(f"tell {command} {argument}"),
            hear=lambda: next(commands),
            gather=gather,
        )

        def weights():
            for name in ("a", "b"):
                world.events.append(f"give {name}")
                yield name, None

        hosts = hosts or Hosts(node=0 if is_main else None)
        service = RolloutService(
            config,
            [None] * (servers if hosts.node is not None else 0),
            control,
            hosts=hosts,
            is_main=is_main,
            report=world.events.append,
        )
        service.connect(weights, lambda: world.version)
        world.events.clear()
        return service

    return make


ARGUMENTS = dict(num_samples=1, max_tokens=4, temperature=1.0, seed=7, stop_token_ids=[0])


def generate(service, prompts, **more):
    return service.run(lambda: service.generate([[p] for p in prompts], **ARGUMENTS, **more))


def asked(prompt, stream):
    return f"generate {prompt} {prompt_seed(7, stream)}"


def test_only_what_was_lost_is_asked_again_with_its_own_stream(world, make):
    service = make()
    service._clients[0].max_in_flight = 1
    finished = []

    def fail_at_the_second(index, samples):
        finished.append(index)
        if index == 0:
            world.fail("generate")

    world.version = 4
    groups = generate(service, [11, 12, 13], on_group=fail_at_the_second)
    assert [group[0].prompt_ids for group in groups] == [(11,), (12,), (13,)]
    assert [group[0].weight_version for group in groups] == [0, 4, 4], "the weights are the current ones"
    assert finished == [0, 1, 2] or finished == [0, 2, 1]
    events = [e for e in world.events if "starting" not in e]
    assert events[:2] == [asked(11, 0), asked(12, 1)]
    assert events[2:9] == [
        *("stop 1", "ready 2", f"tell {GIVE_WEIGHTS} 0", "give a", "update a", "give b", "update b")
    ]
    assert sorted(events[9:]) == sorted([asked(12, 1), asked(13, 2)])
    counts = service.pop_counts()
    assert counts.pop("time/rollout_queue") >= 0
    assert counts == {"rollout_restarts": 1, "rollout_retries": 0, "rollout_dropped": 0}
    assert service.pop_counts()["rollout_restarts"] == 0


def test_a_server_that_fails_to_sleep_has_a_successor_with_the_weights_that_does(world, make):
    service = make(sleep=1)
    world.fail("sleep")
    service.sleep()
    told = [f"tell {SLEEP} {ALL}", "sleep"]
    replaced = ["stop 1", "ready 2", f"tell {GIVE_WEIGHTS} 0", "give a", "update a", "give b", "update b"]
    assert [e for e in world.events if "starting" not in e] == [*told, *replaced, *told]
    assert service.sync_metrics == {"weight_sync_bytes": 12, "time/weight_transfer": 0.5}


def test_a_failed_update_leaves_no_rank_behind_in_the_collective(world, make):
    service = make()
    world.fail("update")
    world.version = 2
    service.update_weights()
    gives = [e for e in world.events if e.startswith(("give", "tell"))]
    told = f"tell {GIVE_WEIGHTS} {ALL}"
    assert gives == [told, "give a", "give b"] * 2, "the tensors are made to the end, then all anew"
    assert service._clients[0].weight_version == 2


def test_of_two_servers_the_failed_one_is_started_again_and_both_get_the_weights(world, make):
    service = make(servers=2)
    world.fail("update")
    service.update_weights()
    assert [e for e in world.events if e.startswith(("stop", "ready"))] == ["stop 1", "ready 3"]
    assert world.events.count("update b") == 1 and world.events.count(f"tell {GIVE_WEIGHTS} {ALL}") == 2
    world.events.clear()
    groups = generate(service, range(4))
    assert [group[0].prompt_ids for group in groups] == [(k,) for k in range(4)]
    counts = service.pop_counts()
    assert {"rollout_requests/0", "rollout_requests/1", "rollout_tokens/0", "rollout_tokens/1"} < set(counts)


def test_a_server_that_does_not_start_again_is_tried_as_often_as_allowed(world, make):
    service = make(max_restarts=2)
    world.fail("generate", "ready", "ready")
    with pytest.raises(
        RolloutError, match="no ready 3; vLLM was started again 2 .*--rollout-max-restarts 2"
    ) as caught:
        generate(service, [11])
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
    with pytest.raises(
        RolloutError, match=r"server 1 died \(no generate 11 \d+\); vLLM was started again 0 time"
    ):
        generate(service, [11])
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
    assert world.events == [f"tell {ABORT} 0", "stop 1"]
    world.events.clear()
    with pytest.raises(ZeroDivisionError), make() as service:
        service.lead()
        service.assist()
        raise ZeroDivisionError
    assert world.events == [f"tell {DONE} 0", "stop 2"]


def test_the_other_ranks_give_weights_as_often_as_they_are_asked(world, make):
    make(is_main=False, heard=[(GIVE_WEIGHTS, ALL), (GIVE_WEIGHTS, 0), (DONE, 0)]).assist()
    assert world.events == ["give a", "give b"] * 2
    assert world.servers == 0
    with pytest.raises(SystemExit) as ended:
        make(is_main=False, heard=[(ABORT, 0)]).assist()
    assert ended.value.code == 1


class TwoHosts:
    """Rank 0 and rank 2 host two servers each; rank 1 hosts none. What rank 2 would gather is made up."""

    def __init__(self):
        self.of_rank_2 = [[SimpleNamespace(url=f"http://other:{k}", name="", api_key="") for k in range(2)]]

    def gather(self, value):
        return [value, None, self.of_rank_2.pop(0)]


def test_another_nodes_server_is_started_again_by_its_own_node(world, make):
    others = TwoHosts()
    service = make(servers=2, hosts=Hosts((0, 2), 0), gather=others.gather)
    assert [client.url for client in service._clients] == ["", "", "http://other:0", "http://other:1"]
    new = SimpleNamespace(url="http://other:9", name="", api_key="")
    # An update in which the other node's second server fails, a first start that fails, one that does not.
    others.of_rank_2 = [{1: "it died"}, RolloutError("it does not start"), new, {}]
    service.update_weights()
    assert [e for e in world.events if e.startswith(("tell", "stop"))] == [
        f"tell {GIVE_WEIGHTS} {ALL}",
        f"tell {RESTART} 3",
        f"tell {RESTART} 3",
        f"tell {GIVE_WEIGHTS} {ALL}",
    ]
    assert service._clients[3].url == "http://other:9"
    assert sum("starting vLLM again" in e for e in world.events) == 2


def test_the_other_node_does_what_it_is_told(world, make):
    sent = []
    heard = [(GIVE_WEIGHTS, 1), (GIVE_WEIGHTS, 3), (RESTART, 3), (RESTART, 2), (DONE, 0)]
    world.fail("update")
    service = make(
        is_main=False, heard=heard, servers=2, hosts=Hosts((0, 2), 1), gather=lambda value: sent.append(value)
    )
    assert len(sent.pop()) == 2, "what rank 0 needs to ask its servers"
    service.assist()
    # The first update is for another node's server; the second one fails.
    assert sent[0] == {} and list(sent[1]) == [1]
    assert sent[2].name == 3 and sent[3].name == 4
    assert [e for e in world.events if e.startswith("stop")] == ["stop 2", "stop 1"]


def test_work_that_ended_before_anyone_waited_gives_its_result(make):
    service = make()
    done = threading.Event()
    future = service.start(lambda: done.set() or 5)
    assert done.wait(5)
    assert service.finish(future) == 5
    with pytest.raises(ZeroDivisionError):
        service.run(lambda: 1 / 0)
    assert service.run(lambda: 6) == 6
