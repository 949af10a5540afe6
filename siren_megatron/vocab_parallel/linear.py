"""Token statistics straight from hidden states and the sharded output weight: the logits are never whole.

Legend: T = tokens, H = hidden size, Vs = rows of this rank's weight (vocab / tp), W = its true ones.
Tokens are handled in chunks of C rows whose logits [C, Vs] fit the budget; the backward computes them again,
turns them into their gradient in place and multiplies it away. The extra cost is one matrix product.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .nucleus import (
    ShardPlan,
    TopPCounters,
    common_engine,
    concatenate,
    count,
    find_nucleus,
    gather_packs,
    list_length,
    make_plan,
    settle,
)
from .stats import RowState, TokenStats, check_labels, stats_of, write_gradient
from .torch_engine import Nucleus, compute_dtype

PATHS = ("auto", "fused", "logits")
_WORTHWHILE = 2  # "auto" fuses when the logits are more than this many budgets


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    z = hidden @ weight.t()
    return z if temperature == 1.0 else z.div_(temperature)


def _nucleus_of(h: Tensor, weight: Tensor, local: Tensor, plan: ShardPlan, step: int, temperature, counters):
    """Nucleus of all rows, one collective: sweep every chunk, gather once, settle the chunks that need it.

    A chunk is always computed whole: the same shape gives bitwise the same logits in forward and backward.
    """
    chunks = [slice(start, start + step) for start in range(0, h.shape[0], step)] or [slice(0, 0)]
    if plan.tp_group is None:
        return concatenate(
            [find_nucleus(_logits(h[c], weight, temperature), local[c], plan, counters) for c in chunks]
        )
    top_k = list_length(plan)
    swept = [
        plan.engine.sweep(_logits(h[c], weight, temperature), local[c], plan.width, top_k, plan.chunk_bytes)
        for c in chunks
    ]
    pack, columns = (torch.cat(part) for part in zip(*swept, strict=True))
    packs = gather_packs(pack, plan)
    engine = common_engine(packs, plan)
    nucleus = engine.merge(packs, columns, plan.rank, plan.top_p, plan.exclusive)
    certified = nucleus.certified.clone()
    for c in chunks:
        if not certified[c].all():
            part = _slice(nucleus, c)
            settle(_logits(h[c], weight, temperature), part, plan, engine)  # writes through the slices
    count(counters, nucleus, int((~certified).sum()))
    return nucleus


def _slice(nucleus: Nucleus, rows: slice) -> Nucleus:
    sums = type(nucleus.sums)(*(field[rows] for field in nucleus.sums))
    return Nucleus(sums, *(None if field is None else field[rows] for field in nucleus[1:]))


def _add_weight_gradient(target: Tensor, dz: Tensor, h: Tensor, chunk_bytes: int) -> None:
    """target [Vs, H] += dz^T h, without a second [Vs, H] where the dtypes differ."""
    if target.dtype == dz.dtype:
        target.addmm_(dz.t(), h)
        return
    step = max(1, chunk_bytes // (max(1, h.shape[1]) * target.itemsize))
    for start in range(0, dz.shape[1], step):
        columns = slice(start, start + step)
        target[columns].add_(dz[:, columns].t() @ h)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, plan, temperature, step, keep_logits, reduce_hidden_grad, counters
    ):
        h = hidden.reshape(-1, hidden.shape[-1])
        local = labels.reshape(-1) - plan.rank * weight.shape[0]
        z = None
        if keep_logits:
            z = _logits(h, weight, temperature)
            nucleus = find_nucleus(z, local, plan, counters)
        else:
            nucleus = _nucleus_of(h, weight, local, plan, step, temperature, counters)
        stats, state = stats_of(nucleus)
        ctx.save_for_backward(h, weight, local, z, *state)
        ctx.weight, ctx.plan, ctx.temperature, ctx.step = weight, plan, temperature, step
        ctx.reduce_hidden_grad, ctx.shape = reduce_hidden_grad, hidden.shape
        dtype = compute_dtype(hidden.dtype)
        return tuple(s.to(dtype).view(labels.shape) for s in stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        h, weight, local, z, *state = ctx.saved_tensors
        plan: ShardPlan = ctx.plan
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        # d logits / d (h W^T) = 1 / temperature, and the gradient is linear in what comes from above.
        grads = [g.reshape(-1).double() / ctx.temperature for g in grads]
        main_grad = getattr(ctx.weight, "main_grad", None) if want_weight else None
        target = main_grad
        if want_weight and main_grad is None:
            target = torch.zeros_like(weight, dtype=compute_dtype(weight.dtype))
        grad_hidden = torch.empty_like(h) if want_hidden else None
        for start in range(0, h.shape[0], ctx.step):
            rows = slice(start, start + ctx.step)
            dz = _logits(h[rows], weight, ctx.temperature) if z is None else z[rows].clone()
            write_gradient(
                dz, dz, local[rows], RowState(*state).rows(rows), TokenStats(*(g[rows] for g in grads)), plan
            )
            if want_hidden:
                torch.mm(dz, weight, out=grad_hidden[rows])
            if want_weight:
                _add_weight_gradient(target, dz, h[rows], plan.chunk_bytes)
        if want_hidden:
            if ctx.reduce_hidden_grad and plan.tp_group is not None:
                dist.all_reduce(grad_hidden, group=plan.tp_group)
            grad_hidden = grad_hidden.view(ctx.shape)
        grad_weight = None
        if want_weight and main_grad is None:
            grad_weight = target.to(weight.dtype)
        elif want_weight and hasattr(ctx.weight, "grad_added_to_main_grad"):
            # Megatron's contract: the flag says that main_grad has this one, and its hooks want some .grad.
            ctx.weight.grad_added_to_main_grad = True
            # A tied embedding adds its own gradient to that .grad, which the hook then adds to main_grad.
            counted = getattr(ctx.weight, "zero_out_wgrad", False)
            grad_weight = torch.zeros_like(weight) if counted else torch.empty_like(weight)
        return grad_hidden, grad_weight, *[None] * 7


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    top_p: float = 1.0,
    top_p_boundary: str = "inclusive",
    vocab_size: int | None = None,
    tp_group=None,
    temperature: float = 1.0,
    chunk_mb: float = 64,
    path: str = "auto",
    reduce_hidden_grad: bool = True,
    implementation: str = "auto",
    counters: TopPCounters | None = None,
) -> TokenStats:
    """vocab_parallel_token_stats of the logits z = hidden weight^T / temperature, without keeping z.

    dL/dhidden = dL/dz weight / temperature, summed over the tensor-parallel ranks;
    dL/dweight = dL/dz^T hidden / temperature, added by chunks to weight.main_grad (Megatron's fp32 buffer)
    where the weight has one.

    Args:
        hidden: [..., H], the same on every rank of tp_group.
        weight: [vocab/tp, H], this rank's rows of the output layer, same dtype as hidden.
        labels: [...] GLOBAL token ids.
        temperature: the sampling temperature that divides the logits.
        chunk_mb: budget in MiB of a chunk's logits.
        path: "fused" computes the logits twice, a chunk at a time; "logits" keeps them whole between forward
            and backward; "auto" fuses when they would take more than twice the budget.
        reduce_hidden_grad: all-reduce dL/dhidden over tp_group (off where the caller reduces it, for example
            in a reduce-scatter under sequence parallelism).
        top_p, top_p_boundary, vocab_size, tp_group, implementation, counters: as in
            vocab_parallel_token_stats.

    Returns:
        TokenStats [...] fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: for an option, a label or a shape that makes no sense.

    References: the chunked linear cross entropy of Liger (arXiv 2410.10989) and of Cut Your Losses
        (arXiv 2411.09009). Liger forms the gradient in the forward pass, which SIREN's peak mask, a quantile
        over the whole response, rules out.
    """
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [..., H], [vocab/tp, H]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}, got {path!r}")
    example = hidden.new_empty(0, weight.shape[0])
    plan = make_plan(example, top_p, top_p_boundary, vocab_size, tp_group, chunk_mb, implementation)
    check_labels(labels, hidden.shape[:-1], plan.vocab_size)
    row_bytes = weight.shape[0] * hidden.itemsize
    if path == "auto":
        path = "fused" if labels.numel() * row_bytes > _WORTHWHILE * plan.chunk_bytes else "logits"
    step = max(1, plan.chunk_bytes // row_bytes)
    return TokenStats(
        *_LinearTokenStats.apply(
            hidden, weight, labels, plan, temperature, step, path == "logits", reduce_hidden_grad, counters
        )
    )
