"""vLLM's and the trainer's log-probs, compared."""

from __future__ import annotations

import math

import pytest
import torch

from siren_megatron.rollout.client import RolloutError
from siren_megatron.rollout.policy_check import check_logprobs

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
