"""Float64, sort-based, unsharded reference of the token statistics, and the inputs of their tests."""

import torch
from torch import Tensor

KINDS = (
    "random",
    "peaked",
    "massive_ties",
    "all_equal",
    "minus_inf",
    "one_allowed",
    "language_model",
    "large",
)


def reference_mask(z: Tensor, top_p: float, exclusive: bool) -> Tensor:
    """Nucleus by a full sort in float64 [T, V] bool: probability descending, then token id ascending."""
    z = z.detach().double()
    values, ids = z.sort(dim=-1, descending=True, stable=True)
    if top_p == 1.0:
        return z > -torch.inf
    sums = (values - values[..., :1]).exp().cumsum(-1)
    target = top_p * sums[..., -1:]
    before = torch.cat([torch.zeros_like(sums[..., :1]), sums[..., :-1]], -1)
    keep = sums < target if exclusive else before < target
    return torch.zeros_like(keep).scatter(-1, ids, keep) & ~sums[..., -1:].isnan()


def reference_stats(z: Tensor, labels: Tensor, top_p: float, exclusive: bool, vocab_size: int | None = None):
    """(logprobs, entropy, top_p_entropy, mask, leaf): float64, differentiable with respect to leaf [T, V]."""
    leaf = z.detach().double()[..., :vocab_size].clone().requires_grad_(True)
    mask = reference_mask(leaf, top_p, exclusive)
    logp = leaf.log_softmax(-1)

    def plogp(logq: Tensor, inside: Tensor) -> Tensor:
        logq = torch.where(inside, logq, 0.0)
        return torch.where(inside, logq.exp() * logq, 0.0).sum(-1)

    entropy = -plogp(logp, leaf.detach() > -torch.inf)
    # An empty nucleus would make log_softmax NaN: such rows take entropy 0 and no gradient.
    some = mask.any(-1, keepdim=True)
    logq = torch.where(mask | ~some, leaf, -torch.inf).log_softmax(-1)
    top_p_entropy = torch.where(some.squeeze(-1), -plogp(logq, mask), 0.0)
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy, top_p_entropy, mask, leaf


def make_logits(kind: str, rows: int, vocab: int, seed: int = 0) -> Tensor:
    """fp32 logits [rows, vocab] of one of the KINDS."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, vocab, generator=g)
    if kind == "peaked":
        return z * 8.0
    if kind == "massive_ties":
        return (z * 2.0).round()
    if kind == "all_equal":
        return torch.full_like(z, -3.25)
    if kind == "minus_inf":
        return z.masked_fill(torch.rand(rows, vocab, generator=g) < 0.7, -torch.inf).index_fill_(
            1, torch.tensor([vocab // 2]), 1.0
        )
    if kind == "one_allowed":
        return torch.full_like(z, -torch.inf).index_fill_(1, torch.tensor([vocab // 3]), 4.0)
    if kind == "language_model":  # a few likely tokens over a broad tail
        z = z * 2.0
        ranks = torch.arange(1, min(40, vocab) + 1, dtype=torch.float32)
        ids = torch.rand(rows, vocab, generator=g).argsort(-1)[:, : ranks.numel()]
        return z.scatter(1, ids, 16.0 - 2.5 * ranks.log() * (1.0 + torch.rand(rows, 1, generator=g)))
    if kind == "large":
        return z * 3.0 + 1000.0
    assert kind == "random", kind
    return z


def assert_matches_reference(
    logits, labels, stats, mask, weights, top_p, exclusive, vocab_size=None, grad=None
):
    """Values, membership token by token, and gradient of (weights [3, T] * stats).sum()."""
    *expected, expected_mask, leaf = reference_stats(logits, labels, top_p, exclusive, vocab_size)
    if mask is not None:
        width = expected_mask.shape[-1]
        wrong = (mask[..., :width] != expected_mask).sum().item()
        assert wrong == 0, f"{wrong} tokens differ from the float64 sort's nucleus"
        assert not mask[..., width:].any(), "a padding column is in the nucleus"
    for name, value, target in zip(("logprobs", "entropy", "top_p_entropy"), stats, expected, strict=True):
        torch.testing.assert_close(
            value.double(), target.detach(), rtol=1e-6, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    if grad is None:
        return
    sum((w.double() * s).sum() for w, s in zip(weights, expected, strict=True)).backward()
    width = leaf.shape[-1]
    assert not grad[..., width:].any(), "a padding column has a gradient"
    atol, rtol = (1e-5, 1e-2) if grad.dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(grad[..., :width].double(), leaf.grad, rtol=rtol, atol=atol)
