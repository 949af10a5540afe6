"""Failures of generation that a real server can't be made to show, and the pure parts."""

import threading
import time

import pytest

from siren_megatron.batch import Sample
from siren_megatron.rollout.client import RolloutClient, RolloutError, parse_completion, prompt_seed
from siren_megatron.rollout.http_json import error_text
from tests.fake_server import fake_server

ARGUMENTS = dict(num_samples=1, max_tokens=4, temperature=1.0, seed=0, stop_token_ids=[])


def choice(index=0, tokens=(5, 6), logprobs=(-0.5, -0.25), finish_reason="stop"):
    return {
        "index": index,
        "token_ids": list(tokens),
        "logprobs": {"token_logprobs": list(logprobs)},
        "finish_reason": finish_reason,
    }


def echo(path, body):
    """Answers a prompt with its own tokens."""
    return 200, {"choices": [choice(tokens=body["prompt"], logprobs=[-1.0] * len(body["prompt"]))]}


def test_seeds_of_prompts_differ_and_repeat():
    seeds = [prompt_seed(seed, index) for seed in range(20) for index in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert prompt_seed(3, 4) == prompt_seed(3, 4)
    # Sample k of a prompt uses seed + k: neighbours have to lie further apart than that.
    ordered = sorted(seeds)
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) > 10**6


def test_choices_become_samples_in_the_order_of_their_seeds():
    answer = {"choices": [choice(1, (7,), (-2.0,), "length"), choice(0)]}
    assert parse_completion(answer, (1, 2), 2) == [
        Sample((1, 2), (5, 6), (-0.5, -0.25), "stop"),
        Sample((1, 2), (7,), (-2.0,), "length"),
    ]


def test_log_probs_that_nobody_asked_for_are_neither_sent_nor_read():
    asked = []

    def without(path, body):
        asked.append(body["logprobs"])
        return 200, {"choices": [{**choice(), "logprobs": None}]}

    with fake_server(without) as url:
        client = RolloutClient(url, 10, 1)
        assert client.generate([[1]], **{**ARGUMENTS, "num_samples": 1}, logprobs=False) == [
            [Sample((1,), (5, 6), (), "stop")]
        ]
        with pytest.raises(RolloutError, match="the answer is not vLLM's"):
            client.generate([[1]], **{**ARGUMENTS, "num_samples": 1})
    assert asked == [None, 0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": [choice()]}, "1 responses came for a prompt, 2 were asked for"),
        ({"choices": [choice(), choice(1, finish_reason="abort")]}, "finish_reason 'abort'"),
        ({"choices": [choice(), choice(1, logprobs=(-1.0,))]}, "2 tokens and 1 log-probs"),
        ({"choices": [choice(), choice(1, logprobs=(-1.0, None))]}, "not finite"),
        ({"choices": [choice(), choice(1, logprobs=(-1.0, float("nan")))]}, "not finite"),
        ({"object": "error"}, "the answer is not vLLM's"),
        (None, "the answer is not vLLM's"),
    ],
)
def test_unusable_answers_raise_a_rollout_error(answer, message):
    with fake_server(lambda path, body: (200, answer)) as url:
        with pytest.raises(RolloutError, match=message) as caught:
            RolloutClient(url, 10, 1).generate([[1]], **{**ARGUMENTS, "num_samples": 2})
    assert "\n" not in str(caught.value)


def test_groups_come_in_the_order_of_prompts_and_are_reported_as_they_finish():
    def slow_first(path, body):
        if body["prompt"] == [0]:
            assert others_done.wait(10)
        return echo(path, body)

    others_done = threading.Event()
    finished = []

    def on_group(index, samples):
        finished.append((index, samples))
        if len(finished) == 3:
            others_done.set()

    with fake_server(slow_first) as url:
        groups = RolloutClient(url, 10, 2).generate([[0], [1], [2], [3]], **ARGUMENTS, on_group=on_group)
    assert [group[0].response_ids for group in groups] == [(0,), (1,), (2,), (3,)]
    assert [index for index, _ in finished] == [1, 2, 3, 0]
    assert all(groups[index] is samples for index, samples in finished)


def test_no_more_requests_than_allowed_are_in_flight():
    lock, now, most = threading.Lock(), 0, 0

    def counting(path, body):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return echo(path, body)

    with fake_server(counting) as url:
        RolloutClient(url, 10, 3).generate([[k] for k in range(12)], **ARGUMENTS)
    assert most == 3


def test_the_callers_own_error_is_passed_on():
    def on_group(index, samples):
        raise BrokenPipeError("a reward worker ended")

    with fake_server(echo) as url:
        with pytest.raises(BrokenPipeError, match="a reward worker ended"):
            RolloutClient(url, 10, 2).generate([[1], [2]], **ARGUMENTS, on_group=on_group)


def test_a_refusal_is_told_with_the_servers_words():
    refusal = {"error": {"message": "the prompt is\ntoo long", "code": 400}}
    with fake_server(lambda path, body: (400, refusal)) as url:
        with pytest.raises(RolloutError, match="HTTP 400 for prompt 0: the prompt is too long"):
            RolloutClient(url, 10, 2).generate([[1]], **ARGUMENTS)


def test_a_dropped_connection_is_a_rollout_error():
    with fake_server(lambda path, body: None) as url:
        with pytest.raises(RolloutError, match="generation failed"):
            RolloutClient(url, 10, 2).generate([[1], [2]], **ARGUMENTS)


def test_an_answer_that_does_not_come_times_out():
    release = threading.Event()

    def hangs(path, body):
        release.wait(20)
        return echo(path, body)

    with fake_server(hangs) as url:
        started = time.monotonic()
        try:
            with pytest.raises(RolloutError, match=r"took longer than 0\.5 s"):
                RolloutClient(url, 0.5, 2).generate([[1]], **ARGUMENTS)
            assert time.monotonic() - started < 5
        finally:
            release.set()


def test_a_request_that_takes_too_long_is_sent_again_with_its_seed():
    release, seen = threading.Event(), []

    def slow_once(path, body):
        seen.append(body)
        if len(seen) == 1:
            release.wait(20)
        return echo(path, body)

    with fake_server(slow_once) as url:
        try:
            client = RolloutClient(url, 0.5, 1, request_retries=1)
            groups = client.generate([[4, 2]], **ARGUMENTS)
        finally:
            release.set()
    assert groups[0][0].response_ids == (4, 2)
    assert seen[0] == seen[1] and len(seen) == 2
    assert (client.num_retries, client.num_dropped) == (1, 0)


def test_a_prompt_that_is_too_slow_again_and_again_is_dropped_alone():
    release, asked = threading.Event(), []

    def slow_prompt(path, body):
        asked.append(body["prompt"])
        if body["prompt"] == [1, 9]:
            release.wait(20)
        return echo(path, body)

    with fake_server(slow_prompt) as url:
        try:
            dropping = RolloutClient(url, 0.5, 4, request_retries=2)
            groups = dropping.generate([[0, 9], [1, 9], [2, 9]], **ARGUMENTS, may_drop=True)
            client = RolloutClient(url, 0.5, 4)
            with pytest.raises(RolloutError, match=r"prompt 1 took longer than 0.5 s, 1 time\(s\)"):
                client.generate([[0, 9], [1, 9]], **ARGUMENTS)
        finally:
            release.set()
    assert [[sample.response_ids for sample in group] for group in groups] == [[(0, 9)], [], [(2, 9)]]
    assert asked.count([1, 9]) == 4 and asked.count([1]) == 2, "at last one token is asked for"
    assert (dropping.num_retries, dropping.num_dropped) == (2, 1)
    assert (client.num_retries, client.num_dropped) == (0, 0)


def test_prompts_sent_again_keep_the_seeds_of_their_numbers():
    seeds = {}

    def record(path, body):
        seeds[body["prompt"][0]] = body["seed"]
        return echo(path, body)

    with fake_server(record) as url:
        RolloutClient(url, 10, 2).generate([[7], [3]], **ARGUMENTS, stream_ids=[7, 3])
    assert seeds == {7: prompt_seed(0, 7), 3: prompt_seed(0, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 0.0, "num_samples": 2}, "temperature is 0.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RolloutClient("http://127.0.0.1:1", 1, 1).generate([[1]], **{**ARGUMENTS, **changes})


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        RolloutClient("http://127.0.0.1:1", 1, 1).generate([[1], []], **ARGUMENTS)


def test_no_prompts_are_no_work():
    assert RolloutClient("http://127.0.0.1:1", 1, 1).generate([], **ARGUMENTS) == []


def test_error_text_is_one_short_line():
    assert error_text({"error": {"message": "a\n b"}}) == "a b"
    assert error_text({"detail": "gone"}) == "gone"
    assert error_text("x" * 500) == "x" * 297 + "..."
