"""Every entropy method against its formula, in values and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from siren_megatron.entropy_methods import (
    ENTROPY_METHODS,
    LossInputs,
    StepInputs,
    ascend,
    entropy_loss,
    entropy_metric,
    penalty_share,
    token_covariance,
)
from siren_megatron.method_options import ENTROPY_METHOD_NAMES, EntropyOptions

GENERATOR = torch.Generator().manual_seed(5)
N, S = 6, 9
MASK = torch.rand(N, S, generator=GENERATOR) > 0.3


def draw(low=0.0, high=1.0):
    return torch.rand(N, S, generator=GENERATOR) * (high - low) + low


ENTROPY, TOP_P_ENTROPY, GAP = draw(0, 5), draw(0, 3), draw(0, 2)
LOGPROBS, OLD = draw(-3, 0), draw(-3, 0)
ADVANTAGES = draw(-1, 1)[:, :1] * MASK


def step_inputs(moved=True, seed=0, coeff=0.4, **options):
    return StepInputs(
        logprobs=LOGPROBS,
        entropy=ENTROPY,
        top_p_entropy=TOP_P_ENTROPY,
        top_two_gap=GAP,
        loss_mask=MASK,
        advantages=ADVANTAGES,
        clipped=torch.zeros(N, S, dtype=torch.bool),
        moved=moved,
        coeff=coeff,
        generator=torch.Generator().manual_seed(seed),
        options=EntropyOptions(**options),
    )


def loss_inputs(rows=slice(None), *, step_entropy=1.0, coeff=0.4, target=2.0, weights=None, **options):
    leaves = {
        "logprobs": LOGPROBS[rows].clone().requires_grad_(),
        "entropy": ENTROPY[rows].clone().requires_grad_(),
        "top_p_entropy": TOP_P_ENTROPY[rows].clone().requires_grad_(),
    }
    weights = torch.zeros(N, S) if weights is None else weights
    inputs = LossInputs(
        **leaves,
        old_logprobs=OLD[rows],
        loss_mask=MASK[rows],
        entropy_weights=weights[rows],
        aggregation=MASK[rows] / 40.0,
        coeff=coeff,
        target=target,
        step_entropy=step_entropy,
        num_responses=N,
        options=EntropyOptions(**options),
    )
    return inputs, leaves


def gradients(name, inputs, leaves):
    loss, metrics = entropy_loss(name, inputs)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros = torch.zeros_like(inputs.logprobs)
    return dict(zip(leaves, (zeros if g is None else g for g in found), strict=True)), metrics


def test_the_options_name_every_method():
    assert tuple(ENTROPY_METHODS) == ENTROPY_METHOD_NAMES
    assert all("arXiv" in method.source for method in ENTROPY_METHODS.values())


# ---------------------------------------------------------------- penalties


def plain_entropy(name, entropy, top_p, weights, options):
    """H in float64, response by response."""
    total = 0.0
    for i in range(N):
        m = MASK[i]
        if name in ("naive", "adaptive"):
            h = entropy[i][m].mean()
        elif name == "paec":
            h = (weights[i][m] * top_p[i][m]).sum() / weights[i][m].sum()
        else:
            values = top_p[i][m]
            peak = values > torch.quantile(values.detach(), options.siren_peak_quantile)
            if options.siren_peak_quantile == 0:
                peak = torch.ones_like(peak)
            h = values[peak].mean() if peak.any() else values.sum() * 0
        total = total + h / N
    return total


PENALTIES = {
    "naive": lambda h, o: -0.4 * h,
    "adaptive": lambda h, o: -0.4 * h,
    "siren": lambda h, o: 0.4 * (h - 2.0) ** 2 if o.siren_anchor else -0.4 * h,
    "entropy-constraint": lambda h, o: 0.4 * (2.0 - h),
    "paec": lambda h, o: 0.4 * torch.clamp(2.0 - h, min=0) ** 2,
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in PENALTIES),
        ("siren", {"siren_anchor": False}),
        ("siren", {"siren_peak_quantile": 0.0}),
        ("entropy-constraint", {"siren_peak_quantile": 0.0}),
    ],
)
def test_penalties_have_the_gradient_of_their_formula(name, options):
    """With the step's own H for the slope, the sum over micro-batches has the whole loss's gradient."""
    weights = ENTROPY_METHODS["paec"].plan(step_inputs()).entropy_weights
    options_ = EntropyOptions(**options)
    leaves = [t.double().clone().requires_grad_() for t in (ENTROPY, TOP_P_ENTROPY)]
    h = plain_entropy(name, *leaves, weights.double(), options_)
    expected = torch.autograd.grad(PENALTIES[name](h, options_), leaves, allow_unused=True)
    expected = [torch.zeros(N, S) if g is None else g.float() for g in expected]
    assert sum(float(g.abs().sum()) for g in expected) > 0, "the comparison has something to say"
    for size in (1, 2, 6):
        got = [torch.zeros(N, S), torch.zeros(N, S)]
        recorded = 0.0
        for start in range(0, N, size):
            rows = slice(start, start + size)
            inputs, own = loss_inputs(rows, step_entropy=float(h.detach()), weights=weights, **options)
            found, metrics = gradients(name, inputs, own)
            got[0][rows], got[1][rows] = found["entropy"], found["top_p_entropy"]
            recorded += float(metrics[entropy_metric(name)])
            assert not found["logprobs"].any()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
        assert recorded == pytest.approx(float(h.detach()), rel=1e-5)


def test_paec_costs_nothing_above_its_bound():
    weights = ENTROPY_METHODS["paec"].plan(step_inputs()).entropy_weights
    inputs, leaves = loss_inputs(step_entropy=2.5, target=2.0, weights=weights)
    found, _ = gradients("paec", inputs, leaves)
    assert not any(g.any() for g in found.values())


def test_siren_without_masks_and_anchor_is_naive():
    options = {"siren_anchor": False, "siren_peak_quantile": 0.0}
    inputs, leaves = loss_inputs(**options)
    # With --entropy-top-p 1 the top-p entropy is the full one.
    inputs = dataclasses.replace(inputs, top_p_entropy=inputs.entropy)
    siren, _ = entropy_loss("siren", inputs)
    naive, _ = entropy_loss("naive", inputs)
    (a,) = torch.autograd.grad(siren, leaves["entropy"])
    (b,) = torch.autograd.grad(naive, leaves["entropy"])
    torch.testing.assert_close(a, b)


def test_microbatch_estimate_applies_the_penalty_to_each_micro_batch():
    h = torch.tensor([1.0, 2.0, 4.0, 5.0])

    def share(part, step_entropy=None):
        return penalty_share(part, lambda x: 0.5 * (x - 2.5) ** 2, num_responses=4, step_entropy=step_entropy)

    assert share(h).item() == pytest.approx(0.5 * 0.5**2)
    halves = sum(share(part) for part in h.split(2))
    assert halves.item() == pytest.approx(0.5 * (0.5 * 1.0**2 + 0.5 * 2.0**2))


# ---------------------------------------------------------------- plans


def test_covariance_is_over_the_tokens_of_the_step():
    a, logp = ADVANTAGES[MASK].double(), LOGPROBS[MASK].double()
    expected = (a - a.mean()) * (logp - logp.mean())
    got = token_covariance(LOGPROBS, ADVANTAGES, MASK)
    torch.testing.assert_close(got[MASK], expected)
    assert not got[~MASK].any()
    noise = torch.where(MASK, LOGPROBS, torch.full_like(LOGPROBS, float("nan")))
    torch.testing.assert_close(token_covariance(noise, ADVANTAGES, MASK), got)


def test_clip_cov_drops_random_tokens_within_the_bounds():
    bounds = {"entropy_cov_low": 0.05, "entropy_cov_high": 0.6, "entropy_cov_fraction": 0.1}
    covariance = token_covariance(LOGPROBS, ADVANTAGES, MASK)
    allowed = MASK & (covariance > 0.05) & (covariance < 0.6)
    number = int(0.1 * int(MASK.sum()))
    assert 0 < number < int(allowed.sum())
    chosen = []
    for seed in range(40):
        plan = ENTROPY_METHODS["clip-cov"].plan(step_inputs(seed=seed, **bounds))
        dropped = MASK & ~plan.keep
        assert int(dropped.sum()) == number == plan.metrics["clip-cov/tokens"]
        assert not (dropped & ~allowed).any()
        chosen.append(dropped)
    again = ENTROPY_METHODS["clip-cov"].plan(step_inputs(seed=3, **bounds))
    assert torch.equal(MASK & ~again.keep, chosen[3]), "the same seed chooses the same tokens"
    assert torch.stack(chosen).any(0).sum() == allowed.sum(), "every candidate is chosen at times"


def test_clip_cov_never_takes_clipped_tokens():
    bounds = {"entropy_cov_low": 0.05, "entropy_cov_high": 0.6, "entropy_cov_fraction": 1.0}
    inputs = step_inputs(**bounds)
    candidates = MASK & ~ENTROPY_METHODS["clip-cov"].plan(inputs).keep
    clipped = torch.zeros_like(MASK)
    clipped[candidates.nonzero()[0].tolist()[0]] = True
    plan = ENTROPY_METHODS["clip-cov"].plan(dataclasses.replace(inputs, clipped=clipped))
    assert torch.equal(MASK & ~plan.keep, candidates & ~clipped)


def test_at_least_one_token_is_chosen():
    options = {"entropy_cov_fraction": 1e-9}
    assert ENTROPY_METHODS["kl-cov"].plan(step_inputs(**options)).metrics["kl-cov/tokens"] == 1


def test_kl_cov_pulls_the_tokens_of_largest_covariance_back():
    inputs = step_inputs(entropy_cov_fraction=0.1)
    plan = ENTROPY_METHODS["kl-cov"].plan(inputs)
    covariance = token_covariance(LOGPROBS, ADVANTAGES, MASK)
    number = int(0.1 * int(MASK.sum()))
    threshold = covariance[MASK].sort(descending=True).values[number - 1]
    expected = (MASK & (covariance >= threshold)).float()
    assert torch.equal(plan.entropy_weights, expected) and expected.sum() == number
    losses, leaves = loss_inputs(weights=plan.entropy_weights, coeff=0.7)
    found, metrics = gradients("kl-cov", losses, leaves)
    torch.testing.assert_close(found["logprobs"], 0.7 / 40 * expected * (LOGPROBS - OLD).sign())
    value = 0.7 / 40 * ((LOGPROBS - OLD).abs() * expected).sum()
    torch.testing.assert_close(metrics["kl-cov/loss"], value)


def test_kl_cov_marks_nothing_before_the_policy_has_moved():
    assert not ENTROPY_METHODS["kl-cov"].plan(step_inputs(moved=False)).entropy_weights.any()


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_entropy_advantage_adds_a_bounded_bonus(kappa):
    plan = ENTROPY_METHODS["entropy-advantage"].plan(step_inputs(coeff=0.1, entropy_advantage_kappa=kappa))
    for i in range(N):
        for t in range(S):
            a = float(ADVANTAGES[i, t])
            bonus = min(0.1 * float(ENTROPY[i, t]), abs(a) / kappa) if MASK[i, t] else 0.0
            assert float(plan.advantages[i, t]) == pytest.approx(a + bonus, abs=1e-6)
    both = {(float(p) > float(a)) for p, a in zip(plan.advantages[MASK], ADVANTAGES[MASK], strict=True)}
    assert both == {True}
    assert plan.keep is None and plan.entropy_weights is None


def test_high_entropy_tokens_keep_those_above_the_response_s_quantile():
    plan = ENTROPY_METHODS["high-entropy-tokens"].plan(step_inputs(entropy_token_quantile=0.6))
    for i in range(N):
        threshold = torch.quantile(ENTROPY[i][MASK[i]], 0.6)
        assert torch.equal(plan.keep[i], MASK[i] & (ENTROPY[i] > threshold))
    share = float(plan.keep.sum() / MASK.sum())
    assert plan.metrics["high-entropy-tokens/kept"] == pytest.approx(share)


def test_paec_s_soft_mask():
    plan = ENTROPY_METHODS["paec"].plan(step_inputs())
    expected = (1 - (-TOP_P_ENTROPY).exp()) * (-GAP).exp() * MASK
    torch.testing.assert_close(plan.entropy_weights, expected)
    certain = dataclasses.replace(step_inputs(), top_p_entropy=torch.zeros(N, S))
    assert not ENTROPY_METHODS["paec"].plan(certain).entropy_weights.any()


# ---------------------------------------------------------------- the rest


def test_methods_without_a_term_add_none():
    inputs, _ = loss_inputs()
    for name in ("none", "entropy-advantage", "high-entropy-tokens", "clip-cov"):
        assert entropy_loss(name, inputs) == (None, {})


def test_the_coefficient_ascends_towards_the_target_and_stays_positive():
    assert ascend(0.01, 1.5, 2.0, 0.1) == pytest.approx(0.06)
    assert ascend(0.01, 2.05, 2.0, 0.1) == pytest.approx(0.005)
    assert ascend(0.01, 3.0, 2.0, 0.1) == 0.0
