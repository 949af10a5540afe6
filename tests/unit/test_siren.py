"""Peak mask against torch.quantile, aggregation and the penalty's gradient in closed form."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siren_megatron.entropy_methods import both_masks, penalty_share
from siren_megatron.method_options import EntropyOptions
from siren_megatron.siren import anchored_penalty, masked_entropy, peak_entropy_mask


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    quantile=st.sampled_from([0.05, 0.2, 0.5, 0.8, 0.95]),
    tied=st.booleans(),
)
def test_peak_mask_is_torch_quantile_over_each_response(seed, lengths, quantile, tied):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(len(lengths), 16, generator=generator)
    if tied:
        entropy = (entropy * 4).round() / 4
    loss_mask = torch.zeros_like(entropy, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = int(torch.randint(0, 16 - length + 1, (1,), generator=generator))
        loss_mask[row, start : start + length] = True
    got = peak_entropy_mask(entropy, loss_mask, quantile)
    for row, length in enumerate(lengths):
        if length == 0:
            assert not got[row].any()
            continue
        values = entropy[row][loss_mask[row]]
        assert torch.equal(got[row][loss_mask[row]], values > torch.quantile(values, quantile))
        assert not got[row][~loss_mask[row]].any()


def test_values_outside_the_response_change_nothing():
    entropy = torch.tensor([[9.0, 1.0, 2.0, 3.0, 9.0]])
    loss_mask = torch.tensor([[False, True, True, True, False]])
    expected = torch.tensor([[False, False, False, True, False]])
    assert torch.equal(peak_entropy_mask(entropy, loss_mask, 0.8), expected)


def test_quantile_zero_keeps_every_position():
    loss_mask = torch.tensor([[False, True, True]])
    assert torch.equal(peak_entropy_mask(torch.ones(1, 3), loss_mask, 0.0), loss_mask)


def test_equal_entropies_select_nothing_and_count_as_zero():
    entropy = torch.ones(1, 4, requires_grad=True)
    mask = peak_entropy_mask(entropy, torch.ones(1, 4, dtype=torch.bool), 0.8)
    h = masked_entropy(entropy, mask)
    h.sum().backward()
    assert h.item() == 0.0 and torch.equal(entropy.grad, torch.zeros(1, 4))


def test_masked_entropy_is_the_mean_of_the_selected_and_ignores_nan_elsewhere():
    entropy = torch.tensor([[1.0, float("nan"), 3.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(masked_entropy(entropy, mask), torch.tensor([2.0, 6.0]))


def test_step_penalty_has_the_gradient_of_the_squared_distance_for_any_split():
    torch.manual_seed(1)
    h = torch.rand(6, dtype=torch.float64, requires_grad=True)
    beta, anchor = 0.3, 0.9
    (expected,) = torch.autograd.grad(anchored_penalty(h.mean(), coeff=beta, anchor=anchor), h)
    torch.testing.assert_close(expected, (2 * beta * (h.mean() - anchor) / 6).detach().expand(6))
    for sizes in ([6], [2, 4], [1] * 6):
        shares = [
            penalty_share(
                part,
                lambda x: anchored_penalty(x, coeff=beta, anchor=anchor),
                num_responses=6,
                step_entropy=float(h.detach().mean()),
            )
            for part in h.split(sizes)
        ]
        (gradient,) = torch.autograd.grad(sum(shares), h)
        torch.testing.assert_close(gradient, expected)


def test_both_masks_select_the_peaks_of_the_top_p_entropy():
    entropy = torch.tensor([[0.0, 1.0, 2.0, 5.0], [9.0, 3.0, 3.0, 3.0]], requires_grad=True)
    loss_mask = torch.tensor([[True] * 4, [False, True, True, True]])
    h = both_masks(torch.zeros(2, 4), entropy, loss_mask, torch.zeros(2, 4), EntropyOptions())
    (gradient,) = torch.autograd.grad(h.sum(), entropy)
    # Only the 5.0 is above its response's quantile; the second response is flat and selects nothing.
    assert h.tolist() == [5.0, 0.0]
    assert gradient.tolist() == [[0.0, 0.0, 0.0, 1.0], [0.0] * 4]
