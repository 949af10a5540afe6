"""Radix select of the nucleus in float64, for the rows that the tournament can't settle.

Legend: F = such rows, Vs = columns of this shard, W = its true columns, tp = tensor-parallel size.

Rows are narrowed to one logit value by mass histograms, each all-reduced: first over the linear digit
floor((max - z) * c), then over digits of the logits' order-preserving integer keys inside the chosen bin.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_LEVEL_BITS = 11


class Selected(NamedTuple):
    """Exact nucleus of F rows: fields as in Nucleus, and sum_e over the vocabulary. All [F]."""

    sum_e: Tensor
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


def _pick(histogram: Tensor, above: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First bin at which the mass from above reaches the target, and the mass strictly above that bin [F]."""
    sums = histogram.cumsum(-1) + above.unsqueeze(1)
    occupied = histogram > 0
    reached = (sums >= target.unsqueeze(1)) & occupied
    last = histogram.shape[1] - 1 - occupied.flip(-1).to(torch.uint8).argmax(-1)  # where rounding hides it
    chosen = torch.where(reached.any(-1), reached.to(torch.uint8).argmax(-1), last)
    before = sums.gather(1, (chosen - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return chosen, torch.where(chosen == 0, above, before)


def radix_select(
    scans, row_max: Tensor, top_p: float, exclusive: bool, tp_group=None, rank: int = 0
) -> Selected:
    """Exact nucleus of every row.

    Args: scans: an engine's RowScans of the F rows on this shard; row_max [F] over all shards, finite.
    """
    count, dtype, device = row_max.numel(), row_max.dtype, row_max.device
    histogram = _reduce(scans.histogram(), tp_group)
    sum_e = histogram.sum(-1)
    target = top_p * sum_e
    chosen, above = _pick(histogram, torch.zeros_like(target), target)
    row, column, values = scans.collect(chosen)
    keys = order_keys(values)
    mass = (values.double() - row_max.double()[row]).clamp(min=-750.0).exp()

    # The chosen bin's range of keys, then digits of the key, highest keys first.
    bounds = torch.full((2, count), torch.iinfo(torch.int64).min, device=device)
    bounds[0].scatter_reduce_(0, row, keys, "amax")
    bounds[1].scatter_reduce_(0, row, ~keys, "amax")
    _reduce(bounds, tp_group, dist.ReduceOp.MAX)
    top, bottom = bounds[0], ~bounds[1]
    span = int((top - bottom).max()) if count else 0
    levels = -(-span.bit_length() // _LEVEL_BITS)
    bins = 1 << _LEVEL_BITS
    for level in reversed(range(levels)):
        shift = _LEVEL_BITS * level
        live = (keys <= top[row]) & (keys >= bottom[row])
        digit = (top[row] - keys)[live] >> shift
        flat = torch.zeros(count * bins, dtype=torch.float64, device=device)
        flat.index_add_(0, row[live] * bins + digit, mass[live])
        chosen, above = _pick(_reduce(flat.view(count, bins), tp_group), above, target)
        top = top - (chosen << shift)
        bottom = torch.maximum(bottom, top - (1 << shift) + 1)

    tau = keys_to_values(top, dtype)
    tie = keys == top[row]
    row, column = row[tie], column[tie]
    ties = torch.zeros(count, dtype=torch.float64, device=device)
    ties.index_add_(0, row, torch.ones_like(row, dtype=torch.float64))

    # Ranks need each other's tie counts: a sum of one-hot rows, together with their sums of e * d.
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    final = torch.zeros((1 + size, count), dtype=torch.float64, device=device)
    final[0], final[1 + rank] = scans.ed_above(tau), ties
    _reduce(final, tp_group)
    all_ties = final[1:].sum(0)
    tie_d = tau.double() - row_max.double()
    weight = tie_d.exp()
    wanted = torch.minimum(((target - above) / weight).ceil().clamp_(min=1.0), all_ties)
    one_less = (wanted > 1) & (above + (wanted - 1) * weight >= target)  # the division rounded up
    one_more = ~one_less & (wanted < all_ties) & (above + wanted * weight < target)  # ... or down
    wanted = wanted - one_less.double() + one_more.double() - float(exclusive)
    here = torch.minimum((wanted - final[1 : 1 + rank].sum(0)).clamp_(min=0.0), ties).to(torch.int64)
    starts = ties.to(torch.int64).cumsum(0) - ties.to(torch.int64)
    last = (starts + here - 1).clamp_(0, max(0, column.numel() - 1))
    cut = torch.where(here > 0, column[last] + 1, 0) if column.numel() else torch.zeros_like(here)
    return Selected(sum_e, tau, cut, above + wanted * weight, final[0] + wanted * weight * tie_d)
