"""INT8 rows of queries and keys in Triton: a scale per block of tokens and head, means of blocks, or norm and rotation
before that. One reading, one writing of half as much."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbodiff_kernels.quant.kernel import larger, peak, round_to_int8, widen

NORMED_HEADS = 4  # of keys that one program takes at most, with one reading of their rotation
# Of a thread where rows are normed: without a mean two programs of 8 warps fit a multiprocessor, with one three of 4.
NORMED_REGISTERS = {False: 128, True: 168}


class Quantized(NamedTuple):
    """INT8 rows [B, L, H, D] with one scale per block and head [B, H, ceil(L / block)]."""

    rows: Tensor
    scale: Tensor


class NormRope(NamedTuple):
    """A norm over all heads and a rotation that are still to be done: factor float32 [B, L], weight [H * D], cosines
    and sines float32 [L, D / 2]."""

    factor: Tensor
    weight: Tensor
    cos: Tensor
    sin: Tensor


def quantize(x: Tensor, mean: Tensor | None, block: int, norm: NormRope | None = None, *, count: int = 1) -> Quantized:
    """INT8 rows of `norm(x) - mean / count`, x [B, L, H, D]: one reading, one writing of half as much. `count`: of the
    tokens where `mean` is their sum."""
    if norm is None:
        return _quantize_pool(x, mean, block, count, int8=True, pool=False)[0]
    batch, length, heads, dim = x.shape
    aligned = x.data_ptr() % 4 == 0 and all(stride % 2 == 0 for stride in x.stride()[:3])
    assert aligned, "two channels of 16 bits are read as one number of 32"
    blocks, rows = triton.cdiv(length, block), x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((batch, heads, blocks), dtype=torch.float32)
    smooth = mean is not None
    together = math.gcd(heads, NORMED_HEADS) if smooth else 1
    _norm_quantize_kernel[(blocks, heads // together, batch)](
        x, mean, rows, scale, *norm, 1.0 / count, length, heads, *x.stride()[:3],
        SMOOTH=smooth, ROWS=block, HEADS=together, DIM=dim, num_warps=block // 16, maxnreg=NORMED_REGISTERS[smooth],
    )  # fmt: skip
    return Quantized(rows, scale)


def quantize_pool(x: Tensor, mean: Tensor | None, block: int, *, int8: bool) -> tuple[Tensor | Quantized, Tensor]:
    """Of `x - mean` [B, L, H, D] in one reading: INT8 rows (or x itself), block means [B, H, ceil(L / block), D]."""
    rows, means = _quantize_pool(x, mean, block, 1, int8=int8, pool=True)
    return rows if int8 else x, means


def _quantize_pool(
    x: Tensor, mean: Tensor | None, block: int, count: int, *, int8: bool, pool: bool
) -> tuple[Quantized, Tensor]:
    batch, length, heads, dim = x.shape
    blocks = triton.cdiv(length, block)
    means = x.new_empty((batch, heads, blocks, dim)) if pool else None
    rows = x.new_empty(x.shape, dtype=torch.int8) if int8 else None
    scale = x.new_empty((batch, heads, blocks), dtype=torch.float32) if int8 else None
    _quantize_pool_kernel[(blocks, heads, batch)](
        x, mean, means, rows, scale, 1.0 / count, length, *x.stride()[:3],
        SMOOTH=mean is not None, POOL=pool, INT8=int8, ROWS=block, DIM=dim, num_warps=block // 16,
    )  # fmt: skip
    return Quantized(rows, scale), means


@triton.jit(do_not_specialize=["length"])
def _quantize_pool_kernel(
    x, mean, means, rows, scale, share, length, x_batch, x_row, x_head,
    SMOOTH: tl.constexpr, POOL: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    block, head, heads, batch = tl.program_id(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    first, slot = block * ROWS, batch * heads + head
    r, d = tl.arange(0, ROWS), tl.arange(0, DIM)[None, :]
    inside = (r < length - first)[:, None]
    if not POOL:  # instead of what is not there the last row, again: largest value and result stay what they are
        r = tl.minimum(r, length - 1 - first)
    x += batch * x_batch + head.to(tl.int64) * x_head + first.to(tl.int64) * x_row
    at = r[:, None] * x_row + d
    if SMOOTH:
        centre = (tl.load(mean + slot * DIM + d).to(tl.float32) * share).to(x.dtype.element_ty)
    if POOL:
        y = widen(tl.load(x + at, mask=inside, other=centre if SMOOTH and INT8 else 0.0))
    else:
        y = widen(tl.load(x + at))
    if SMOOTH and INT8:  # rounded, as the reference does
        y = widen((y - centre.to(tl.float32)).to(x.dtype.element_ty))
    to = slot * tl.num_programs(0) + block
    if POOL:
        average = tl.sum(y, 0) * (1.0 / tl.minimum(length - first, ROWS).to(tl.float32))
        if SMOOTH and not INT8:
            average -= tl.reshape(centre, (DIM,)).to(tl.float32)
        tl.store(means + to * DIM + tl.arange(0, DIM), average.to(means.dtype.element_ty))
    if INT8:
        even, odd = tl.split(tl.reshape(y, (ROWS, DIM // 2, 2)))
        step = peak(larger(tl.abs(even), tl.abs(odd))) / 127.0 + 1e-7
        y = round_to_int8(y * tl.rsqrt(step * step))  # 1 / step, and ties to even: a tie may fall to the other side
        rows += ((batch * length + first) * heads + head) * DIM
        if POOL:
            tl.store(rows + (r[:, None] * (heads * DIM) + d), y, mask=inside)
        else:
            tl.store(rows + (r[:, None] * (heads * DIM) + d), y)
        tl.store(scale + to, step)


@triton.jit
def int8_pairs(even, odd):
    """Nearest INT8 of two float32, the first in the lower byte of an INT16, as `round_to_int8` does it. 128 more keeps
    the lower byte from borrowing of the upper one; it is taken away from both bytes of two pairs in one instruction."""
    even = (even + (12582912.0 + 128.0)).to(tl.int32, bitcast=True)
    odd = (odd + 12582912.0).to(tl.int32, bitcast=True)
    return ((odd << 8) + even).to(tl.int16) ^ 128


@triton.jit
def _read_pairs(at, row, pair):
    """Channels 0 2 4 ... and 1 3 5 ... in float32 of rows that begin at `at` [ROWS, 1]; two of 16 bits are one load."""
    if at.dtype.element_ty.primitive_bitwidth == 16:
        both = tl.load(at.to(tl.pointer_type(tl.int32)) + pair + row)
        if at.dtype.element_ty == tl.bfloat16:
            return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
        even, odd = (
            both.to(tl.int16).to(tl.float16, bitcast=True),
            (both >> 16).to(tl.int16).to(tl.float16, bitcast=True),
        )
        return even.to(tl.float32), odd.to(tl.float32)
    return tl.load(at + 2 * (pair + row)).to(tl.float32), tl.load(at + 2 * (pair + row) + 1).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def _norm_quantize_kernel(
    x, mean, rows, scale, factor, weight, cos, sin, share, length, heads, x_batch, x_row, x_head,
    SMOOTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Norm, rotation, subtraction of the mean and INT8 of one block of HEADS heads, one after the other, all in pairs
    of channels: what is read is rotated in pairs, and two INT8 are written as one number, so that no value changes its
    thread. Where a mean is subtracted, factor times rotation stays in registers for all heads."""
    block, head, batch = tl.program_id(0), tl.program_id(1) * HEADS, tl.program_id(2)
    half: tl.constexpr = DIM // 2
    first, slot, d, pair = block * ROWS, batch * heads + head, tl.arange(0, DIM), tl.arange(0, half)[None, :]
    # instead of what is not there the last row, again: largest value and result stay what they are
    r = tl.minimum(tl.arange(0, ROWS), length - 1 - first)
    token = batch * length + first
    x += batch.to(tl.int64) * x_batch + head * x_head + first.to(tl.int64) * x_row
    rows = (rows + (token.to(tl.int64) * heads + head) * DIM).to(tl.pointer_type(tl.int16))
    by = tl.load(factor + (token + r))[:, None]
    turn = first * half + pair + r[:, None] * half
    if SMOOTH:
        cosine, sine = tl.load(cos + turn) * by, tl.load(sin + turn) * by
    for i in range(HEADS):
        even, odd = _read_pairs(x, r[:, None] * (x_row >> 1), pair)
        even_weight, odd_weight = _read_pairs(weight + (head + i) * DIM, 0, pair)
        even, odd = even * even_weight, odd * odd_weight
        if SMOOTH:
            centre = tl.load(mean + (slot + i) * DIM + d).to(tl.float32) * share
            even_centre, odd_centre = tl.split(tl.reshape(centre, (1, half, 2)))
            even, odd = (
                even * cosine - tl.fma(odd, sine, even_centre),
                tl.fma(even, sine, odd * cosine - odd_centre),
            )
        else:
            cosine, sine = tl.load(cos + turn), tl.load(sin + turn)
            even, odd = even * cosine - odd * sine, even * sine + odd * cosine
        largest = larger(tl.abs(even), tl.abs(odd)).to(tl.int32, bitcast=True)
        if not SMOOTH:  # `by` is multiplied with the largest of 8 pairs, then with 1 / step: 10 products for 16 values
            for size in tl.static_range(3):
                a, b = tl.split(tl.reshape(largest, (ROWS, half >> (size + 1), 2)))
                largest = tl.maximum(a, b)
        largest = largest.to(tl.float32, bitcast=True)
        if not SMOOTH:
            largest *= by
        step = peak(largest) / 127.0 + 1e-7
        inverse = tl.rsqrt(step * step)  # 1 / step, and ties to even: a tie may fall to the other side
        if not SMOOTH:
            inverse = by * inverse
        tl.store(rows + pair + r[:, None] * (heads * half), int8_pairs(even * inverse, odd * inverse))
        tl.store(scale + (slot + i) * tl.num_programs(0) + block, step)
        x += x_head
        rows += half
