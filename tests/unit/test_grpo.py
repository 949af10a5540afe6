"""Closed forms of advantages, weights and the clipped surrogate."""

import math

import pytest
import torch

from siren_megatron.grpo import LossScale, clipped_surrogate, group_advantages, policy_loss, token_weights

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
SCALE = LossScale(num_responses=8, num_tokens=20, max_response_length=10)


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


@pytest.mark.parametrize(
    ("loss_agg", "first", "second"),
    [
        ("token-mean", 1 / 20, 1 / 20),
        ("seq-mean-token-mean", 1 / 3 / 8, 1 / 8),
        ("seq-mean-token-sum", 1 / 8, 1 / 8),
        ("seq-mean-token-sum-norm", 1 / 80, 1 / 80),
    ],
)
def test_token_weights(loss_agg, first, second):
    expected = torch.tensor([[0, first, first, first], [0, 0, second, 0]])
    torch.testing.assert_close(token_weights(MASK, loss_agg, SCALE), expected)


def test_token_weights_refuse_an_unknown_aggregation():
    with pytest.raises(ValueError, match="--loss-agg sum"):
        token_weights(MASK, "sum", SCALE)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: the ratio's own gradient, r·A
        (1.5, 2.0, -2.6, 0.0),  # above 1 + 0.3 with A > 0: flat
        (0.5, 2.0, -1.0, -1.0),  # below the clip with A > 0: the plain branch is the pessimistic one
        (0.5, -2.0, 1.6, 0.0),  # below 1 - 0.2 with A < 0: flat
        (1.5, -2.0, 3.0, 3.0),  # above with A < 0: plain
        (5.0, -2.0, 6.0, 0.0),  # dual clip: at most 3·|A|
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, gradient):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    got, clipped = clipped_surrogate(
        logprobs,
        torch.zeros(1, 1, dtype=torch.float64),
        torch.tensor([[advantage]], dtype=torch.float64),
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
        dual_clip=3.0,
    )
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert clipped.item() == (gradient == 0.0)


def test_policy_loss_adds_up_over_micro_batches_and_ignores_what_is_masked():
    torch.manual_seed(0)
    logprobs, old = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.rand(4, 6) > 0.3
    advantages = torch.randn(4)
    scale = LossScale(4, int(mask.sum()), 6)
    options = {"scale": scale, "loss_agg": "token-mean", "clip_ratio_low": 0.2, "clip_ratio_high": 0.2}

    def run(rows, noise=0.0):
        clean = torch.where(mask, logprobs, logprobs + noise)[rows].requires_grad_()
        loss, metrics = policy_loss(clean, old[rows], advantages[rows], mask[rows], **options)
        (gradient,) = torch.autograd.grad(loss, clean)
        return loss, metrics, gradient

    whole, metrics, gradient = run(slice(0, 4))
    parts = [run(slice(i, i + 1), noise=5.0) for i in range(4)]
    torch.testing.assert_close(sum(p[0] for p in parts), whole)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), gradient)
    assert torch.equal(gradient[~mask], torch.zeros(int((~mask).sum())))
    for name, value in metrics.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), value)
    x = (logprobs - old)[mask]
    assert metrics["kl_old_new"].item() == pytest.approx((x.exp() - 1 - x).mean().item(), rel=1e-5)


def test_a_ratio_that_overflows_stays_finite():
    logprobs = torch.tensor([[200.0]], requires_grad=True)
    loss, _ = policy_loss(
        logprobs,
        torch.zeros(1, 1),
        torch.tensor([-1.0]),
        torch.ones(1, 1, dtype=torch.bool),
        scale=LossScale(1, 1, 1),
        loss_agg="token-mean",
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
