"""Attention in Triton: one loop for dense, INT8, FP8, block-sparse and sparse-linear attention.

A program owns 128 queries of one head and walks over blocks of 64 keys with an online softmax in base 2
(arXiv 2205.14135); the softmax scale and log2(e) are folded into one factor. The maths is in kernels/README.md.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbodiff_kernels.backend import arch
from turbodiff_kernels.norm.kernel import rms_factor, rope_statistics, rotate_pairs
from turbodiff_kernels.quant.kernel import round_to_int8
from turbodiff_kernels.sage.reference import BLOCK_K, BLOCK_Q

FP8_MAX = tl.constexpr(448.0)  # largest float8_e4m3
# largest value where 64 products with weights up to 448 are summed in float16: 64 * 448 * 2.25 < 65504 (SpargeAttn)
FP16_SUM_MAX = tl.constexpr(2.25)
SUMS_FP8_IN_FP16 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)  # 3.4 cannot compile that product
FP8_BITS = tl.constexpr(math.log2(448.0))
# INT32 sums of 128 products of INT8 are below 2^21: added to these bits, their own bits are those of the float32
# OFFSET + sum, so that no conversion is needed
OFFSET_BITS, OFFSET = tl.constexpr(0x4B400000), tl.constexpr(1.5 * 2.0**23)


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


class LinearBranch(NamedTuple):
    """What the linear branch of SLA adds to a row q: `phi(q) @ state / (eps + phi(q) . total) + bias`, phi = softmax.

    q [B, L, H, D] unquantised; state [B, H, D, D] with the projection folded in; total float32 [B, H, D]; bias [D];
    peaks float32 [B, H, D], `largest_values` of v where they are wanted.
    """

    q: Tensor
    state: Tensor
    total: Tensor
    bias: Tensor
    eps: float
    peaks: Tensor | None


class Settings(NamedTuple):
    """Warps and pipeline stages of the attention loop; whether the value product runs in FP8 (`fp8`), an iteration
    takes two blocks of keys (`pair`), INT32 scores become float32 by their bits (`bits`, see OFFSET), FP8 products of
    one block are summed in float16 (`half`), which GeForce cards do at twice the rate; whether FP8 weights and values
    lie `in_fours`, where both products leave a thread the same rows (all but data-centre Blackwell).
    """

    warps: int
    stages: int
    fp8: bool
    pair: bool
    bits: bool
    half: bool
    fours: bool


def settings(capability: int, int8: bool, linear: bool) -> Settings:
    """Shipped configuration per architecture: chosen from ahead-of-time compiles (no spills, shared memory fits).

    FP8 values go with INT8 scores, on every card that multiplies FP8 (as SageAttention2 does).
    """
    crowded = capability >= 120 and int8 and linear  # a third stage or four constants more spill registers
    pair = capability == 90  # elsewhere two blocks spill or gain nothing
    bits, half = int8 and not pair and not crowded, int8 and capability in (89, 120, 121) and SUMS_FP8_IN_FP16
    fp8 = int8 and capability >= 89
    return Settings(8, 2 if crowded else 3, fp8, pair, bits, half, fp8 and capability // 10 != 10)


def wants_fp8(v: Tensor, int8: bool) -> bool:
    """Whether the values go with INT8 (or 16-bit) scores into an FP8 product on their card."""
    return settings(arch(v.device), int8, linear=False).fp8


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention with INT8 scores, as the operator declares."""
    q, k, v = (channels_last(t) for t in (q, k, v))
    return attend(quantize(q, None, BLOCK_Q), quantize(k, k.mean(dim=1), BLOCK_K), v)


def normed_sage_attention_(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """The same of projections before their norm and rotation, in the place of q: q and k are read twice before that."""
    cos, sin = cos.contiguous(), sin.contiguous()
    dim = 2 * cos.shape[-1]
    k_factor, sums = rope_statistics(k, k_weight, cos, sin, eps)
    total = sums.sum(1)
    del sums
    norms = NormRope(rms_factor(q, eps), q_weight, cos, sin), NormRope(k_factor, k_weight, cos, sin)
    heads, k, v = (channels_last(t).unflatten(-1, (-1, dim)) for t in (q, k, v))
    rows = quantize(heads, None, BLOCK_Q, norms[0]), quantize(k, total, BLOCK_K, norms[1], count=k.shape[1])
    return settle(q, attend(*rows, v, into=heads, spare=k))


def attend(
    q: Tensor | Quantized, k: Tensor | Quantized, v: Tensor, kept: Tensor | None = None,
    linear: LinearBranch | None = None, into: Tensor | None = None, spare: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of [B, L, H, D] to all key blocks, or to those in `kept` int64 [B, H, ceil(L / 128), n].

    Rows that are not quantised give exact attention. Channels must be contiguous. Where they are contiguous the result
    lies in `into` and FP8 values in `spare`. `into` may be the queries: a program reads those of its own 128 rows and
    one head, and what it writes there depends on all of them.
    """
    int8 = isinstance(q, Quantized)
    q_rows, k_rows = (q.rows, k.rows) if int8 else (q, k)
    q_scale, k_scale = (q.scale, k.scale) if int8 else (None, None)
    batch, length, heads, dim = q_rows.shape
    assert dim in (64, 128), f"head_dim {dim}: the kernels know 64 and 128"
    out = into if into is not None and into.is_contiguous() else v.new_empty(q_rows.shape)
    warps, stages, fp8, pair, bits, half, fours = settings(arch(v.device), int8, linear is not None)
    v_peaks = None
    if fp8:
        v_peaks = linear.peaks if linear and linear.peaks is not None else largest_values(v)
        v = quantize_values(v, v_peaks, spare, half=half, fours=fours)
    v_strides = [v.stride(axis) for axis in ((0, 3, 1, 2) if fp8 else (0, 1, 2, 3))]
    lin = linear or LinearBranch(q_rows, None, None, None, 0.0, None)
    blocks = triton.cdiv(length, BLOCK_K) if kept is None else kept.shape[-1]
    _attend_kernel[(triton.cdiv(length, BLOCK_Q), batch * heads)](
        q_rows, k_rows, v, out, q_scale, k_scale, v_peaks, kept, lin.q, lin.state, lin.total, lin.bias,
        length, blocks, heads, math.log2(math.e) / dim**0.5, lin.eps,
        *q_rows.stride()[:3], *k_rows.stride()[:3], *v_strides, *lin.q.stride()[:3],
        INT8=int8, FP8=fp8, SPARSE=kept is not None, LINEAR=linear is not None, PAIR=pair, BITS=bits, HALF=half,
        FOURS=fours, ROWS=BLOCK_Q, COLUMNS=BLOCK_K, DIM=dim, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def settle(q: Tensor, out: Tensor) -> Tensor:
    """q [B, L, H * D], which holds a result [B, L, H, D]: copied only where it was not made there."""
    return q if out.data_ptr() == q.data_ptr() else q.copy_(out.flatten(2))


def quantize(x: Tensor, mean: Tensor | None, block: int, norm: NormRope | None = None, *, count: int = 1) -> Quantized:
    """INT8 rows of `norm(x) - mean / count`, x [B, L, H, D]: one reading, one writing of half as much. `count`: of the
    tokens where `mean` is their sum."""
    return _quantize_pool(x, mean, block, norm, count, int8=True, pool=False)[0]


def quantize_pool(x: Tensor, mean: Tensor | None, block: int, *, int8: bool) -> tuple[Tensor | Quantized, Tensor]:
    """Of `x - mean` [B, L, H, D] in one reading: INT8 rows (or x itself), block means [B, H, ceil(L / block), D]."""
    rows, means = _quantize_pool(x, mean, block, None, 1, int8=int8, pool=True)
    return rows if int8 else x, means


def _quantize_pool(
    x: Tensor, mean: Tensor | None, block: int, norm: NormRope | None, count: int, *, int8: bool, pool: bool
) -> tuple[Quantized, Tensor]:
    batch, length, heads, dim = x.shape
    blocks = triton.cdiv(length, block)
    means = x.new_empty((batch, heads, blocks, dim)) if pool else None
    rows = x.new_empty(x.shape, dtype=torch.int8) if int8 else None
    scale = x.new_empty((batch, heads, blocks), dtype=torch.float32) if int8 else None
    _quantize_pool_kernel[(blocks, batch * heads)](
        x, mean, means, rows, scale, *(norm or (None, None, None, None)), 1.0 / count, length, heads, *x.stride()[:3],
        NORM=norm is not None, SMOOTH=mean is not None, POOL=pool, INT8=int8,
        ROWS=block, DIM=dim, num_warps=block // 16, enable_fp_fusion=False,
    )  # fmt: skip
    return Quantized(rows, scale), means


def largest_values(v: Tensor) -> Tensor:
    """max|v| over the tokens of v [B, L, H, D]: [B, H, D] in its dtype."""
    return torch.linalg.vector_norm(v, float("inf"), dim=1)  # makes no copy of |v|


def quantize_values(
    v: Tensor, peaks: Tensor, spare: Tensor | None = None, *, half: bool, fours: bool = False
) -> Tensor:  # fmt: skip
    """v [B, L, H, D] -> float8_e4m3 [B, H, D, L padded with zeros to whole key blocks], times `_value_scale`.

    Channels first, because the FP8 matrix units read both operands along the summed axis. `peaks`: `largest_values`.
    `half`: products are summed in float16; `fours`: the tokens lie `in_fours`. `spare`: what may be overwritten; where
    it is not contiguous or too small, memory of its own is taken.
    """
    batch, length, heads, dim = v.shape
    shape = (batch, heads, dim, triton.cdiv(length, BLOCK_K) * BLOCK_K)
    if spare is not None and spare.is_contiguous() and spare.nbytes >= math.prod(shape):
        out = spare.flatten().view(torch.float8_e4m3fn)[: math.prod(shape)].view(shape)
    else:
        out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=v.device)
    _quantize_values_kernel[(triton.cdiv(out.shape[-1], BLOCK_K), batch * heads)](
        v, peaks, out, length, out.shape[-1], heads, *v.stride()[:3],
        HALF=half, FOURS=fours, ROWS=BLOCK_K, DIM=dim, num_warps=4,
    )  # fmt: skip
    return out


def channels_last(x: Tensor) -> Tensor:
    """[B, L, H, D] with contiguous channels; a view wherever possible."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["length"])
def _quantize_pool_kernel(
    x, mean, means, rows, scale, factor, weight, cos, sin, share, length, heads, x_batch, x_row, x_head,
    NORM: tl.constexpr, SMOOTH: tl.constexpr, POOL: tl.constexpr, INT8: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = (row < length)[:, None]
    at = head // heads * x_batch + head % heads * x_head + row.to(tl.int64)[:, None] * x_row + d[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:  # rounded to the tokens' dtype, as a separate pass would store it
        by = tl.load(factor + head // heads * length + row, mask=row < length, other=0.0)
        w = tl.load(weight + head % heads * DIM + d).to(tl.float32)
        turn = row[:, None] * (DIM // 2) + tl.arange(0, DIM // 2)[None, :]
        cosine, sine = tl.load(cos + turn, mask=inside, other=0.0), tl.load(sin + turn, mask=inside, other=0.0)
        y = rotate_pairs(y * by[:, None] * w[None, :], cosine, sine, ROWS, DIM)
        y = y.to(x.dtype.element_ty).to(tl.float32)
    if SMOOTH:  # rounded likewise
        centre = tl.load(mean + head * DIM + d).to(tl.float32) * share
        centre = centre.to(x.dtype.element_ty).to(tl.float32)
        y = tl.where(inside, (y - centre[None, :]).to(x.dtype.element_ty).to(tl.float32), 0.0)
    slot = head * tl.num_programs(0) + block
    if POOL:
        count = tl.minimum(length - block * ROWS, ROWS)
        average = tl.div_rn(tl.sum(y, 0), tl.zeros((DIM,), tl.float32) + count)
        tl.store(means + slot * DIM + d, average.to(means.dtype.element_ty))
    if INT8:
        step = tl.div_rn(tl.max(tl.max(tl.abs(y), 1), 0), 127.0) + 1e-7
        y *= tl.div_rn(1.0, step)  # one division a block, and ties to even: a tie may fall to the other side
        to = (head // heads * length + row)[:, None] * heads * DIM + head % heads * DIM + d[None, :]
        tl.store(rows + to, round_to_int8(y), mask=inside)
        tl.store(scale + slot, step)


@triton.jit
def _value_scale(peaks, HALF: tl.constexpr):
    """What FP8 values are multiplied by: peaks are the largest values of some channels."""
    return tl.maximum(peaks.to(tl.float32), 1e-8) / (FP16_SUM_MAX if HALF else FP8_MAX)


@triton.jit
def in_fours(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] with each 16 columns in the order 0 1 8 9, 2 3 10 11, 4 5 12 13, 6 7 14 15.

    The first thread of four has columns 0 1 8 9 of a matrix product's result, and columns 0 1 2 3 of the next one's FP8
    operand: in this order weights stay in their thread. The order of the keys in a sum is free.
    """
    fours = tl.permute(tl.reshape(x, (ROWS, COLUMNS // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(fours, (ROWS, COLUMNS))


@triton.jit(do_not_specialize=["length"])
def _quantize_values_kernel(
    v, peaks, out, length, padded, heads, v_batch, v_row, v_head,
    HALF: tl.constexpr, FOURS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    at = head // heads * v_batch + head % heads * v_head + row.to(tl.int64)[:, None] * v_row + d[None, :]
    y = tl.load(v + at, mask=(row < length)[:, None], other=0.0).to(tl.float32)
    y = (y / _value_scale(tl.load(peaks + head * DIM + d), HALF)[None, :]).to(out.dtype.element_ty)
    to = (head * DIM + d)[:, None] * padded + row[None, :]
    y = tl.trans(y)
    if FOURS:
        y = in_fours(y, DIM, ROWS)
    tl.store(out + to, y, mask=(row < padded)[None, :])


@triton.jit
def feature_map(x):
    """Softmax over the channels of each row (the feature map of SLA's linear branch), float32."""
    e = tl.exp(x - tl.max(x, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _values(at, column, left, FP8: tl.constexpr):
    """One block of values; FP8 values are padded to whole blocks, so that no mask breaks their loads into bytes."""
    return tl.load(at) if FP8 else tl.load(at, mask=(column < left)[:, None], other=0.0)


@triton.jit
def _score_block(
    queries, k_at, k_row, k_scale, factor, at, left, column, INT8: tl.constexpr, BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """(x, by): scores of one block of keys are `x * by`, with BITS `(x - OFFSET) * by`; -inf where there is no key."""
    keys = tl.load(k_at + (at * COLUMNS).to(tl.int64) * k_row, mask=(column < left)[None, :], other=0)
    if BITS:
        start = tl.full((queries.shape[0], COLUMNS), OFFSET_BITS, tl.int32)
        x = tl.dot(queries, keys, start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    else:
        x = tl.dot(queries, keys, out_dtype=tl.int32 if INT8 else tl.float32).to(tl.float32)
    by = factor * tl.load(k_scale + at) if INT8 else factor
    if left < COLUMNS:
        x += tl.where(column < left, 0.0, float("-inf"))[None, :]
    return x, by


@triton.jit(do_not_specialize=["length", "blocks"])
def _attend_kernel(
    q, k, v, out, q_scale, k_scale, v_peaks, kept, raw_q, state, total, bias, length, blocks, heads, factor, eps,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, v_channel, raw_batch, raw_row, raw_head,
    INT8: tl.constexpr, FP8: tl.constexpr, SPARSE: tl.constexpr, LINEAR: tl.constexpr, PAIR: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr, FOURS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    block, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = slot // heads, slot % heads
    row, column, d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DIM)
    here, wide = (row < length)[:, None], row.to(tl.int64)[:, None]
    queries = tl.load(q + batch * q_batch + head * q_head + wide * q_row + d[None, :], mask=here, other=0)
    k_at = k + batch * k_batch + head * k_head + column[None, :] * k_row + d[:, None]
    v_at = v + batch * v_batch + head * v_head + column[:, None] * v_row + d[None, :] * v_channel
    if SPARSE:
        kept += (slot * tl.num_programs(0) + block) * blocks
    if INT8:
        factor *= tl.load(q_scale + slot * tl.num_programs(0) + block)
        k_scale += slot * tl.cdiv(length, COLUMNS)
    # weights are exp2(score - peak): those that are rounded to FP8 come out 448 times as large, and so does the mass
    spread = FP8_BITS if FP8 else 0.0
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    # of every eighth key where there are registers for it: these lie in one thread until the end
    mass = tl.zeros((ROWS, 8), tl.float32) if BITS and HALF else tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for i in range(0, blocks, 2 if PAIR else 1):
        at = tl.load(kept + i).to(tl.int32) if SPARSE else i
        left = length - at * COLUMNS
        x, by = _score_block(queries, k_at, k_row, k_scale, factor, at, left, column, INT8, BITS, COLUMNS)
        base = tl.maximum(peak, (tl.max(x, 1) - (OFFSET if BITS else 0.0)) * by - spread)
        if PAIR:  # an odd block at the end has a partner without keys
            other = tl.minimum(i + 1, blocks - 1)
            at2 = tl.load(kept + other).to(tl.int32) if SPARSE else other
            left2 = tl.where(other > i, length - at2 * COLUMNS, 0)
            x2, by2 = _score_block(queries, k_at, k_row, k_scale, factor, at2, left2, column, INT8, BITS, COLUMNS)
            base = tl.maximum(base, tl.max(x2, 1) * by2 - spread)
        level = base
        if BITS:  # what the sum with OFFSET rounds off belongs to the base, so that no weight is off by it
            level = tl.fma(by, OFFSET, base)
            base = tl.fma(by, -OFFSET, level)
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(tl.fma(x, by, -level[:, None]))
        if BITS and HALF:
            mass = mass * shrink[:, None] + tl.sum(tl.reshape(weights, (ROWS, COLUMNS // 8, 8)), 1)
        else:
            mass = mass * shrink + tl.sum(weights, 1)
        weights = weights.to(v.dtype.element_ty)
        if FOURS:
            weights = in_fours(weights, ROWS, COLUMNS)
        values = _values(v_at + (at * COLUMNS).to(tl.int64) * v_row, column, left, FP8)
        if PAIR:
            weights2 = tl.exp2(tl.fma(x2, by2, -level[:, None]))
            mass += tl.sum(weights2, 1)
            weights2 = weights2.to(v.dtype.element_ty)
            if FOURS:
                weights2 = in_fours(weights2, ROWS, COLUMNS)
            values2 = _values(v_at + (at2 * COLUMNS).to(tl.int64) * v_row, column, left2, FP8)
        if FP8:  # added outside the matrix unit, whose FP8 accumulator keeps only 13 bits on Hopper
            added = tl.dot(weights, values, out_dtype=tl.float16 if HALF else tl.float32)
            if PAIR:
                added = tl.dot(weights2, values2, added)
            acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], (ROWS, DIM)), added.to(tl.float32))
        else:
            acc = tl.dot(weights, values, acc * shrink[:, None])
            if PAIR:
                acc = tl.dot(weights2, values2, acc)
        peak = base
    if BITS and HALF:
        mass = tl.sum(mass, 1)
    acc *= (1.0 / mass)[:, None]
    if FP8:
        acc *= _value_scale(tl.load(v_peaks + slot * DIM + d), HALF)[None, :]
    if LINEAR:
        raw_at = raw_q + batch * raw_batch + head * raw_head + wide * raw_row + d[None, :]
        phi = feature_map(tl.load(raw_at, mask=here, other=0.0).to(tl.float32))
        below = eps + tl.sum(phi * tl.load(total + slot * DIM + d)[None, :], 1)
        square = tl.load(state + slot * DIM * DIM + d[:, None] * DIM + d[None, :])
        # accumulated onto the sparse branch, which is scaled to match: no second tile of registers
        acc = tl.dot(phi.to(square.dtype), square, acc * below[:, None]) / below[:, None]
        acc += tl.load(bias + d).to(tl.float32)[None, :]
    to = out + ((batch * length + row) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=here)
