"""Find each row's nucleus: sweep, one all-gather, merge, and a radix select for the rows left over.

Legend: T = rows, Vs = columns of this shard, tp = tensor-parallel size, K = length of a shard's top list.
"""

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import native, torch_engine
from .radix import radix_select
from .torch_engine import HEADER, TOP_K, Nucleus, RowSums

BOUNDARIES = ("inclusive", "exclusive")
IMPLEMENTATIONS = ("auto", "torch", "native", "triton")
_ENGINE_WORD = 6  # of a pack


@dataclass
class TopPCounters:
    """Totals over the calls that were given this object."""

    rows: int = 0
    fallback_rows: int = 0  # rows that the tournament could not certify
    nan_rows: int = 0  # rows without a softmax: a NaN, +inf, or no finite logit


class ShardPlan(NamedTuple):
    """Plain numbers that describe one call on one rank, and the engine that serves it."""

    top_p: float
    exclusive: bool
    vocab_size: int
    rank: int
    size: int
    width: int  # this shard's true columns
    chunk_bytes: int
    tp_group: object  # None when there is nobody to talk to
    engine: ModuleType


def native_available() -> bool:
    """Whether the compiled CPU engine can be built (or has been) on this machine."""
    return native.library() is not None


def _engine_for(logits: Tensor, implementation: str) -> ModuleType:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "triton" or (implementation == "auto" and logits.is_cuda):
        engine = _triton_engine()
        if engine is not None and engine.supports(logits):
            return engine
        if implementation == "triton":
            raise ValueError(
                f"implementation 'triton' can't take {logits.dtype} on {logits.device.type} here"
            )
    if implementation == "native" and not native.supports(logits):
        raise ValueError(f"implementation 'native' can't take {logits.dtype} on {logits.device.type} here")
    if implementation != "torch" and native.supports(logits):
        return native
    return torch_engine


def engine_name(device: torch.device, dtype: torch.dtype) -> str:
    """What computes the statistics of such logits: "compiled C++", "Triton" or "plain torch"."""
    names = {native: "compiled C++", torch_engine: "plain torch"}
    return names.get(_engine_for(torch.empty(0, device=device, dtype=dtype), "auto"), "Triton")


@functools.cache
def _triton_engine() -> ModuleType | None:
    try:
        from . import triton_engine
    except ImportError:
        return None
    return triton_engine


def make_plan(
    logits: Tensor, top_p: float, top_p_boundary: str, vocab_size, tp_group, chunk_mb, implementation: str
) -> ShardPlan:
    """Check the options of a call on logits [..., Vs]. Raises: ValueError."""
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
    return ShardPlan(
        top_p=float(top_p),
        exclusive=top_p_boundary == "exclusive",
        vocab_size=vocab_size,
        rank=rank,
        size=size,
        width=min(max(vocab_size - rank * shard, 0), shard),
        chunk_bytes=int(chunk_mb * 2**20),
        tp_group=tp_group if size > 1 else None,
        engine=_engine_for(logits, implementation),
    )


def gather_packs(pack: Tensor, plan: ShardPlan) -> Tensor:
    """[T, words] of this rank -> [tp, T, words]: the one collective of the fast path."""
    if plan.tp_group is None:
        return pack.unsqueeze(0)
    packs = pack.new_empty((plan.size, *pack.shape))
    # The newer name where torch has it (2.13), the older one before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(packs.flatten(0, 1), pack, group=plan.tp_group)
    return packs


def common_engine(packs: Tensor, plan: ShardPlan) -> ModuleType:
    """The engine that all ranks can use: a rank without a compiler must not make the others wait for it."""
    if plan.size == 1 or plan.engine is torch_engine:
        return plan.engine
    mixed = bool((packs[:, :1, _ENGINE_WORD] != packs[plan.rank, :1, _ENGINE_WORD]).any())
    return torch_engine if mixed else plan.engine


def settle(z: Tensor, nucleus: Nucleus, plan: ShardPlan, engine: ModuleType) -> Nucleus:
    """Radix select for the rows that the tournament didn't certify (the same rows on every rank)."""
    failing = (~nucleus.certified).nonzero().squeeze(1)
    if failing.numel() == 0:
        return nucleus
    # Beside the candidates: histograms of 1,024 and 2,048 fp64 bins, their sums, and the all-reduce's copies.
    per_row = engine.RowScans.bytes_per_logit * z.shape[1] + 96 * engine.RowScans.bins
    step = max(1, int(plan.chunk_bytes // per_row))
    found = []
    for index in failing.split(step):
        row_max = nucleus.sums.row_max[index]
        scans = engine.RowScans(z, index, row_max, plan.width)
        found.append(radix_select(scans, row_max, plan.top_p, plan.exclusive, plan.tp_group, plan.rank))
    for name in ("tau", "cut", "mass", "mass_ed"):
        getattr(nucleus, name)[failing] = torch.cat([getattr(part, name) for part in found])
    if nucleus.member_count is not None:
        nucleus.member_count[failing] = -1
    nucleus.sums.sum_e[failing] = torch.cat([part.sum_e for part in found])
    return nucleus


def concatenate(parts: list[Nucleus]) -> Nucleus:
    """Rows of several nuclei, in order."""
    if len(parts) == 1:
        return parts[0]

    def joined(fields):
        return None if any(f is None for f in fields) else torch.cat(fields)

    sums = RowSums(*map(joined, zip(*(p.sums for p in parts), strict=True)))
    return Nucleus(sums, *map(joined, zip(*(p[1:] for p in parts), strict=True)))


def list_length(plan: ShardPlan) -> int:
    """How many of its largest logits a shard sends; none where the nucleus is everything."""
    return 0 if plan.top_p == 1.0 else TOP_K


def count(counters: TopPCounters | None, nucleus: Nucleus, fallback_rows: int) -> None:
    """Add a call's rows to the caller's counters."""
    if counters is not None:
        counters.rows += nucleus.tau.numel()
        counters.fallback_rows += fallback_rows
        counters.nan_rows += int(nucleus.sums.sum_e.isnan().sum())


def find_nucleus(z: Tensor, local_labels: Tensor, plan: ShardPlan, counters: TopPCounters | None) -> Nucleus:
    """Sums and exact nucleus of each row. Args: z [T, Vs] contiguous; local_labels [T]."""
    fallback = 0
    if plan.engine is native and plan.size == 1:
        nucleus, fallback = native.forward(z, local_labels, plan.width, plan.top_p, plan.exclusive)
    else:
        top_k = list_length(plan)
        # All rows at once, unless their packs alone would break the budget.
        step = max(1, plan.chunk_bytes // (plan.size * (HEADER + top_k) * 4))
        parts = []
        for start in range(0, max(1, z.shape[0]), step):
            rows = slice(start, start + step)
            pack, columns = plan.engine.sweep(
                z[rows], local_labels[rows], plan.width, top_k, plan.chunk_bytes
            )
            packs = gather_packs(pack, plan)
            engine = common_engine(packs, plan)
            nucleus = engine.merge(packs, columns, plan.rank, plan.top_p, plan.exclusive)
            fallback += int((~nucleus.certified).sum())
            parts.append(settle(z[rows], nucleus, plan, engine))
        nucleus = concatenate(parts)
    count(counters, nucleus, fallback)
    return nucleus
