"""Closed forms of the token weights and of the policy losses."""

import math

import pytest
import torch

from siren_megatron.divergence import kl_estimate
from siren_megatron.grpo import (
    LossScale,
    PolicyLossOptions,
    clipped_importance,
    clipped_surrogate,
    policy_loss,
    sequence_ratio,
    token_weights,
)

MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
SCALE = LossScale(num_responses=8, num_tokens=20, max_response_length=10)


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


VARIANTS = {
    "ppo": PolicyLossOptions(loss_agg="token-mean", dual_clip=3.0),
    "gspo": PolicyLossOptions(policy_loss="gspo", clip_ratio_low=0.1, clip_ratio_high=0.15),
    "cispo": PolicyLossOptions(policy_loss="cispo", loss_agg="seq-mean-token-mean", clip_ratio_high=0.3),
    "kl-k1": PolicyLossOptions(kl_coeff=0.3, kl_estimator="k1"),
    "kl-k2": PolicyLossOptions(kl_coeff=0.3, kl_estimator="k2", loss_agg="seq-mean-token-sum"),
    "kl-k3": PolicyLossOptions(kl_coeff=0.3, kl_estimator="k3"),
}


def plain_loss(logprobs, old, ref, advantages, weights, mask, options, max_length):
    """The step's loss token by token in float64, responses one after the other."""
    n, tokens = len(mask), int(mask.sum())
    total = 0.0
    for i in range(n):
        rows = mask[i]
        x = (logprobs[i] - old[i])[rows]
        a, w = advantages[i][rows], weights[i][rows]
        low, high = 1 - options.clip_ratio_low, 1 + options.clip_ratio_high
        if options.policy_loss == "cispo":
            loss = -x.exp().detach().clamp(low, high) * a * logprobs[i][rows]
        else:
            r = x.mean().exp().expand_as(x) if options.policy_loss == "gspo" else x.exp()
            surrogate = torch.minimum(r * a, r.clamp(low, high) * a)
            if options.dual_clip:
                surrogate = torch.where(a < 0, torch.maximum(surrogate, options.dual_clip * a), surrogate)
            loss = -surrogate
        loss = loss * w
        if options.kl_coeff:
            loss = loss + options.kl_coeff * kl_estimate(logprobs[i], ref[i], options.kl_estimator)[rows]
        scale = {
            "token-mean": 1 / tokens,
            "seq-mean-token-mean": 1 / n / max(len(x), 1),
            "seq-mean-token-sum": 1 / n,
            "seq-mean-token-sum-norm": 1 / n / max_length,
        }
        total = total + loss.sum() * scale[options.loss_agg]
    return total


@pytest.mark.parametrize("name", VARIANTS)
def test_policy_losses_equal_a_float64_reference_in_value_and_gradient(name):
    options = VARIANTS[name]
    generator = torch.Generator().manual_seed(3)

    def draw():
        return torch.randn(5, 7, generator=generator) * 0.3 - 2.0

    logprobs, old, ref, advantages = draw(), draw(), draw(), draw() + 2.0
    if options.policy_loss == "gspo":
        # A response has one advantage.
        advantages = advantages[:, :1].expand(5, 7).contiguous()
    mask = torch.rand(5, 7, generator=generator) > 0.3
    weights = torch.rand(5, 7, generator=generator) * 2
    if options.policy_loss == "gspo":
        weights = torch.ones(5, 7)
    leaf = logprobs.double().requires_grad_()
    expected = plain_loss(
        leaf, old.double(), ref.double(), advantages.double(), weights.double(), mask, options, 9
    )
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    ours = logprobs.clone().requires_grad_()
    parts = [
        policy_loss(
            ours[i : i + 2],
            old[i : i + 2],
            advantages[i : i + 2],
            mask[i : i + 2],
            scale=LossScale(5, int(mask.sum()), 9),
            options=options,
            weights=weights[i : i + 2],
            ref_logprobs=ref[i : i + 2],
        )
        for i in range(0, 5, 2)
    ]
    loss = sum(p[0] for p in parts)
    (gradient,) = torch.autograd.grad(loss, ours)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
    assert gradient.abs().sum() > 0
    if options.kl_coeff:
        kl = kl_estimate(logprobs.double(), ref.double(), options.kl_estimator)[mask].mean()
        assert sum(p[1]["kl_ref"] for p in parts).item() == pytest.approx(kl.item(), rel=1e-4)


def test_sequence_ratio_is_the_geometric_mean_with_its_gradient():
    logprobs = torch.tensor([[0.2, -0.4, 9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    ratio = sequence_ratio(logprobs, torch.zeros(1, 3, dtype=torch.float64), mask)
    s = torch.tensor(-0.1, dtype=torch.float64).exp()
    torch.testing.assert_close(ratio[0, :2].detach(), s.expand(2))
    (gradient,) = torch.autograd.grad(ratio[mask].mean(), logprobs)
    torch.testing.assert_close(gradient[0], torch.stack([s / 2, s / 2, s * 0]))


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    logprobs = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    loss, clipped = clipped_importance(
        logprobs, torch.zeros(1, 3), torch.tensor([[2.0]]), clip_ratio_low=0.5, clip_ratio_high=0.5
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor([[-3.0, -2.0, -1.0]]))  # -A·clip(e, 1, 1/e)
    assert clipped.tolist() == [[True, False, True]]


def test_policy_loss_adds_up_over_micro_batches_and_ignores_what_is_masked():
    torch.manual_seed(0)
    logprobs, old = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.rand(4, 6) > 0.3
    advantages = torch.randn(4, 1).expand(4, 6)
    scale = LossScale(4, int(mask.sum()), 6)
    options = {"scale": scale, "options": PolicyLossOptions(loss_agg="token-mean")}

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
        torch.tensor([[-1.0]]),
        torch.ones(1, 1, dtype=torch.bool),
        scale=LossScale(1, 1, 1),
        options=PolicyLossOptions(loss_agg="token-mean"),
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()
