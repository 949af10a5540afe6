"""vLLM's and the trainer's log-probs, compared."""

from __future__ import annotations

import math

import pytest
import torch

from siren_megatron.batch import Sample
from siren_megatron.config import Config
from siren_megatron.rollout.client import RolloutError
from siren_megatron.rollout.policy_check import PolicyCheck, check_logprobs

HOW = {"tolerance": 0.1, "step": 3, "when": "rollout"}
MASK = torch.tensor([[True, True, False]])


def test_the_largest_difference_inside_the_mask():
    ours, theirs = torch.tensor([[-1.0, -2.0, 50.0]]), torch.tensor([[-1.0, -2.125, 0.0]])
    assert check_logprobs(ours, theirs, MASK, **HOW) == 0.125


def test_another_policy_is_told_in_one_line():
    ours, theirs = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.0, 0.0]])
    with pytest.raises(
        RolloutError, match=r"step 3: after the rollout .* differ by 0.25 .*largest 0.5"
    ) as caught:
        check_logprobs(ours, theirs, MASK, **HOW)
    assert "\n" not in str(caught.value)


def test_the_trainers_own_nan_is_left_to_the_update():
    theirs = torch.tensor([[-1.0, -2.0, 0.0]])
    some, all_ = torch.tensor([[math.nan, -2.0, 0.0]]), torch.full((1, 3), math.nan)
    assert check_logprobs(some, theirs, MASK, **HOW) == 0
    assert math.isnan(check_logprobs(all_, theirs, MASK, **HOW))


def test_vllms_nan_is_another_policy():
    ours, theirs = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.0, math.nan, 0.0]])
    with pytest.raises(RolloutError):
        check_logprobs(ours, theirs, MASK, **HOW)


class Servers:
    """Three servers that give the same two tokens, with the log-probs that each of them has."""

    num_servers = 3

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def generate(self, prompts, *, stream_ids, max_tokens, **_):
        assert len(prompts) == 3 and stream_ids == [0, 0, 0] and max_tokens == 4, "the same of each"
        return [[Sample((5,), (1, 2), (value, value), "stop")] for value in self.logprobs]


class Trainer:
    smallest_batch, length_multiple = 2, 8


def test_one_server_with_other_weights_does_not_hide_among_many(tmp_path):
    config = Config.of(hf_checkpoint=tmp_path, prompt_data=tmp_path, save=tmp_path)
    for third, error in ((-1.005, None), (-1.02, "after the weight update .* differ by 0.02 ")):
        check = PolicyCheck(config, Servers([-1.0, -1.0, third]), Trainer())
        batch = check.sample([5], 0)
        assert batch.num_responses == 4, "rows for every data-parallel rank, each server's among them"
        batch = batch.replace(old_logprobs=torch.where(batch.loss_mask, -1.0, 0.0))
        if error is None:
            assert check.compare_servers(batch, 3) == pytest.approx(0.005, rel=1e-4)
        else:
            assert check.compare(batch, 3, "rollout") == pytest.approx(0.02, rel=1e-4), "the mean is small"
            with pytest.raises(RolloutError, match=error):
                check.compare_servers(batch, 3)
