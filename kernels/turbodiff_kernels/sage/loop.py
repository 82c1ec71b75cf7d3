"""The attention loop in Triton: dense, INT8, FP8, block-sparse and sparse-linear attention.

A program owns 128 queries of one head and walks over blocks of 64 keys with an online softmax in base 2
(arXiv 2205.14135); the softmax scale and log2(e) are folded into one factor. The maths is in kernels/README.md.
"""

import math

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)  # largest float8_e4m3
# largest value where 64 products with weights up to 448 are summed in float16: 64 * 448 * 2.25 < 65504 (SpargeAttn)
FP16_SUM_MAX = tl.constexpr(2.25)
FP8_BITS = tl.constexpr(math.log2(448.0))
# INT32 sums of 128 products of INT8 are below 2^21: added to these bits, their own bits are those of the float32
# OFFSET + sum, so that no conversion is needed
OFFSET_BITS, OFFSET = tl.constexpr(0x4B400000), tl.constexpr(1.5 * 2.0**23)


@triton.jit
def value_scale(peaks, HALF: tl.constexpr):
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


@triton.jit
def exponentials(x):
    """exp of each row [ROWS, DIM] less its largest value, float32; exp2 is one instruction, exp four."""
    return tl.exp2(x * 1.4426950408889634 - tl.max(x, 1)[:, None] * 1.4426950408889634)


@triton.jit
def feature_map(x):
    """Softmax over the channels of each row (the feature map of SLA's linear branch), float32."""
    e = exponentials(x)
    return e * (1.0 / tl.sum(e, 1))[:, None]  # a division a row instead of one a channel


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
def attend_kernel(
    q, k, v, out, q_scale, k_scale, v_peaks, kept, raw_q, state, total, bias, length, blocks, heads, factor, eps,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, v_channel, raw_batch, raw_row, raw_head,
    INT8: tl.constexpr, FP8: tl.constexpr, SPARSE: tl.constexpr, LINEAR: tl.constexpr, PAIR: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr, FOURS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Launched by `attend` of kernel.py, whose arguments these are, with their strides."""
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
        acc *= value_scale(tl.load(v_peaks + slot * DIM + d), HALF)[None, :]
    if LINEAR:
        raw_at = raw_q + batch * raw_batch + head * raw_head + wide * raw_row + d[None, :]
        phi = feature_map(tl.load(raw_at, mask=here, other=0.0).to(tl.float32))
        below = eps + tl.sum(phi * tl.load(total + slot * DIM + d)[None, :], 1)
        square = tl.load(state + slot * DIM * DIM + d[:, None] * DIM + d[None, :])
        # accumulated onto the sparse branch, which is scaled to match: no second tile of registers
        acc = tl.dot(phi.to(square.dtype), square, acc * below[:, None]) * (1.0 / below)[:, None]
        acc += tl.load(bias + d).to(tl.float32)[None, :]
    to = out + ((batch * length + row) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=here)
