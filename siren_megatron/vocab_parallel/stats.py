"""Log-prob, entropy and top-p entropy of logits that are sharded over the vocabulary.

Legend: [...] = any leading shape (T rows in all), vocab = padded vocabulary, tp = tensor-parallel size,
rank r holds the token ids [r * vocab/tp, (r + 1) * vocab/tp). z = logits divided by the sampling temperature.
See docs/vocab_parallel.md for the algorithm and DESIGN.md section 3 for the definitions.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import torch_engine
from .radix import radix_select
from .torch_engine import TOP_K, Nucleus, compute_dtype

BOUNDARIES = ("inclusive", "exclusive")


class TokenStats(NamedTuple):
    """Statistics of each position, fp32 (fp64 for fp64 logits), all of the labels' shape [...]."""

    logprobs: Tensor
    entropy: Tensor
    top_p_entropy: Tensor


class ShardPlan(NamedTuple):
    """Plain numbers that describe one call on one rank."""

    top_p: float
    exclusive: bool
    rank: int
    size: int
    width: int
    chunk_bytes: int
    tp_group: object


def _plan(logits: Tensor, top_p, top_p_boundary, vocab_size, tp_group, chunk_mb) -> ShardPlan:
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_p_boundary not in BOUNDARIES:
        raise ValueError(f"top_p_boundary must be one of {BOUNDARIES}, got {top_p_boundary!r}")
    if not chunk_mb > 0:
        raise ValueError(f"chunk_mb must be positive, got {chunk_mb}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError("vocab_parallel_logits must be [..., vocab/tp] with at least one column")
    if not logits.is_floating_point():
        raise ValueError(f"vocab_parallel_logits must be floating point, got {logits.dtype}")
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    shard = logits.shape[-1]
    vocab_size = shard * size if vocab_size is None else int(vocab_size)
    if not 0 < vocab_size <= shard * size:
        raise ValueError(f"vocab_size must be in [1, {shard * size}] (the logits' columns), got {vocab_size}")
    width = min(max(vocab_size - rank * shard, 0), shard)
    group = tp_group if size > 1 else None
    return ShardPlan(
        float(top_p), top_p_boundary == "exclusive", rank, size, width, int(chunk_mb * 2**20), group
    )


def _gather_packs(pack: Tensor, plan: ShardPlan) -> Tensor:
    """[T, words] of this rank -> [tp, T, words]: the one collective of the fast path."""
    if plan.tp_group is None:
        return pack.unsqueeze(0)
    packs = pack.new_empty((plan.size, *pack.shape))
    dist.all_gather_into_tensor(packs.flatten(0, 1), pack, group=plan.tp_group)
    return packs


def _settle(z: Tensor, nucleus: Nucleus, plan: ShardPlan) -> Nucleus:
    """Radix select for the rows that the tournament didn't certify (the same rows on every rank)."""
    failing = (~nucleus.certified).nonzero().squeeze(1)
    if failing.numel() == 0:
        return nucleus
    found = radix_select(
        z[failing], nucleus.row_max[failing], plan.width, plan.top_p, plan.exclusive,
        plan.tp_group, plan.rank, plan.chunk_bytes,
    )  # fmt: skip
    fields = nucleus._asdict()
    for name, value in found._asdict().items():
        fields[name] = fields[name].index_copy(0, failing, value)
    return Nucleus(**fields)


def find_nucleus(z: Tensor, local_labels: Tensor, plan: ShardPlan) -> Nucleus:
    """Sums and nucleus of each row. Args: z [T, Vs] contiguous; local_labels [T]."""
    top_k = 0 if plan.top_p == 1.0 else TOP_K
    pack, columns = torch_engine.sweep(z, local_labels, plan.width, top_k, plan.chunk_bytes)
    nucleus = torch_engine.merge(_gather_packs(pack, plan), columns, plan.rank, plan.top_p, plan.exclusive)
    return _settle(z, nucleus, plan)


def _entropy(mass: Tensor, mass_ed: Tensor) -> Tensor:
    """log M - sum(e d) / M, and 0 for the empty set. Args: fp64 [T]."""
    return torch.where(mass == 0, 0.0, mass.log() - mass_ed / mass)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, plan: ShardPlan):
        z = logits.reshape(-1, logits.shape[-1])
        local = labels.reshape(-1) - plan.rank * z.shape[1]
        nucleus = find_nucleus(z, local, plan)
        logprob = nucleus.label_logit.double() - nucleus.row_max.double() - nucleus.sum_e.log()
        entropy = _entropy(nucleus.sum_e, nucleus.sum_ed)
        top_p_entropy = _entropy(nucleus.mass, nucleus.mass_ed)
        sums = torch.stack([nucleus.sum_e, entropy, nucleus.mass, top_p_entropy], -1)
        ctx.save_for_backward(logits, local, sums, nucleus.row_max, nucleus.tau, nucleus.cut)
        ctx.plan = plan
        dtype = compute_dtype(z.dtype)
        return tuple(s.to(dtype).view(labels.shape) for s in (logprob, entropy, top_p_entropy))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, grad_top_p_entropy):
        logits, local, sums, row_max, tau, cut = ctx.saved_tensors
        plan: ShardPlan = ctx.plan
        z = logits.reshape(-1, logits.shape[-1])
        out = torch.empty_like(z)
        g_logprob, g_entropy, g_top = (
            g.reshape(-1).double() for g in (grad_logprobs, grad_entropy, grad_top_p_entropy)
        )
        coefs = _coefficients(sums, g_logprob, g_entropy, g_top, plan).to(row_max.dtype)
        torch_engine.backward(z, out, coefs, (row_max, tau, cut), plan.width, plan.chunk_bytes)
        _add_at_label(out, local, g_logprob, z, coefs, row_max, tau, cut, plan.width)
        return out.view(logits.shape), None, None


def _coefficients(sums: Tensor, g_logprob, g_entropy, g_top, plan: ShardPlan) -> Tensor:
    """a0, a1, b0, b1 [T, 4] of grad = e (a0 + a1 d + 1_N (b0 + b1 d)) + g_logprob 1[v = label]."""
    sum_e, entropy, mass, top_p_entropy = sums.unbind(-1)
    if plan.top_p == 1.0:
        g_entropy, g_top = g_entropy + g_top, torch.zeros_like(g_top)
    inverse = torch.where(mass == 0, 0.0, g_top / mass)
    a0 = -(g_logprob + g_entropy * (entropy - sum_e.log())) / sum_e
    b0 = torch.where(mass == 0, 0.0, -inverse * (top_p_entropy - mass.log()))
    return torch.stack([a0, -g_entropy / sum_e, b0, -inverse], -1)


def _add_at_label(out, local, g_logprob, z, coefs, row_max, tau, cut, width: int) -> None:
    """Rewrite the label's entry from scratch, label term included: one rounding to the logits' dtype."""
    row = ((local >= 0) & (local < width)).nonzero().squeeze(1)
    column = local[row]
    value = z[row, column].to(row_max.dtype) if z.data_ptr() != out.data_ptr() else None
    if value is None or z.dtype == row_max.dtype:
        out[row, column] += g_logprob[row].to(out.dtype)
        return
    threshold, a0, a1, b0, b1 = tau[row], *coefs[row].unbind(1)
    inside = (value > threshold) | ((value == threshold) & (column < cut[row]))
    d = (value - row_max[row]).clamp(min=torch_engine.lowest_exponent(row_max.dtype))
    slope = a0 + a1 * d + torch.where(inside, b0 + b1 * d, 0.0)
    out[row, column] = (d.exp() * slope + g_logprob[row].to(slope.dtype)).to(out.dtype)


def vocab_parallel_token_stats(
    vocab_parallel_logits: Tensor,
    labels: Tensor,
    *,
    top_p: float = 1.0,
    top_p_boundary: str = "inclusive",
    vocab_size: int | None = None,
    tp_group=None,
    chunk_mb: float = 64,
) -> TokenStats:
    """Log-prob of the label, entropy and top-p entropy of each position, exact on a sharded vocabulary.

    With p = softmax(z) over the true vocabulary and q = p renormalised inside the nucleus N (the shortest
    prefix, by probability and then by lowest token id, whose mass reaches top_p):
    logprobs = log p_label, entropy = -sum_v p_v log p_v, top_p_entropy = -sum_{v in N} q_v log q_v.
    The gradients are 1[v = label] - p_v, -p_v (log p_v + H) and -1_N q_v (log q_v + H_N): N is a constant.

    Args:
        vocab_parallel_logits: [..., vocab/tp] fp32, bf16 or fp64, already divided by the temperature; never
            modified in forward.
        labels: [...] GLOBAL token ids, the same on every rank.
        top_p: mass of the nucleus, in (0, 1]; 1 = the whole vocabulary.
        top_p_boundary: "inclusive" keeps the token that crosses top_p, "exclusive" leaves it out (the set may
            then be empty: entropy 0).
        vocab_size: true vocabulary; columns with a global id >= vocab_size are padding: no probability,
            zero gradient. None = all columns.
        tp_group: tensor-parallel process group; None = unsharded.
        chunk_mb: budget of temporary memory in MiB.

    Returns:
        TokenStats of fp32 tensors [...] (fp64 for fp64 logits), the same on every rank. A row with a NaN,
        or with no finite logit, is NaN; other rows aren't touched by it.

    Raises:
        ValueError: for an option or a shape that makes no sense.

    References: SIREN, arXiv 2509.25133 (top-p mask, there with the exclusive boundary).
    """
    if labels.shape != vocab_parallel_logits.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be the logits' shape without the last dimension")
    plan = _plan(vocab_parallel_logits, top_p, top_p_boundary, vocab_size, tp_group, chunk_mb)
    return TokenStats(*_TokenStats.apply(vocab_parallel_logits, labels, plan))
