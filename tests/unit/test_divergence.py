"""KL estimators against the divergence itself, summed over a small vocabulary."""

import pytest
import torch

from siren_megatron.divergence import kl_estimate, response_kl


def distributions():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(50, generator=generator, dtype=torch.float64)
    reference = policy + 0.3 * torch.randn(50, generator=generator, dtype=torch.float64)
    return policy, reference.log_softmax(0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_have_the_divergence_as_their_mean(estimator):
    logits, reference = distributions()
    policy = logits.log_softmax(0)
    divergence = (policy.exp() * (policy - reference)).sum()
    mean = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
    torch.testing.assert_close(mean, divergence)


def loss_gradient(estimator):
    """Mean over the policy's own samples of the gradient of the estimator as a loss term."""
    logits, reference = distributions()
    logits.requires_grad_()
    policy = logits.log_softmax(0)
    loss = (policy.detach().exp() * kl_estimate(policy, reference, estimator)).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_gradients_in_the_loss_are_those_the_docs_say():
    logits, reference = distributions()
    logits.requires_grad_()
    policy = logits.log_softmax(0)
    (towards,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits)
    torch.testing.assert_close(loss_gradient("k2"), towards)
    torch.testing.assert_close(loss_gradient("k3"), reverse)
    torch.testing.assert_close(loss_gradient("k1"), torch.zeros(50, dtype=torch.float64))


def test_a_response_s_kl_is_the_sum_over_its_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]])
    ref = torch.tensor([[-1.5, -2.0, 50.0]])
    mask = torch.tensor([[True, True, False]])
    assert response_kl(logprobs, ref, mask, "k1").item() == pytest.approx(0.5)
    assert response_kl(logprobs, ref, mask, "k2").item() == pytest.approx(0.125)
    with pytest.raises(ValueError, match="--grpo-kl-estimator k4"):
        kl_estimate(logprobs, ref, "k4")
