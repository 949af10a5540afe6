"""One queue for several servers, which are fakes over HTTP: who gets which prompt, and what a death costs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from siren_megatron.rollout.balancer import Balancer, prompt_seed
from siren_megatron.rollout.client import RolloutClient, RolloutError, ServerFailed
from tests.fake_server import fake_server

ARGUMENTS = dict(num_samples=1, max_tokens=4, temperature=1.0, seed=5, stop_token_ids=[])


def echo(body):
    """The prompt and its seed as the response: what it depends on, and nothing else."""
    tokens = [*body["prompt"], body["seed"] % 1000]
    choice = {"index": 0, "token_ids": tokens, "finish_reason": "stop"}
    return 200, {"choices": [{**choice, "logprobs": {"token_logprobs": [-1.0] * len(tokens)}}]}


class Fleet:
    """Fake servers; `seen[k]` has the prompts that server k answered or swallowed."""

    def __init__(self, number, max_in_flight=2):
        self.stack = ExitStack()
        self.seen = [[] for _ in range(number)]
        self.broken: set[int] = set()
        self.most = [0] * number
        self.now = [0] * number
        self.lock = threading.Lock()
        self.delay_s = [0.0] * number
        self.clients = [
            RolloutClient("http://-", 10, max_in_flight, server=self.start(k)) for k in range(number)
        ]
        for client in self.clients:
            client.url = client._server.url
            client.weight_version = 10

    def start(self, k):
        def answer(path, body):
            with self.lock:
                self.seen[k].append(body["prompt"][0])
                self.now[k] += 1
                self.most[k] = max(self.most[k], self.now[k])
            time.sleep(self.delay_s[k])
            with self.lock:
                self.now[k] -= 1
            return None if k in self.broken else echo(body)

        return SimpleNamespace(
            url=self.stack.enter_context(fake_server(answer)),
            name="model",
            api_key="key",
            vocab_size=None,
            options=SimpleNamespace(max_model_len=100, log_file=f"vllm-0-{k}.log"),
            alive=lambda: True,
            describe_death=lambda: f"server {k} died",
        )


@pytest.fixture
def fleet():
    fleets = []

    def make(*arguments, **options):
        fleets.append(Fleet(*arguments, **options))
        return fleets[-1]

    yield make
    for one in fleets:
        one.stack.close()


def tokens(groups):
    return [group[0].response_ids for group in groups]


def expected(count, first=0):
    return [(k, prompt_seed(5, k) % 1000) for k in range(first, first + count)]


def test_the_server_with_the_fewest_in_flight_gets_the_next_prompt(fleet):
    three = fleet(3, max_in_flight=4)
    three.delay_s = [0.3, 0.3, 0.3]
    balancer = Balancer(three.clients)
    assert tokens(balancer.generate([[k] for k in range(6)], **ARGUMENTS)) == expected(6)
    assert [sorted(seen) for seen in three.seen] == [[0, 3], [1, 4], [2, 5]]
    assert balancer.num_waits == 6 and balancer.wait_s < 0.2


def test_a_slow_server_gets_less_and_none_gets_more_than_its_limit(fleet):
    two = fleet(2, max_in_flight=2)
    two.delay_s = [0.5, 0.02]
    balancer = Balancer(two.clients)
    groups = balancer.generate([[k] for k in range(20)], **ARGUMENTS)
    assert tokens(groups) == expected(20)
    assert two.most == [2, 2] and len(two.seen[0]) < 5 and len(two.seen[1]) > 15
    assert [c.num_requests for c in two.clients] == [len(seen) for seen in two.seen]
    assert sum(c.num_tokens for c in two.clients) == 40
    assert balancer.wait_s > 0.02, "most of them waited for room"


def test_newer_weights_are_used_only_where_no_server_with_the_others_is_left(fleet):
    two = fleet(2, max_in_flight=2)
    two.clients[1].weight_version = 11
    groups = Balancer(two.clients).generate([[k] for k in range(6)], **ARGUMENTS)
    assert tokens(groups) == expected(6) and two.seen[1] == []
    never = Future()
    two.broken.add(0)
    finished = []

    def on_group(index, samples):
        finished.append(samples[0].weight_version)
        if len(finished) == 6:
            never.set_exception(RolloutError("stop here"))

    with pytest.raises(RolloutError, match="stop here"):
        Balancer(two.clients, lambda k, failure: never).generate(
            [[k] for k in range(6)], **ARGUMENTS, on_group=on_group
        )
    assert finished == [11] * 6, "each says which weights made it"


def test_a_lost_servers_prompts_go_to_the_others_at_once_with_their_seeds(fleet):
    two = fleet(2, max_in_flight=2)
    two.delay_s = [0.05, 0.05]
    two.broken.add(0)
    reply, wanted, finished = Future(), [], []

    def replace(k, failure):
        wanted.append((k, str(failure)))
        return reply

    def on_group(index, samples):
        finished.append(index)
        if len(finished) == 8:  # all of them, without the replacement
            two.broken.clear()
            reply.set_result(None)

    groups = Balancer(two.clients, replace).generate([[k] for k in range(8)], **ARGUMENTS, on_group=on_group)
    assert tokens(groups) == expected(8) and sorted(finished) == list(range(8))
    assert sorted(two.seen[1]) == list(range(8)) and len(two.seen[0]) <= 2
    assert len(wanted) == 1 and wanted[0][0] == 0 and "generation failed: server 0 died" in wanted[0][1]


def test_a_server_that_is_back_is_used_again_and_alone_it_does_everything(fleet):
    one = fleet(1, max_in_flight=2)
    one.broken.add(0)

    def replace(k, failure):
        one.broken.clear()
        done = Future()
        done.set_result(None)
        return done

    assert tokens(Balancer(one.clients, replace).generate([[0], [1], [2]], **ARGUMENTS)) == expected(3)


def test_without_a_replacement_the_failure_is_told(fleet):
    two = fleet(2)
    two.broken |= {0, 1}
    with pytest.raises(ServerFailed, match=r"generation failed: server \d died"):
        Balancer(two.clients).generate([[0], [1]], **ARGUMENTS)

    def replace(k, failure):
        refused = Future()
        refused.set_exception(RolloutError("started again 3 times already"))
        return refused

    with pytest.raises(RolloutError, match="started again 3 times already"):
        Balancer(two.clients, replace).generate([[0], [1]], **ARGUMENTS)


def test_a_death_that_breaks_no_connection_is_noticed(fleet):
    two = fleet(2, max_in_flight=1)
    two.delay_s = [5.0, 0.0]
    two.clients[0]._server.alive = lambda: False
    done = Future()
    done.set_result(None)
    wanted = []

    def replace(k, failure):
        wanted.append(str(failure))
        two.clients[0]._server.alive = lambda: True
        two.delay_s[0] = 0.0
        return done

    started = time.monotonic()
    assert tokens(Balancer(two.clients, replace).generate([[0], [1]], **ARGUMENTS)) == expected(2)
    assert time.monotonic() - started < 4 and "the server ended" in wanted[0]
