"""What a step trains on: rewards in the order of the responses, graded while others are sampled."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from siren_megatron.batch import Sample
from siren_megatron.collector import Collector, Rollout
from siren_megatron.config import Config
from siren_megatron.data.cursor import PromptCursor
from siren_megatron.rewards.pool import PendingReward, RewardResult

PROMPTS = [SimpleNamespace(token_ids=(k,), answer=str(k)) for k in range(12)]


class Rewards:
    """A pool whose reward of "<prompt> <number>" is the number; it notes when it was given what."""

    def __init__(self):
        self.events, self.lock = [], threading.Lock()

    def submit(self, pairs):
        from concurrent.futures import Future

        answer = pairs[0][1]
        self.events.append(f"grade {answer}")
        assert all(text.split()[0] == answer for text, _ in pairs)
        future = Future()
        rewards = [float(text.split()[1]) for text, _ in pairs]
        error = f"error of {answer}" if answer in ("3", "5") else None
        future.set_result(RewardResult(rewards, int(answer == "2"), int(error is not None), error))
        return PendingReward(future)


class Service:
    """Samples (prompt, seed % 2 or what `token` says), the last prompt first."""

    def __init__(self, events, token=lambda prompt, k, seed: k, drop=()):
        self.events, self.token, self.drop, self.seeds = events, token, set(drop), []

    def generate(self, prompts, *, num_samples, seed, on_group, **_):
        self.seeds.append(seed)
        groups = [[] for _ in prompts]
        for index in reversed(range(len(prompts))):
            (prompt,) = prompts[index]
            if prompt in self.drop:
                continue
            tokens = [self.token(prompt, k, seed) for k in range(num_samples)]
            groups[index] = [Sample((prompt,), (prompt, t), (-1.0, -0.1), "stop", 3) for t in tokens]
            self.events.append(f"sampled {prompt}")
            on_group(index, groups[index])
        time.sleep(0.01)
        return groups


TOKENIZER = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"{ids[0]} {ids[1]}", eos_token_id=0)


@pytest.fixture
def make(tmp_path):
    def make(service_options=None, **options):
        config = Config.of(
            hf_checkpoint=tmp_path, prompt_data=tmp_path, save=tmp_path, seed=100,
            rollout_batch_size=4, rollout_num_samples=2, **options,
        )  # fmt: skip
        rewards = Rewards()
        service = Service(rewards.events, **(service_options or {}))
        cursor = PromptCursor(12, seed=0, shuffle=False)
        return Collector(config, service, TOKENIZER, PROMPTS, cursor, rewards), service, cursor

    return make


def test_groups_are_graded_as_they_come_and_stand_in_the_order_of_prompts(make):
    collector, service, cursor = make()
    rollout = collector.collect(5)
    assert service.events == [f"{what} {k}" for k in (3, 2, 1, 0) for what in ("sampled", "grade")]
    assert [sample.prompt_ids for sample in rollout.samples] == [(k,) for k in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert rollout.rewards == RewardResult([0.0, 1.0] * 4, 1, 1, "error of 3")
    assert service.seeds == [104], "the run's seed and the steps done before"
    assert rollout.metrics() == {"reward_timeouts": 1, "reward_errors": 1}
    assert rollout.lag_metrics() == {"rollout_weight_lag/mean": 1.0, "rollout_weight_lag/max": 1}
    assert rollout.seconds["rollout"] >= 0.01 and rollout.seconds["reward"] >= 0
    assert cursor.next(1) == [4]


def test_a_dropped_prompt_makes_room_for_the_next_one(make):
    collector, service, cursor = make({"drop": [1, 4]})
    rollout = collector.collect(1)
    assert [group[0].prompt_ids for group in rollout.groups] == [(0,), (5,), (2,), (3,)]
    assert service.seeds == [100, 100 + 7_000_003, 100 + 2 * 7_000_003]
    # In the order of the batch, where 5 stands before 3.
    assert rollout.rewards == RewardResult([0.0, 1.0] * 4, 1, 2, "error of 5")
    assert cursor.next(1) == [6]


def test_dynamic_sampling_replaces_groups_and_counts_all_rewards(make):
    flat = {"token": lambda prompt, k, seed: 1 if prompt in (1, 2) else k}
    collector, service, cursor = make(flat, grpo_dynamic_sampling=True)
    rollout = collector.collect(1)
    assert [group[0].prompt_ids for group in rollout.groups] == [(0,), (4,), (5,), (3,)]
    assert rollout.rewards == RewardResult([0.0, 1.0] * 4, 1, 2, "error of 3")
    assert service.seeds == [100, 100 + 1_000_003]
    assert rollout.metrics()["dynamic_sampling/rounds"] == 1
    assert cursor.next(1) == [6]


def test_a_rollout_goes_through_a_checkpoint_unchanged(tmp_path):
    samples = [
        [Sample((1, 2), (3,), (-0.1,), "stop", 4), Sample((1, 2), (4, 5), (-0.1 / 3, -2.0), "length", 4)],
        [Sample((7,), (8, 9, 1), (-1e-9, -1.0, -3.0), "stop", 5)],
    ]
    rewards = RewardResult([1.0, 0.1, 0.0], 1, 2, "why")
    rollout = Rollout(6, samples, rewards, {"dynamic_sampling/rounds": 1.0}, {"rollout": 0.5})
    torch.save(rollout.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)  # as a checkpoint's pickles are examined
    assert Rollout.from_state(loaded) == rollout
