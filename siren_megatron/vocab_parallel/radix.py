"""Radix select of the nucleus in float64, for the rows that the tournament can't settle.

Legend: F = such rows, Vs = columns of this shard, W = its true columns, tp = tensor-parallel size.

Rows are narrowed to one logit value by mass histograms, each all-reduced: first over the linear digit
floor((max - z) * c), then over digits of the logits' order-preserving integer keys inside the chosen bin.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BINS = 2048
_PER_NAT = 64.0  # bins per unit of logit in the first digit: 2048 bins reach 32 nats below the maximum
_BYTES_PER_LOGIT = 48  # temporaries below, in float64 and int64


class Selected(NamedTuple):
    """Exact nucleus of F rows: fields as in Nucleus, sums relative to row_max. All [F]."""

    sum_e: Tensor
    sum_ed: Tensor
    tau: Tensor
    cut: Tensor
    mass: Tensor
    mass_ed: Tensor


def order_keys(values: Tensor) -> Tensor:
    """Integers (int64) in the same order as the fp32 or fp64 values; -0.0 and 0.0 share a key."""
    bits, sign = (torch.int64, 1 << 63) if values.dtype == torch.float64 else (torch.int32, 1 << 31)
    keys = (values + 0.0).view(bits).to(torch.int64)
    return torch.where(keys < 0, -(keys + sign), keys)


def keys_to_values(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of order_keys."""
    bits, sign = (torch.int64, 1 << 63) if dtype == torch.float64 else (torch.int32, 1 << 31)
    return torch.where(keys < 0, -keys - sign, keys).to(bits).view(dtype)


def _reduce(tensor: Tensor, group, op=dist.ReduceOp.SUM) -> Tensor:
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _histogram(rows: Tensor, digits: Tensor, weights: Tensor, count: int) -> Tensor:
    """Mass per (row, digit): [count, BINS] float64."""
    flat = torch.zeros(count * BINS, dtype=torch.float64, device=weights.device)
    return flat.index_add_(0, rows * BINS + digits, weights).view(count, BINS)


def _pick(histogram: Tensor, above: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First bin at which the mass from above reaches the target, and the mass strictly above that bin."""
    sums = histogram.cumsum(-1) + above.unsqueeze(1)
    occupied = histogram > 0
    chosen = ((sums >= target.unsqueeze(1)) & occupied).to(torch.uint8).argmax(-1)
    none = ~((sums >= target.unsqueeze(1)) & occupied).any(-1)  # rounding: the last occupied bin it is
    last = BINS - 1 - occupied.flip(-1).to(torch.uint8).argmax(-1)
    chosen = torch.where(none, last, chosen)
    before = torch.where(
        chosen == 0, above, sums.gather(1, (chosen - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    )
    return chosen, before


def radix_select(
    z: Tensor,
    row_max: Tensor,
    width: int,
    top_p: float,
    exclusive: bool,
    tp_group,
    rank: int,
    chunk_bytes: int,
) -> Selected:
    """Exact nucleus of every row. Args: z [F, Vs]; row_max [F] over all shards, finite."""
    step = max(1, chunk_bytes // (_BYTES_PER_LOGIT * max(1, z.shape[1])))
    parts = []
    for start in range(0, z.shape[0], step):
        rows = slice(start, start + step)
        parts.append(_select(z[rows, :width], row_max[rows], top_p, exclusive, tp_group, rank))
    return Selected(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _select(z: Tensor, row_max: Tensor, top_p: float, exclusive: bool, group, rank: int) -> Selected:
    count, dtype = z.shape[0], row_max.dtype
    m = row_max.double().unsqueeze(1)
    d = z.double().sub_(m).clamp_(min=-750.0)
    e = d.exp()
    digits = (d * -_PER_NAT).clamp_(max=BINS - 1.0).to(torch.int64)
    histogram = torch.zeros((count, BINS), dtype=torch.float64, device=z.device).scatter_add_(1, digits, e)
    histogram = _reduce(histogram, group)
    sum_e = histogram.sum(-1)
    target = top_p * sum_e
    chosen, above = _pick(histogram, torch.zeros_like(target), target)

    higher = digits < chosen.unsqueeze(1)
    ed = d.mul_(e)
    totals = torch.stack([ed.sum(-1), (ed * higher).sum(-1)])
    row, col = (digits == chosen.unsqueeze(1)).nonzero(as_tuple=True)
    values = z[row, col].to(dtype)
    keys, mass, mass_ed = order_keys(values), e[row, col], ed[row, col]
    del d, ed, e, digits, higher

    # The chosen bin's range of keys, then digits of the key, highest keys first.
    bounds = torch.full((2, count), torch.iinfo(torch.int64).min, device=z.device)
    bounds[0].scatter_reduce_(0, row, keys, "amax")
    bounds[1].scatter_reduce_(0, row, ~keys, "amax")
    _reduce(bounds, group, dist.ReduceOp.MAX)
    top, bottom = bounds[0], ~bounds[1]
    span = int((top - bottom).max()) if count else 0
    levels = 0
    while span >> (11 * levels) > 0:
        levels += 1
    for level in reversed(range(levels)):
        shift = 11 * level
        live = (keys <= top[row]) & (keys >= bottom[row])
        digit = ((top[row] - keys) >> shift).clamp_(0, BINS - 1)
        histogram = _reduce(_histogram(row[live], digit[live], mass[live], count), group)
        chosen, above = _pick(histogram, above, target)
        top = top - (chosen << shift)
        bottom = torch.maximum(bottom, top - (1 << shift) + 1)

    tau_key, tau = top, keys_to_values(top, dtype)
    totals[1].index_add_(0, row, torch.where(keys > tau_key[row], mass_ed, 0.0))
    tie = keys == tau_key[row]
    row, col = row[tie], col[tie]
    ties = torch.zeros(count, dtype=torch.float64, device=z.device)
    ties.index_add_(0, row, torch.ones_like(row, dtype=torch.float64))
    weight = (tau.double() - row_max.double()).exp()

    # Ranks need each other's tie counts: a sum of one-hot rows, together with the sums of e * d.
    size = 1 if group is None else dist.get_world_size(group)
    final = torch.zeros((2 + size, count), dtype=torch.float64, device=z.device)
    final[:2], final[2 + rank] = totals, ties
    _reduce(final, group)
    all_ties = final[2:].sum(0)
    wanted = torch.minimum(((target - above) / weight).ceil().clamp_(min=1.0), all_ties)
    wanted -= ((wanted > 1) & (above + (wanted - 1) * weight >= target)).double()  # the division rounded up
    wanted += ((wanted < all_ties) & (above + wanted * weight < target)).double()  # ... or down
    if exclusive:
        wanted = wanted - 1
    here = torch.minimum((wanted - final[2 : 2 + rank].sum(0)).clamp_(min=0.0), ties).to(torch.int64)
    starts = ties.to(torch.int64).cumsum(0) - ties.to(torch.int64)
    last = (starts + here - 1).clamp_(0, max(0, col.numel() - 1))
    cut = torch.where(here > 0, col[last] + 1, 0) if col.numel() else torch.zeros_like(here)
    tie_d = tau.double() - row_max.double()
    return Selected(sum_e, final[0], tau, cut, above + wanted * weight, final[1] + wanted * weight * tie_d)
