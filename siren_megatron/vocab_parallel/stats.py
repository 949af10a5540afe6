"""Log-prob, entropy and top-p entropy of logits that are sharded over the vocabulary.

Legend: [...] = any leading shape (T rows in all), vocab = padded vocabulary, tp = tensor-parallel size,
rank r holds the token ids [r * vocab/tp, (r + 1) * vocab/tp). z = logits divided by the sampling temperature.
See docs/vocab_parallel.md for the algorithm and DESIGN.md section 3 for the definitions.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .nucleus import ShardPlan, TopPCounters, find_nucleus, make_plan
from .torch_engine import Nucleus, compute_dtype


class TokenStats(NamedTuple):
    """Statistics of each position, fp32 (fp64 for fp64 logits), all of the labels' shape [...]."""

    logprobs: Tensor
    entropy: Tensor
    top_p_entropy: Tensor


class RowState(NamedTuple):
    """What the gradient needs beside the logits: a handful of numbers a row. All [T].

    sums [T, 4] fp64 = sum e, entropy, nucleus mass, top-p entropy; the others as in Nucleus.
    """

    sums: Tensor
    row_max: Tensor
    tau: Tensor
    cut: Tensor
    members: Tensor | None
    member_count: Tensor | None

    def rows(self, chosen: slice) -> "RowState":
        """These rows' state."""
        return RowState(*(None if field is None else field[chosen] for field in self))


def _entropy(mass: Tensor, mass_ed: Tensor) -> Tensor:
    """log M - sum(e d) / M, and 0 for the empty set. Args: fp64 [T]."""
    return torch.where(mass == 0, 0.0, mass.log() - mass_ed / mass)


def stats_of(nucleus: Nucleus) -> tuple[TokenStats, RowState]:
    """Close the forward: the statistics [T] (fp64) and what the backward needs."""
    sums = nucleus.sums
    logprobs = sums.label_logit.double() - sums.row_max.double() - sums.sum_e.log()
    entropy, top_p_entropy = _entropy(sums.sum_e, sums.sum_ed), _entropy(nucleus.mass, nucleus.mass_ed)
    state = torch.stack([sums.sum_e, entropy, nucleus.mass, top_p_entropy], -1)
    return TokenStats(logprobs, entropy, top_p_entropy), RowState(
        state, sums.row_max, nucleus.tau, nucleus.cut, nucleus.members, nucleus.member_count
    )


def gradient_coefficients(state: RowState, grads: TokenStats, top_p: float) -> Tensor:
    """a0, a1, b0, b1 [T, 4] of dL/dz = e (a0 + a1 d + 1_N (b0 + b1 d)) + g_logprob 1[v = label].

    From -p (log p + H) = -(e / S) (d - log S + H), and the same for q inside N. Args: grads, fp64 [T].
    """
    sum_e, entropy, mass, top_p_entropy = state.sums.unbind(-1)
    g_entropy, g_top = grads.entropy, grads.top_p_entropy
    if top_p == 1.0:
        g_entropy, g_top = g_entropy + g_top, torch.zeros_like(g_top)
    a0 = -(grads.logprobs + g_entropy * (entropy - sum_e.log())) / sum_e
    inverse = torch.where(mass == 0, 0.0, g_top / mass)
    b0 = torch.where(mass == 0, 0.0, -inverse * (top_p_entropy - mass.log()))
    return torch.stack([a0, -g_entropy / sum_e, b0, -inverse], -1).to(state.row_max.dtype)


def write_gradient(
    z: Tensor, out: Tensor, local: Tensor, state: RowState, grads: TokenStats, plan: ShardPlan
):
    """dL/dlogits of the rows z [T, Vs] into out, which may be z. Args: local [T]; grads fp64 [T]."""
    coefs = gradient_coefficients(state, grads, plan.top_p)
    label_grad = grads.logprobs.to(coefs.dtype)
    plan.engine.backward(z, out, coefs, state, plan, local, label_grad)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, plan: ShardPlan, inplace: bool, counters):
        z = logits.reshape(-1, logits.shape[-1]).contiguous()
        local = labels.reshape(-1) - plan.rank * z.shape[1]
        stats, state = stats_of(find_nucleus(z, local, plan, counters))
        ctx.save_for_backward(z, local, *state)
        ctx.plan, ctx.inplace, ctx.shape = plan, inplace, logits.shape
        dtype = compute_dtype(z.dtype)
        return tuple(s.to(dtype).view(labels.shape) for s in stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        z, local, *state = ctx.saved_tensors
        out = z if ctx.inplace else torch.empty_like(z)
        grads = TokenStats(*(g.reshape(-1).double() for g in grads))
        write_gradient(z, out, local, RowState(*state), grads, ctx.plan)
        if ctx.inplace:  # whoever else saved these logits must hear of it
            torch.autograd.graph.increment_version(z)
        return out.view(ctx.shape), None, None, None, None


def check_labels(labels: Tensor, rows_shape: torch.Size, vocab_size: int) -> None:
    """ValueError for labels that aren't token ids of these rows (on CUDA: an assertion, without a wait)."""
    if labels.shape != rows_shape:
        raise ValueError(f"labels {tuple(labels.shape)} must have the shape {tuple(rows_shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    valid = ((labels >= 0) & (labels < vocab_size)).all()
    if labels.device.type == "cpu":
        if not valid:
            raise ValueError(f"labels must be token ids in [0, {vocab_size})")
    else:
        torch._assert_async(valid)


def _refuse_leaf(logits: Tensor) -> None:
    base = logits if logits._base is None else logits._base
    if any(t.is_leaf and t.requires_grad for t in (logits, base)):
        raise ValueError("inplace_backward would overwrite a leaf tensor (a parameter) with its gradient")


def vocab_parallel_token_stats(
    vocab_parallel_logits: Tensor,
    labels: Tensor,
    *,
    top_p: float = 1.0,
    top_p_boundary: str = "inclusive",
    vocab_size: int | None = None,
    tp_group=None,
    chunk_mb: float = 64,
    inplace_backward: bool = False,
    implementation: str = "auto",
    counters: TopPCounters | None = None,
) -> TokenStats:
    """Log-prob of the label, entropy and top-p entropy of each position, exact on a sharded vocabulary.

    With p = softmax(z) over the true vocabulary and q = p renormalised inside the nucleus N (the shortest
    prefix, by probability and then by lowest token id, whose mass reaches top_p):
    logprobs = log p_label, entropy = -sum_v p_v log p_v, top_p_entropy = -sum_{v in N} q_v log q_v.
    The gradients are 1[v = label] - p_v, -p_v (log p_v + H) and -1_N q_v (log q_v + H_N): N is a constant.

    Args:
        vocab_parallel_logits: [..., vocab/tp] fp32, bf16, fp16 or fp64, already divided by the temperature;
            never modified in forward.
        labels: [...] GLOBAL token ids, the same on every rank.
        top_p: mass of the nucleus, in (0, 1]; 1 = the whole vocabulary.
        top_p_boundary: "inclusive" keeps the token that crosses top_p, "exclusive" leaves it out (the set may
            then be empty: entropy 0).
        vocab_size: true vocabulary; columns with a global id >= vocab_size are padding: no probability,
            zero gradient. None = all columns.
        tp_group: tensor-parallel process group; None = unsharded.
        chunk_mb: budget of temporary memory in MiB.
        inplace_backward: let backward write the gradient over the logits, where nobody else needs them.
        implementation: "auto", "torch", "native" (compiled, CPU) or "triton" (CUDA).
        counters: added to in place: rows, rows that needed the radix select, NaN rows.

    Returns:
        TokenStats of fp32 tensors [...] (fp64 for fp64 logits), the same on every rank. A row with a NaN,
        or with no finite logit, is NaN; other rows aren't touched by it.

    Raises:
        ValueError: for an option, a label or a shape that makes no sense; inplace_backward on a leaf.

    References: SIREN, arXiv 2509.25133 (top-p mask, there with the exclusive boundary).
    """
    plan = make_plan(
        vocab_parallel_logits, top_p, top_p_boundary, vocab_size, tp_group, chunk_mb, implementation
    )
    check_labels(labels, vocab_parallel_logits.shape[:-1], plan.vocab_size)
    if inplace_backward:
        _refuse_leaf(vocab_parallel_logits)
    return TokenStats(*_TokenStats.apply(vocab_parallel_logits, labels, plan, inplace_backward, counters))


@torch.no_grad()
def top_p_mask(
    vocab_parallel_logits: Tensor,
    *,
    top_p: float,
    top_p_boundary: str = "inclusive",
    vocab_size: int | None = None,
    tp_group=None,
    chunk_mb: float = 64,
    implementation: str = "auto",
) -> Tensor:
    """Membership of this shard's tokens in the nucleus, for reports: the statistics never build it.

    Args: as in vocab_parallel_token_stats.

    Returns: bool [..., vocab/tp]; False in padding columns and in NaN rows. top_p = 1 keeps all z > -inf.

    Raises: ValueError: for an option or a shape that makes no sense.
    """
    plan = make_plan(
        vocab_parallel_logits, top_p, top_p_boundary, vocab_size, tp_group, chunk_mb, implementation
    )
    z = vocab_parallel_logits.reshape(-1, vocab_parallel_logits.shape[-1]).contiguous()
    nowhere = torch.full((z.shape[0],), -1, dtype=torch.int64, device=z.device)
    nucleus = find_nucleus(z, nowhere, plan, None)
    column = torch.arange(plan.width, device=z.device)
    out = torch.zeros(z.shape, dtype=torch.bool, device=z.device)
    step = max(1, plan.chunk_bytes // (8 * z.shape[1]))
    for rows in (slice(i, i + step) for i in range(0, z.shape[0], step)):
        true = z[rows, : plan.width].to(nucleus.tau.dtype)
        tau, cut = nucleus.tau[rows].unsqueeze(1), nucleus.cut[rows].unsqueeze(1)
        out[rows, : plan.width] = (true > tau) | ((true == tau) & (column < cut))
    return out.view(vocab_parallel_logits.shape)
