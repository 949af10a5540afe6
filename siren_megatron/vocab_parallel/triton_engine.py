"""CUDA engine: Triton kernels for the sweep with its tournament, the radix select's scans and the gradient.

Legend: T = rows, Vs = columns of this shard (stride), W = its true columns, B = columns of a block, K =
length of the top list. One program handles one row, which stays in the L2 cache between its two readings.
The kernels also run, slowly, in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors: so CI checks them.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import torch_engine
from .torch_engine import HEADER, Nucleus, lowest_exponent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_BLOCK = 1024
_CANDIDATES = 256
_ENGINE = 2.0  # word 6 of a pack
_LOG2E = tl.constexpr(1.4426950408889634)


def supports(z: Tensor) -> bool:
    """Whether this engine takes these logits."""
    return (z.is_cuda or INTERPRETED) and z.dtype in (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _order_key(x):
    """int32 in the order of the fp32 x; -0.0 and 0.0 share one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _key_value(key):
    bits = tl.where(key < 0, -2147483648 - key, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sweep_kernel(
    z_ptr, label_ptr, pack_ptr, wide_ptr, column_ptr, scratch_ptr, stride, width,
    K: tl.constexpr, B: tl.constexpr, CAP: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * stride
    lanes = tl.arange(0, B)
    ninf = float("-inf")
    top = tl.full((), ninf, tl.float32)
    lane_max = tl.full((B,), ninf, tl.float32)
    sum_e = tl.zeros((B,), tl.float32)
    sum_ed = tl.zeros((B,), tl.float32)
    for start in range(0, width, B):
        at = start + lanes
        z = tl.load(z_row + at, mask=at < width, other=ninf).to(tl.float32)
        lane_max = tl.where(z > lane_max, z, lane_max)
        new_top = tl.maximum(top, tl.max(tl.where(z == z, z, ninf), 0))
        # An all -inf beginning has no origin yet: 0 stands in, its sums are 0.
        origin = tl.where(new_top == ninf, 0.0, new_top)
        shift = tl.where(top == ninf, 0.0, top - origin)
        scale = tl.exp2(shift * _LOG2E)
        d = z - origin
        d = tl.where(d < -110.0, -110.0, d)
        e = tl.where(z == ninf, 0.0, tl.exp2(d * _LOG2E))
        sum_ed = (sum_ed + shift * sum_e) * scale + e * d
        sum_e = sum_e * scale + e
        top = new_top
    total_e = tl.sum(sum_e.to(tl.float64), 0)
    total_ed = tl.sum(sum_ed.to(tl.float64), 0)
    label = tl.load(label_ptr + row)
    owned = (label >= 0) & (label < width)
    label_logit = tl.load(z_row + tl.where(owned, label, 0), mask=owned, other=ninf).to(tl.float32)
    head = pack_ptr + row * (HEAD + K)
    tl.store(head, top)
    tl.store(head + 1, label_logit)
    tl.store(head + 6, 2.0)
    tl.store(head + 7, 0.0)
    tl.store(wide_ptr + row * ((HEAD + K) // 2) + 1, total_e)
    tl.store(wide_ptr + row * ((HEAD + K) // 2) + 2, total_ed)
    if K > 0:
        # A threshold that K to 1.5 K of the lanes' maxima reach: every logit above it is listed.
        low = top - 40.0
        high = top
        enough = tl.sum((lane_max >= low).to(tl.int32), 0) > K + K // 2
        for _ in range(24):
            middle = 0.5 * (low + high)
            count = tl.sum((lane_max >= middle).to(tl.int32), 0)
            settled = tl.sum((lane_max >= low).to(tl.int32), 0) <= K + K // 2
            active = enough & (settled == 0) & (middle > low) & (middle < high)
            low = tl.where(active & (count >= K), middle, low)
            high = tl.where(active & (count < K), middle, high)
        slots = tl.arange(0, CAP)
        scratch = scratch_ptr + row * CAP
        tl.store(scratch + slots, tl.full((CAP,), -9223372036854775808, tl.int64))
        tl.debug_barrier()
        found = tl.zeros((), tl.int32)
        for start in range(0, width, B):
            at = start + lanes
            z = tl.load(z_row + at, mask=at < width, other=ninf).to(tl.float32)
            hit = (z >= low) & (at < width)
            place = found + tl.cumsum(hit.to(tl.int32), 0) - 1
            key = (_order_key(z).to(tl.int64) << 32) | (4294967295 - at.to(tl.int64))
            tl.store(scratch + place, key, mask=hit & (place < CAP))
            found += tl.sum(hit.to(tl.int32), 0)
        tl.debug_barrier()
        keys = tl.sort(tl.load(scratch + slots), descending=True)
        value = _key_value((keys >> 32).to(tl.int32))
        column = 4294967295 - (keys & 4294967295)
        listed = (slots < found) & (found <= CAP)
        # Unlisted entries stand at the threshold: nothing strictly above the tail is missing. A list cut
        # short by ties repeats the maximum, so that no threshold is above its tail.
        value = tl.where(listed, value, tl.where(found <= CAP, low, top))
        tl.store(head + HEAD + slots, value, mask=slots < K)
        tl.store(column_ptr + row * K + slots, tl.where(listed, column, 0), mask=slots < K)


def sweep(z: Tensor, local_labels: Tensor, width: int, top_k: int, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """As torch_engine.sweep."""
    rows = z.shape[0]
    pack = torch.empty(rows, HEADER + top_k, dtype=torch.float32, device=z.device)
    columns = torch.empty(rows, top_k, dtype=torch.int64, device=z.device)
    scratch = torch.empty(rows, _CANDIDATES if top_k else 0, dtype=torch.int64, device=z.device)
    if rows:
        _sweep_kernel[(rows,)](
            z, local_labels.contiguous(), pack, pack.view(torch.float64), columns, scratch, z.shape[1], width,
            K=top_k, B=_BLOCK, CAP=_CANDIDATES, HEAD=HEADER,
        )  # fmt: skip
    return pack, columns


def merge(packs: Tensor, columns: Tensor, rank: int, top_p: float, exclusive: bool) -> Nucleus:
    """As torch_engine.merge, whose few operations on [T, tp K] it uses."""
    return torch_engine.merge(packs, columns, rank, top_p, exclusive)


@triton.jit
def _backward_kernel(
    z_ptr, out_ptr, coef_ptr, max_ptr, tau_ptr, cut_ptr, label_ptr, label_grad_ptr, stride, width, lowest,
    B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * B + tl.arange(0, B)
    true = at < width
    z = tl.load(z_ptr + row * stride + at, mask=true, other=float("-inf")).to(tl.float32)
    a0 = tl.load(coef_ptr + 4 * row)
    a1 = tl.load(coef_ptr + 4 * row + 1)
    b0 = tl.load(coef_ptr + 4 * row + 2)
    b1 = tl.load(coef_ptr + 4 * row + 3)
    tau = tl.load(tau_ptr + row)
    inside = (z > tau) | ((z == tau) & (at < tl.load(cut_ptr + row)))
    d = z - tl.load(max_ptr + row)
    d = tl.where(d < lowest, lowest, d)
    e = tl.where(z == float("-inf"), 0.0, tl.exp2(d * _LOG2E))
    grad = e * (tl.where(inside, a0 + b0, a0) + tl.where(inside, a1 + b1, a1) * d)
    grad += tl.where(at == tl.load(label_ptr + row), tl.load(label_grad_ptr + row), 0.0)
    grad = tl.where(true, grad, 0.0)
    tl.store(out_ptr + row * stride + at, grad.to(out_ptr.dtype.element_ty), mask=at < stride)


def backward(z, out, coefs, state, plan, local_labels, label_grad) -> None:
    """As torch_engine.backward: one read and one write of the shard."""
    rows, stride = z.shape
    if rows == 0:
        return
    tensors = (t.contiguous() for t in (coefs, state.row_max, state.tau, state.cut, local_labels, label_grad))
    grid = (rows, triton.cdiv(stride, _BLOCK))
    _backward_kernel[grid](z, out, *tensors, stride, plan.width, lowest_exponent(torch.float32), B=_BLOCK)


@triton.jit
def _digits(z, row_max, PER_NAT: tl.constexpr, BINS: tl.constexpr):
    d = z.to(tl.float64) - row_max.to(tl.float64)
    d = tl.where(d < -750.0, -750.0, d)
    scaled = d * -PER_NAT
    return d, tl.where(scaled > BINS - 1.0, BINS - 1.0, scaled).to(tl.int32)


@triton.jit
def _histogram_kernel(
    z_ptr, index_ptr, max_ptr, out_ptr, stride, width,
    PER_NAT: tl.constexpr, BINS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * B + tl.arange(0, B)
    source = z_ptr + tl.load(index_ptr + row) * stride
    z = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
    d, digit = _digits(z, tl.load(max_ptr + row), PER_NAT, BINS)
    tl.atomic_add(out_ptr + row * BINS + digit, tl.exp(d), mask=at < width)


@triton.jit
def _member_kernel(
    z_ptr, index_ptr, max_ptr, chosen_ptr, out_ptr, stride, width,
    PER_NAT: tl.constexpr, BINS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * B + tl.arange(0, B)
    source = z_ptr + tl.load(index_ptr + row) * stride
    z = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
    _, digit = _digits(z, tl.load(max_ptr + row), PER_NAT, BINS)
    tl.store(out_ptr + row * width + at, (digit == tl.load(chosen_ptr + row)).to(tl.int8), mask=at < width)


@triton.jit
def _ed_above_kernel(z_ptr, index_ptr, max_ptr, tau_ptr, out_ptr, stride, width, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    source = z_ptr + tl.load(index_ptr + row) * stride
    row_max = tl.load(max_ptr + row)
    tau = tl.load(tau_ptr + row)
    total = tl.zeros((B,), tl.float64)
    for start in range(0, width, B):
        at = start + tl.arange(0, B)
        z = tl.load(source + at, mask=at < width, other=float("-inf")).to(tl.float32)
        d = tl.where(z > tau, z - row_max, 0.0).to(tl.float64)  # d = 0 adds nothing
        total += tl.exp(d) * d
    tl.store(out_ptr + row, tl.sum(total, 0))


class RowScans:
    """As torch_engine.RowScans, for the rows z[index] without a copy of them."""

    bins, per_nat = 1024, 32.0
    bytes_per_logit = 2.0

    def __init__(self, z: Tensor, index: Tensor, row_max: Tensor, width: int):
        self.z, self.index, self.row_max, self.width = z, index.contiguous(), row_max.contiguous(), width
        self.grid = (index.numel(), triton.cdiv(width, _BLOCK))
        self.sizes = dict(PER_NAT=self.per_nat, BINS=self.bins, B=_BLOCK)

    def histogram(self) -> Tensor:
        out = torch.zeros(self.index.numel(), self.bins, dtype=torch.float64, device=self.z.device)
        if self.width:
            _histogram_kernel[self.grid](
                self.z, self.index, self.row_max, out, self.z.shape[1], self.width, **self.sizes
            )
        return out

    def collect(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        member = torch.zeros(self.index.numel(), self.width, dtype=torch.int8, device=self.z.device)
        if self.width:
            _member_kernel[self.grid](
                self.z, self.index, self.row_max, chosen.contiguous(), member,
                self.z.shape[1], self.width, **self.sizes,
            )  # fmt: skip
        row, column = member.nonzero(as_tuple=True)
        return row, column, self.z[self.index[row], column].float()

    def ed_above(self, tau: Tensor) -> Tensor:
        out = torch.zeros(self.index.numel(), dtype=torch.float64, device=self.z.device)
        if self.width:
            _ed_above_kernel[(self.index.numel(),)](
                self.z, self.index, self.row_max, tau.contiguous(), out, self.z.shape[1], self.width, B=_BLOCK
            )
        return out
