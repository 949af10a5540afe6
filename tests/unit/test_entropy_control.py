"""Coefficient schedules, moving coefficients and their state, plans applied to a batch."""

from __future__ import annotations

import math

import pytest
import torch

from siren_megatron.batch import Sample, make_batch
from siren_megatron.entropy_control import EntropyControl, EntropyStep, scheduled_coeff
from siren_megatron.grpo import PolicyLossOptions
from siren_megatron.method_options import EntropyOptions


def control(method, **options):
    return EntropyControl(EntropyOptions(entropy_method=method, **options), num_steps=11, seed=1)


def batch():
    lengths = (5, 8, 3, 6)
    samples = [Sample((1, 2), tuple(range(n)), (-1.0,) * n, "stop") for n in lengths]
    advantages = torch.tensor([0.5, -0.5, 1.0, -1.0])
    made = make_batch(samples, advantages, advantages, multiple=8)
    generator = torch.Generator().manual_seed(0)

    def draw(scale):
        return torch.rand(made.tokens.shape, generator=generator) * scale * made.loss_mask

    return made.replace(old_logprobs=-draw(3), entropy=draw(4), top_p_entropy=draw(2), top_two_gap=draw(2))


def begin(method_control, made, index=0, step=0, now=None):
    return method_control.begin(
        made,
        made if now is None else now,
        anchor=1.7,
        step=step,
        index=index,
        policy_options=PolicyLossOptions(),
    )


def test_schedules_start_and_end_where_they_say():
    for schedule, middle in (("constant", 0.4), ("linear", 0.25), ("cosine", 0.25)):
        end = 0.4 if schedule == "constant" else 0.1
        assert scheduled_coeff(0.4, 0.1, schedule, 0, 11) == pytest.approx(0.4)
        assert scheduled_coeff(0.4, 0.1, schedule, 5, 11) == pytest.approx(middle)
        assert scheduled_coeff(0.4, 0.1, schedule, 10, 11) == pytest.approx(end)
        assert scheduled_coeff(0.4, 0.1, schedule, 50, 11) == pytest.approx(end)
    quarter = 0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi * 0.2))
    assert scheduled_coeff(0.4, 0.1, "cosine", 2, 11) == pytest.approx(quarter)
    assert scheduled_coeff(0.4, 0.1, "linear", 0, 1) == 0.4
    with pytest.raises(ValueError, match="--entropy-coeff-schedule steps"):
        scheduled_coeff(0.4, 0.1, "steps", 0, 1)


def test_defaults_are_the_method_s_own():
    assert control("siren").coeff(0) == 0.005
    assert control("entropy-advantage").coeff(3) == 0.4
    assert control("kl-cov").coeff(3) == 1.0
    assert control("siren", entropy_coeff=0.1).coeff(7) == 0.1
    fading = control("siren", entropy_coeff=0.1, entropy_coeff_schedule="linear")
    assert fading.coeff(10) == 0.0


@pytest.mark.parametrize("method", ["adaptive", "entropy-constraint"])
def test_a_moving_coefficient_survives_a_checkpoint(method):
    first = control(method, entropy_coeff=0.01, entropy_rate=0.1)
    metric = f"{method}/entropy"
    values = first.end(EntropyStep(0.01, 2.0, None), {metric: 1.8})
    assert first.coeff(0) == pytest.approx(0.01 + 0.1 * 0.2)
    expected = -0.01 * 1.8 if method == "adaptive" else 0.01 * (2.0 - 1.8)
    assert values == {f"{method}/loss": pytest.approx(expected)}
    second = control(method, entropy_rate=0.1)
    second.load_state_dict(first.state_dict())
    assert second.coeff(0) == first.coeff(0)
    second.end(EntropyStep(second.coeff(0), 2.0, None), {metric: 9.0})
    assert second.coeff(0) == 0.0


def test_a_constant_coefficient_is_not_restored_over_the_option():
    state = control("siren", entropy_coeff=0.1).state_dict()
    resumed = control("siren", entropy_coeff=0.2)
    resumed.load_state_dict(state)
    assert resumed.coeff(0) == 0.2


def test_another_method_s_state_is_refused():
    with pytest.raises(
        ValueError, match="--entropy-method naive: the checkpoint of --load was made with siren"
    ):
        control("naive").load_state_dict(control("siren").state_dict())


def test_siren_measures_its_masked_entropy_and_uses_it_for_the_slope():
    made, siren = batch(), control("siren")
    expected = []
    for i in range(4):
        values = made.top_p_entropy[i][made.loss_mask[i]]
        expected.append(values[values > torch.quantile(values, 0.8)].mean())
    assert siren.measure(made) == pytest.approx(float(torch.stack(expected).mean()))
    _, step, metrics = begin(siren, made)
    assert step == EntropyStep(0.005, 1.7, siren.measure(made))
    # 1, 2, 1 and 1 of 5, 8, 3 and 6 positions are above the 0.8 quantile.
    assert metrics == {"entropy_coeff": 0.005, "siren/positions_per_response": 1.25}
    _, step, _ = begin(control("siren", entropy_target=0.9, siren_anchor_estimate="microbatch"), made)
    assert step == EntropyStep(0.005, 0.9, None)


def test_paec_measures_with_the_mask_of_its_plan():
    made, paec = batch(), control("paec")
    w = (1 - (-made.top_p_entropy).exp()) * (-made.top_two_gap).exp() * made.loss_mask
    expected = ((w * made.top_p_entropy).sum(1) / w.sum(1)).mean()
    assert paec.measure(made) == pytest.approx(float(expected), rel=1e-5)
    planned, step, _ = begin(paec, made)
    torch.testing.assert_close(planned.entropy_weights, w)
    assert step.step_entropy == pytest.approx(float(expected), rel=1e-5)


def test_masks_multiply_the_weights_that_are_there():
    made = batch()
    halves = made.replace(token_weights=made.token_weights * 0.5)
    planned, _, _ = begin(control("high-entropy-tokens"), halves)
    assert set(planned.token_weights.unique().tolist()) == {0.0, 0.5}
    assert 0 < int((planned.token_weights > 0).sum()) < made.num_tokens


def test_clipped_tokens_are_those_of_the_current_policy():
    """Of two candidates for clip-cov the one whose ratio left the clip is not taken."""
    made = batch()
    clip_cov = control("clip-cov", entropy_cov_low=-9.0, entropy_cov_high=9.0, entropy_cov_fraction=1.0)
    moved = made.old_logprobs.clone()
    positive = made.loss_mask & (made.token_advantages > 0)
    moved[positive] += 1.0
    planned, _, _ = begin(clip_cov, made, index=1, now=made.replace(old_logprobs=moved))
    assert torch.equal(planned.token_weights > 0, positive)


def test_random_choices_differ_by_step_and_repeat_by_seed():
    made = batch()
    clip_cov = control("clip-cov", entropy_cov_low=-9.0, entropy_cov_high=9.0, entropy_cov_fraction=0.5)

    def chosen(step, index):
        return begin(clip_cov, made, step=step, index=index)[0].token_weights

    assert torch.equal(chosen(3, 1), chosen(3, 1))
    assert not torch.equal(chosen(3, 1), chosen(3, 2))
    assert not torch.equal(chosen(3, 1), chosen(4, 1))


def test_refresh_is_for_optimizer_steps_after_the_first():
    assert not control("siren").needs_refresh(1)
    assert control("siren", entropy_refresh=True).needs_refresh(1)
    assert not control("siren", entropy_refresh=True).needs_refresh(0)
    assert control("clip-cov").needs_refresh(1) and control("kl-cov").needs_refresh(2)
