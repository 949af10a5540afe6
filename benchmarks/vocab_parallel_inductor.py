"""The candidate that the C++ engine was measured against: the same algorithm, dense passes by torch.compile.

An engine as `siren_megatron.vocab_parallel.torch_engine` is one: sweep and backward are compiled, the
top lists, the merge and the radix select are the plain engine's. Legend as there: T rows, W true columns.
"""

import functools
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from siren_megatron.vocab_parallel import TopPCounters
from siren_megatron.vocab_parallel.nucleus import make_plan
from siren_megatron.vocab_parallel.stats import _TokenStats
from siren_megatron.vocab_parallel.torch_engine import (
    HEADER,
    RowScans,
    _largest,
    compute_dtype,
    lowest_exponent,
    merge,
)

__all__ = ["RowScans", "backward", "inductor", "merge", "sweep"]
BLOCK = 64


@functools.partial(torch.compile, dynamic=False)
def _sums(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and block maxima, sum e and sum e*d [T] of z [T, W], W a multiple of 64; blocks, then fp64."""
    blocks = z.float().unflatten(1, (-1, BLOCK))
    maxima = blocks.amax(-1)
    top = maxima.amax(-1)
    d = (blocks - top[:, None, None]).clamp(min=lowest_exponent(torch.float32))
    e = d.exp()
    return top, maxima, e.sum(-1).double().sum(-1), (e * d).sum(-1).double().sum(-1)


@functools.partial(torch.compile, dynamic=False)
def _gradient(z: Tensor, out: Tensor, top: Tensor, tau: Tensor, cut: Tensor, coefs: Tensor) -> None:
    x = z.float()
    d = (x - top[:, None]).clamp(min=lowest_exponent(torch.float32))
    column = torch.arange(z.shape[1], device=z.device)
    inside = (x > tau[:, None]) | ((x == tau[:, None]) & (column < cut[:, None]))
    a0, a1, b0, b1 = (c[:, None] for c in coefs.unbind(-1))
    out.copy_(d.exp() * (a0 + a1 * d + torch.where(inside, b0 + b1 * d, 0.0)))


def sweep(z: Tensor, local_labels: Tensor, width: int, top_k: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """As torch_engine.sweep, for shards without padding whose width is a multiple of 64."""
    assert width == z.shape[1] and width % BLOCK == 0
    dtype = compute_dtype(z.dtype)
    pack = torch.full((z.shape[0], HEADER + top_k), -torch.inf, dtype=dtype)
    top, maxima, sum_e, sum_ed = _sums(z)
    owned = (local_labels >= 0) & (local_labels < width)
    label_logit = z.gather(1, local_labels.clamp(0, width - 1).unsqueeze(1)).squeeze(1).to(dtype)
    pack[:, 0], pack[:, 1] = top, torch.where(owned, label_logit, -torch.inf)
    pack.view(torch.float64)[:, 1], pack.view(torch.float64)[:, 2] = sum_e, sum_ed
    pack[:, 6:8] = 0.0
    columns = torch.zeros((z.shape[0], top_k), dtype=torch.int64)
    if top_k:
        values, columns = _largest(z, maxima, top_k)
        pack[:, HEADER:] = values
    return pack, columns


def backward(z, out, coefs, state, plan, local_labels, label_grad) -> None:
    """As torch_engine.backward."""
    _gradient(z, out, state.row_max, state.tau, state.cut, coefs)
    owned = (local_labels >= 0) & (local_labels < plan.width)
    labels = local_labels.clamp(0, plan.width - 1).unsqueeze(1)
    term = torch.where(owned, label_grad, 0.0).to(out.dtype).unsqueeze(1)
    out.scatter_(1, labels, out.gather(1, labels) + term)


def inductor(top_p: float):
    """A method of benchmarks/vocab_parallel.py."""

    def run(z, labels, upstream):
        counters = TopPCounters()
        plan = make_plan(z, top_p, "inclusive", None, dist.group.WORLD, 64, "torch")
        plan = plan._replace(engine=sys.modules[__name__])
        leaf = z.detach().requires_grad_(True)
        stats = _TokenStats.apply(leaf, labels, plan, False, counters)
        torch.autograd.grad(stats, leaf, list(upstream))
        return dict(fallback=counters.fallback_rows)

    return run
