"""The fused linear path equals the plain product followed by the reference, values and both gradients."""

import pytest
import torch

from siren_megatron.vocab_parallel import TopPCounters, linear_token_stats, vocab_parallel_token_stats
from tests.unit.vocab_parallel_reference import reference_stats


def inputs(rows=37, hidden=16, vocab=503, scale=1.5, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    h = torch.randn(rows, hidden, generator=g).to(dtype)
    w = (torch.randn(vocab, hidden, generator=g) * scale).to(dtype)
    return h, w, torch.randint(0, vocab - 3, (rows,), generator=g), torch.randn(3, rows, generator=g)


def loss_of(stats, weights):
    return sum((w.to(s.dtype) * s).sum() for w, s in zip(weights, stats, strict=True))


@pytest.mark.parametrize("path", ["fused", "logits", "auto"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale", [0.05, 1.5], ids=["flat", "peaked"])
def test_matches_float64_reference(path, temperature, scale):
    h, w, labels, weights = inputs(scale=scale)
    a, b = h.clone().requires_grad_(True), w.clone().requires_grad_(True)
    stats = linear_token_stats(
        a, b, labels, top_p=0.8, vocab_size=500, temperature=temperature, chunk_mb=0.01, path=path
    )
    loss_of(stats, weights).backward()
    a64, b64 = h.double().requires_grad_(True), w.double().requires_grad_(True)
    z = a64 @ b64.t() / temperature
    *expected, _, leaf = reference_stats(z, labels, 0.8, False, 500)
    loss_of(expected, weights).backward()
    z.backward(torch.nn.functional.pad(leaf.grad, (0, 3)))
    for value, target in zip(stats, expected, strict=True):
        torch.testing.assert_close(value.double(), target.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad.double(), a64.grad, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(b.grad.double(), b64.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", ["fused", "logits"])
def test_main_grad_takes_the_weight_gradient(dtype, path):
    h, w, labels, weights = inputs(dtype=dtype)
    plain = w.clone().requires_grad_(True)
    options = dict(top_p=0.8, chunk_mb=0.02, path=path)
    loss_of(linear_token_stats(h, plain, labels, **options), weights).backward()
    weight = torch.nn.Parameter(w.clone())
    weight.main_grad = torch.ones(w.shape)  # what earlier micro-batches left there
    weight.grad_added_to_main_grad = False
    loss_of(linear_token_stats(h, weight, labels, **options), weights).backward()
    assert weight.grad_added_to_main_grad
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.main_grad - 1, plain.grad.float(), **tolerance)


def test_equals_the_logits_path_in_bf16():
    h, w, labels, weights = inputs(dtype=torch.bfloat16)
    results = []
    for path in ("fused", "logits"):
        a, b = h.clone().requires_grad_(True), w.clone().requires_grad_(True)
        stats = linear_token_stats(a, b, labels, top_p=0.8, chunk_mb=64, path=path)
        loss_of(stats, weights).backward()
        results.append((*stats, a.grad, b.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    direct = vocab_parallel_token_stats(h @ w.t(), labels, top_p=0.8)
    for first, second in zip(results[0], direct, strict=False):
        assert torch.equal(first, second)


def test_frozen_inputs_counters_and_backward_twice():
    h, w, labels, weights = inputs(scale=0.05)
    counters = TopPCounters()
    a = h.clone().requires_grad_(True)
    stats = linear_token_stats(a, w, labels, top_p=0.8, chunk_mb=0.02, counters=counters)
    assert counters.rows == 37 and counters.nan_rows == 0
    loss = loss_of(stats, weights)
    loss.backward(retain_graph=True)
    once = a.grad.clone()
    loss.backward()
    torch.testing.assert_close(a.grad, 2 * once)
    empty = linear_token_stats(h[:0], w, labels[:0], top_p=0.8)
    assert empty.entropy.shape == (0,)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(temperature=0.0), "temperature"),
        (dict(path="quick"), "path"),
        (dict(top_p=2.0), "top_p"),
        (dict(vocab_size=600), "vocab_size"),
    ],
)
def test_refuses_nonsense(change, message):
    h, w, labels, _ = inputs()
    with pytest.raises(ValueError, match=message):
        linear_token_stats(h, w, labels, **change)
    with pytest.raises(ValueError, match="hidden"):
        linear_token_stats(h[:, :3], w, labels)
    with pytest.raises(ValueError, match="bfloat16"):
        linear_token_stats(h.bfloat16(), w, labels)
