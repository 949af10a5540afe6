"""Closed forms of the advantage estimators and of what shapes rewards before them."""

import math

import pytest
import torch

from siren_megatron.advantages import (
    assign_advantages,
    estimate_advantages,
    flat_groups,
    group_advantages,
    leave_one_out_advantages,
    overlong_penalty,
    whitened_advantages,
)
from siren_megatron.batch import Sample, make_batch
from siren_megatron.method_options import GrpoOptions


def test_advantages_are_rewards_minus_the_mean_of_their_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 7.0])
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5, -1.0, -1.0, -1.0, 3.0])
    assert torch.equal(group_advantages(rewards, 4), expected)


def test_normalised_advantages_divide_by_the_unbiased_standard_deviation():
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0]), 4, normalize_std=True)
    std = math.sqrt(1 / 3)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5]) / (std + 1e-6)
    torch.testing.assert_close(got[:4], expected)
    assert torch.equal(got[4:], torch.zeros(4)), "a group without variance gets no gradient"


def test_advantages_refuse_incomplete_groups():
    with pytest.raises(ValueError, match="6 rewards do not form groups of 4"):
        group_advantages(torch.zeros(6), 4)


def test_leave_one_out_takes_the_mean_of_the_others():
    got = leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0, 2.0, 4.0, 6.0]), 3)
    assert torch.equal(got, torch.tensor([1.0, -0.5, -0.5, -3.0, 0.0, 3.0]))
    with pytest.raises(ValueError, match="RLOO needs at least 2"):
        leave_one_out_advantages(torch.zeros(3), 1)


def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    lengths = torch.tensor([3, 1, 2, 7, 2, 5])
    got = whitened_advantages(rewards, 3, lengths)
    per_token = (rewards.view(2, 3) - rewards.view(2, 3).mean(1, keepdim=True)).flatten().double()
    per_token = per_token.repeat_interleave(lengths)
    expected = (per_token - per_token.mean()) / (per_token.std() + 1e-6)
    torch.testing.assert_close(got.double().repeat_interleave(lengths), expected)


def test_estimators_by_name():
    rewards, lengths = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([1, 2, 3, 4])

    def estimate(name, normalize=False):
        return estimate_advantages(rewards, lengths, estimator=name, group_size=2, normalize_std=normalize)

    assert torch.equal(estimate("grpo"), group_advantages(rewards, 2))
    assert torch.equal(estimate("grpo", True), group_advantages(rewards, 2, normalize_std=True))
    assert torch.equal(estimate("dr-grpo", True), group_advantages(rewards, 2))
    assert torch.equal(estimate("rloo"), leave_one_out_advantages(rewards, 2))
    assert torch.equal(estimate("reinforce++-baseline"), whitened_advantages(rewards, 2, lengths))
    with pytest.raises(ValueError, match="--grpo-advantage-estimator gae"):
        estimate("gae")


def test_overlong_penalty_grows_linearly_over_the_buffer():
    got = overlong_penalty(torch.tensor([10, 80, 90, 100]), max_length=100, buffer=20, penalty=0.5)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, -0.25, -0.5]))
    assert not overlong_penalty(torch.tensor([100]), max_length=100, buffer=0, penalty=1.0).any()


def test_flat_groups_are_those_without_variance():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert flat_groups(rewards, 2).tolist() == [True, False, True]


def test_kl_and_length_are_taken_from_the_reward_before_the_group_mean():
    samples = [Sample((1,), (2, 3), (-1.0, -1.0), "stop"), Sample((1,), (2, 3, 4), (-1.0,) * 3, "length")]
    batch = make_batch(samples, torch.tensor([1.0, 0.0]), torch.zeros(2), multiple=4)
    old = torch.full(batch.tokens.shape, -1.0)
    batch = batch.replace(old_logprobs=old, ref_logprobs=old - 0.5)
    options = GrpoOptions(
        grpo_kl_coeff=0.1, grpo_kl_estimator="k1", grpo_kl_in="reward", grpo_overlong_buffer=2
    )
    got = assign_advantages(batch, options, group_size=2, max_response_length=3)
    # k1 is 0.5 nats a token; lengths 2 and 3 are half and all of the buffer.
    shaped = torch.tensor([1.0 - 0.1 * 2 * 0.5 - 0.5, 0.0 - 0.1 * 3 * 0.5 - 1.0])
    torch.testing.assert_close(got.advantages, shaped - shaped.mean())
    assert torch.equal(got.token_advantages, got.advantages.unsqueeze(1) * batch.loss_mask)
    assert torch.equal(got.rewards, torch.tensor([1.0, 0.0])), "the logged reward stays the task's"
    in_loss = GrpoOptions(grpo_kl_coeff=0.1, grpo_kl_in="loss")
    plain = assign_advantages(batch, in_loss, group_size=2, max_response_length=3)
    torch.testing.assert_close(plain.advantages, torch.tensor([0.5, -0.5]))
