"""Plain-torch engine: sweep of a shard, merge of the shards' tournaments, gradient.

Legend: T = rows (tokens), Vs = columns of this shard (vocab / tp), W = its true columns (no padding),
K = length of a shard's list of largest logits, tp = tensor-parallel size.

A row's *pack* is what one rank tells the others: 8 header words and K list words
``[max, label logit, sum e (fp64), sum e*d (fp64), engine, unused, K largest logits in descending order]``
with d = z - max and e = exp(d) of that shard. Words are fp32 (288 bytes for K = 64), fp64 for fp64 logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TOP_K = 64
HEADER = 8
_BLOCK = 64
_TILE_BYTES = 4 << 20  # a tile of rows and its temporaries stay in the cache
_LIST_ROWS = 64  # rows whose lists are made together


class RowSums(NamedTuple):
    """Sums over the whole vocabulary, with d = z - row_max and e = exp(d). All [T].

    row_max, label_logit: compute dtype; sum_e, sum_ed: fp64. A row that has no softmax is NaN.
    """

    row_max: Tensor
    label_logit: Tensor
    sum_e: Tensor
    sum_ed: Tensor


class Nucleus(NamedTuple):
    """The tokens with z > tau, or z == tau and local column < cut. All [T].

    mass, mass_ed: sum e and sum e*d over it, fp64; certified: False = the radix select has to settle the row.
    The plain engine also keeps which columns they are, where its list has them: members [T, K], of which the
    first member_count [T] count (-1: not listed).
    """

    sums: RowSums
    tau: Tensor
    cut: Tensor
    mass: Tensor
    mass_ed: Tensor
    certified: Tensor
    members: Tensor | None = None
    member_count: Tensor | None = None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lowest_exponent(dtype: torch.dtype) -> float:
    """Where exp(d) is zero or nearly so: d is clamped here, so that 0 * (-inf) never happens."""
    return -750.0 if dtype == torch.float64 else -110.0


def _tile_rows(columns: int, chunk_bytes: int, itemsize: int) -> int:
    return max(1, min(_TILE_BYTES, chunk_bytes // 4) // max(1, columns * itemsize))


def _row_max(z: Tensor, maxima: Tensor) -> Tensor:
    """Largest logit of each row [R]; the maxima of its whole blocks of columns go to maxima [R, W // 64]."""
    whole = maxima.shape[1] * _BLOCK
    if whole == 0:
        return z.amax(-1)
    torch.amax(z[:, :whole].unflatten(1, (-1, _BLOCK)), -1, out=maxima)
    top = maxima.amax(-1)
    return torch.maximum(top, z[:, whole:].amax(-1)) if z.shape[1] > whole else top


def _largest(z: Tensor, maxima: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k largest logits of each row and their columns [R, top_k]: value descending, column ascending.

    Any logit above the top_k-th largest block maximum lies in one of the top_k blocks.
    """
    rows, width = z.shape
    if maxima.shape[1] > top_k:
        best = maxima.topk(top_k, -1, sorted=False).indices
        columns = (best.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=z.device)).flatten(1)
        rest = torch.arange(_BLOCK * maxima.shape[1], width, device=z.device)
        columns = torch.cat([columns, rest.expand(rows, -1)], -1)
        candidates = z.gather(1, columns).to(maxima.dtype)
    else:
        columns = torch.arange(width, device=z.device).expand(rows, -1)
        candidates = z.to(maxima.dtype)
    if candidates.shape[1] > top_k:
        picked = candidates.topk(top_k, -1, sorted=False).indices
        columns, candidates = columns.gather(1, picked), candidates.gather(1, picked)
    columns, order = columns.sort(-1)
    values, order = candidates.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)


def sweep(z: Tensor, local_labels: Tensor, width: int, top_k: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """One pass over a shard.

    Args: z [T, Vs]; local_labels [T], out of [0, W) where another shard holds the label; top_k 0 = no lists.
    Returns: pack [T, 8 + top_k] and the lists' local columns [T, top_k] int64.
    """
    dtype = compute_dtype(z.dtype)
    pack = torch.full((z.shape[0], HEADER + top_k), -torch.inf, dtype=dtype, device=z.device)
    columns = torch.zeros((z.shape[0], top_k), dtype=torch.int64, device=z.device)
    wide = pack if dtype == torch.float64 else pack.view(torch.float64)
    at = (2, 3) if dtype == torch.float64 else (1, 2)
    wide[:, at[0] : at[1] + 1] = 0.0
    pack[:, 6:8] = 0.0
    if width == 0 or z.shape[0] == 0:
        return pack, columns
    owned = (local_labels >= 0) & (local_labels < width)
    label_logit = z.gather(1, local_labels.clamp(0, width - 1).unsqueeze(1)).squeeze(1).to(dtype)
    pack[:, 1] = torch.where(owned, label_logit, -torch.inf)
    step = _tile_rows(width, chunk_bytes, dtype.itemsize)
    d_tile = torch.empty((min(step, z.shape[0]), width), dtype=dtype, device=z.device)
    e_tile = torch.empty_like(d_tile)
    maxima = torch.empty((_LIST_ROWS, width // _BLOCK), dtype=dtype, device=z.device)
    for first in range(0, z.shape[0], _LIST_ROWS):
        group = slice(first, min(first + _LIST_ROWS, z.shape[0]))
        for start in range(group.start, group.stop, step):
            rows = slice(start, min(start + step, group.stop))
            count = rows.stop - rows.start
            d, e = d_tile[:count], e_tile[:count]
            tile = z[rows, :width]
            if tile.dtype != dtype:
                tile = e.copy_(tile)
            top = _row_max(tile, maxima[start - first : rows.stop - first])
            pack[rows, 0] = top
            origin = torch.where(top == -torch.inf, 0.0, top)
            torch.sub(tile, origin.unsqueeze(1), out=d)
            torch.exp(d, out=e)
            wide[rows, at[0]] = e.sum(-1).double()
            wide[rows, at[1]] = torch.mul(d, e, out=d).sum(-1).double()
        if top_k:
            values, ids = _largest(z[group, :width], maxima[: group.stop - first], top_k)
            pack[group, HEADER : HEADER + values.shape[1]] = values
            columns[group, : ids.shape[1]] = ids
    # Where a logit is -inf, e * d was 0 * (-inf): again, with d bounded.
    again = (wide[:, at[1]].isnan() & ~wide[:, at[0]].isnan()).nonzero().squeeze(1)
    for rows in again.split(step):
        tile, top = z[rows, :width].to(dtype), pack[rows, 0]
        d = tile.sub_(torch.where(top == -torch.inf, 0.0, top).unsqueeze(1)).clamp_(lowest_exponent(dtype))
        wide[rows, at[1]] = d.exp().mul_(d).sum(-1).double()
    return pack, columns


def sum_slack(mean_d: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound on the relative error of a sweep's sum e [T]: rounding of d, of exp and of the summation."""
    unit = torch.finfo(dtype).eps
    return unit * (24.0 + 2.0 * mean_d.abs())


def merge(packs: Tensor, columns: Tensor, rank: int, top_p: float, exclusive: bool) -> Nucleus:
    """Join the ranks' packs; find the nucleus from their lists and certify it.

    Args: packs [tp, T, 8 + K]; columns [T, K] of this rank; top_p 1 (with K = 0) = no nucleus wanted.
    Returns: Nucleus; rows that the lists can't prove have certified False.
    """
    dtype = packs.dtype
    wide = packs if dtype == torch.float64 else packs.contiguous().view(torch.float64)
    at = (2, 3) if dtype == torch.float64 else (1, 2)
    shard_max = packs[..., 0].double()
    row_max = packs[..., 0].amax(0)
    label_logit = packs[..., 1].amax(0)
    m = row_max.double()
    shift = (shard_max - m).masked_fill(shard_max == -torch.inf, -1e4)
    scale = shift.exp()
    sum_e = (wide[..., at[0]] * scale).sum(0)
    sum_ed = ((wide[..., at[1]] + shift * wide[..., at[0]]) * scale).sum(0)
    invalid = sum_e.isnan() | (sum_e == 0)
    sum_e = sum_e.masked_fill(invalid, torch.nan)
    sum_ed = sum_ed.masked_fill(invalid, torch.nan)
    row_max = row_max.masked_fill(invalid, torch.nan)
    sums = RowSums(row_max, label_logit, sum_e, sum_ed)
    top_k = packs.shape[2] - HEADER
    if top_k == 0:
        tau = torch.full_like(row_max, -torch.inf).masked_fill(invalid, torch.nan)
        cut = torch.zeros_like(row_max, dtype=torch.int64)
        return Nucleus(sums, tau, cut, sum_e, sum_ed, torch.ones_like(invalid))
    lists = packs[..., HEADER:].transpose(0, 1).flatten(1)  # [T, tp * K], lower ranks first
    values, source = lists.sort(dim=-1, descending=True, stable=True)
    d = (values.double() - m.unsqueeze(1)).clamp(min=-750.0)
    e = d.exp().masked_fill(values == -torch.inf, 0.0)
    mass, mass_ed = e.cumsum(-1), (e * d).cumsum(-1)
    target = top_p * sum_e
    crossing = (mass < target.unsqueeze(1)).sum(-1)  # position of the token that reaches the target
    reached = crossing < values.shape[1]
    at_crossing = crossing.clamp(max=values.shape[1] - 1).unsqueeze(1)

    def before(sums: Tensor) -> Tensor:
        return torch.where(crossing == 0, 0.0, sums.gather(1, (at_crossing - 1).clamp(min=0)).squeeze(1))

    tau = values.gather(1, at_crossing).squeeze(1)
    through = mass.gather(1, at_crossing).squeeze(1)
    slack = sum_slack(sum_ed / sum_e, dtype) * target
    tail = packs[..., -1].amax(0)
    certified = reached & (tau > tail) & (through >= target + slack) & (before(mass) < target - slack)
    taken = crossing if exclusive else crossing + 1
    own = (source // top_k == rank) & (values == tau.unsqueeze(1))
    own &= torch.arange(values.shape[1], device=values.device) < taken.unsqueeze(1)
    ties = own.sum(-1)
    last_tie = (packs[rank, :, HEADER:] > tau.unsqueeze(1)).sum(-1) + ties - 1
    cut = columns.gather(1, last_tie.clamp(0, top_k - 1).unsqueeze(1)).squeeze(1) + 1
    cut = torch.where(ties > 0, cut, 0)
    if exclusive:
        through, through_ed = before(mass), before(mass_ed)
    else:
        through_ed = mass_ed.gather(1, at_crossing).squeeze(1)
    tau = tau.masked_fill(invalid, torch.nan)
    through, through_ed = through.masked_fill(invalid, torch.nan), through_ed.masked_fill(invalid, torch.nan)
    certified |= invalid
    members = (packs[rank, :, HEADER:] > tau.unsqueeze(1)).sum(-1) + ties
    member_count = torch.where(certified, members, -1)
    return Nucleus(sums, tau, cut, through, through_ed, certified, columns, member_count)


def backward(
    z: Tensor, out: Tensor, coefs: Tensor, state, plan, local_labels: Tensor, label_grad: Tensor
) -> None:
    """Write e * (a0 + a1 d + 1_N (b0 + b1 d)) + label_grad 1[v = label] to out, zeros to padding columns.

    Args: z, out [T, Vs] (may be the same tensor); coefs [T, 4] = a0, a1, b0, b1, compute dtype;
    state: a RowState; plan: a ShardPlan; local_labels, label_grad [T].
    """
    dtype, width, top = compute_dtype(z.dtype), plan.width, state.row_max
    if width == 0 or z.shape[0] == 0:
        out.zero_()
        return
    labels = local_labels.clamp(0, width - 1).unsqueeze(1)
    label_term = (
        label_grad.to(dtype).masked_fill((local_labels < 0) | (local_labels >= width), 0.0).unsqueeze(1)
    )
    masked = (coefs[:, 2:] != 0).any(-1)
    listed = masked & (state.member_count >= 0) if state.members is not None else torch.zeros_like(masked)
    member_row, place = torch.empty(0, dtype=torch.int64, device=z.device), None
    if listed.any():
        counts = state.member_count.masked_fill(~listed, 0)
        member_row, place = (
            torch.arange(state.members.shape[1], device=z.device) < counts.unsqueeze(1)
        ).nonzero(as_tuple=True)
    step = _tile_rows(width, plan.chunk_bytes, dtype.itemsize)
    starts = range(0, z.shape[0], step)
    ends = torch.searchsorted(member_row, torch.tensor([*starts[1:], z.shape[0]], device=z.device)).tolist()
    dense = (masked & ~listed).tolist()
    d_tile = torch.empty((min(step, z.shape[0]), width), dtype=dtype, device=z.device)
    e_tile = torch.empty_like(d_tile)
    begin = 0
    for start, end in zip(starts, ends, strict=True):
        rows = slice(start, min(start + step, z.shape[0]))
        d, e = d_tile[: rows.stop - start], e_tile[: rows.stop - start]
        a0, a1 = coefs[rows, :1], coefs[rows, 1:2]
        tile = z[rows, :width]
        if tile.dtype != dtype:
            tile = e.copy_(tile)
        torch.sub(tile, top[rows].unsqueeze(1), out=d)
        d.clamp_(min=lowest_exponent(dtype))
        extra = _dense_term(tile, d, rows, coefs, state) if any(dense[rows]) else None
        torch.exp(d, out=e)
        if end > begin:
            at_row = member_row[begin:end]
            column = state.members[at_row, place[begin:end]]
            term = coefs[at_row, 2] + coefs[at_row, 3] * d[at_row - start, column]
        grad = torch.addcmul(a0, d, a1, out=d)
        if end > begin:
            grad.index_put_((at_row - start, column), term, accumulate=True)
        if extra is not None:
            grad.add_(extra)
        begin = end
        if out.dtype == dtype:
            torch.mul(grad, e, out=out[rows, :width])
            out[rows, :width].scatter_add_(1, labels[rows], label_term[rows])
        else:
            grad.mul_(e).scatter_add_(1, labels[rows], label_term[rows])
            out[rows, :width] = grad
    out[:, width:] = 0


def _dense_term(tile: Tensor, d: Tensor, rows: slice, coefs: Tensor, state) -> Tensor:
    """1_N (b0 + b1 d) of the tile's rows whose members aren't listed, 0 for the others [R, W]."""
    inside = torch.zeros(tile.shape, dtype=torch.bool, device=tile.device)
    width = tile.shape[1]
    for r, end in enumerate(state.cut[rows].clamp(max=width).tolist()):  # ties count up to the cut
        t = rows.start + r
        if state.members is None or state.member_count[t] < 0:
            torch.ge(tile[r, :end], state.tau[t], out=inside[r, :end])
            torch.gt(tile[r, end:], state.tau[t], out=inside[r, end:])
    return torch.addcmul(coefs[rows, 2:3], d, coefs[rows, 3:]).mul_(inside)


class RowScans:
    """The dense steps of the radix select for the rows z[index] of a shard.

    Args: z [T, Vs]; index [F]; row_max [F], over all shards, finite; width W.
    """

    bins, per_nat = 1024, 32.0  # first digit floor((max - z) * per_nat): 32 nats below the maximum
    bytes_per_logit = 1.0  # the temporaries live in tiles

    def __init__(self, z: Tensor, index: Tensor, row_max: Tensor, width: int):
        self.z, self.index, self.width, self.row_max = z, index, width, row_max.unsqueeze(1)
        self.step = max(1, (_TILE_BYTES // 2) // max(1, 8 * width))

    def _tiles(self):
        """(rows of F, logits [R, W] in the compute dtype, row_max [R, 1])."""
        for start in range(0, self.index.numel(), self.step):
            rows = slice(start, start + self.step)
            tile = self.z[self.index[rows], : self.width].to(self.row_max.dtype)
            yield rows, tile, self.row_max[rows]

    def histogram(self) -> Tensor:
        """Mass per digit [F, bins], exponentials and sums in fp64; sum e*d per digit is kept for ed_above."""
        shape = (self.index.numel(), self.bins)
        mass = torch.zeros(shape, dtype=torch.float64, device=self.z.device)
        self.mass_ed = torch.zeros_like(mass)
        for rows, tile, top in self._tiles():
            digits = (tile - top).mul_(-self.per_nat).clamp_(max=self.bins - 1.0).to(torch.int64)
            d = tile.double().sub_(top).clamp_(min=-750.0)
            e = d.exp()
            mass[rows].scatter_add_(1, digits, e)
            self.mass_ed[rows].scatter_add_(1, digits, d.mul_(e))
        return mass

    def collect(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row, local column, logit) of the logits whose digit is chosen [F]; columns ascending in a row."""
        first = chosen.to(self.row_max.dtype).unsqueeze(1)
        beyond = torch.where(first == self.bins - 1, torch.nan, first + 1)  # the last digit has no end
        parts = []
        for rows, tile, top in self._tiles():
            digit = (tile - top).mul_(-self.per_nat)
            row, column = (digit >= first[rows]).logical_and_(~(digit >= beyond[rows])).nonzero(as_tuple=True)
            parts.append((row + rows.start, column, tile[row, column]))
        self.chosen, self.found = chosen, tuple(torch.cat(field) for field in zip(*parts, strict=True))
        return self.found

    def ed_above(self, tau: Tensor) -> Tensor:
        """sum e*d over z > tau [F] fp64, where tau is in the chosen bin."""
        row, _, value = self.found
        higher = torch.arange(self.bins, device=tau.device) < self.chosen.unsqueeze(1)
        out = (self.mass_ed * higher).sum(-1)
        d = (value.double() - self.row_max.double()[row, 0]).clamp_(min=-750.0)
        return out.index_add_(0, row, (d.exp() * d).masked_fill_(value <= tau[row], 0.0))
