"""INT8 quantisation in Triton: one reading of the values, one writing of a quarter or half of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbodiff_kernels.quant.reference import TILE, tiles


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 and one scale per 128 x 128 tile, as the operator declares; equal to the reference bit by bit."""
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((tiles(rows), tiles(columns)), dtype=torch.float32)
    _quantize_tiles_kernel[scale.shape](
        x, out, scale, rows, columns, x.stride(0), TILE=TILE, num_warps=8, enable_fp_fusion=False
    )
    return out, scale


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 and one scale per row, as the operator declares."""
    out, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
    quantize_tokens_into_(out, scale, x)
    return out, scale


def quantize_tokens_into_(out: Tensor, scale: Tensor, x: Tensor) -> None:
    """The same into rows of what exists, as the operator declares."""
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    warps = row_warps(columns)
    _quantize_tokens_kernel[(rows,)](
        x, out, scale, x.stride(0), CHANNELS=columns, SIZE=256 * warps, num_warps=warps, enable_fp_fusion=False
    )


def row_warps(channels: int) -> int:
    """Warps for one program that holds a row: each thread has 8 values, 16 bytes of a 16-bit type, of every part of the
    row, and 56 in all at most."""
    return triton.next_power_of_2(triton.cdiv(channels, 56 * 32))


@triton.jit
def round_to_int8(x):
    """Nearest INT8, ties to even, of float32 -128.5 < x < 127.5: adding 1.5 * 2^23 pushes the fraction out and leaves
    the integer in the lowest byte, where a conversion would take two instructions more, one of them slow.

    Launch with `enable_fp_fusion=False` where `x` is a product that must be rounded before.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def widen(x):
    """x in float32. bfloat16 is the upper half of a float32, moved there as an integer: one instruction, where the
    conversion takes one and a half."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def read_part(at, FIRST: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels FIRST to FIRST + SIZE of a row in float32, zeros behind the last channel; masked only where needed."""
    c = FIRST + tl.arange(0, SIZE)
    if FIRST + SIZE > CHANNELS:
        return widen(tl.load(at + c, mask=c < CHANNELS, other=0.0))
    return widen(tl.load(at + c))


@triton.jit
def write_part(at, y, FIRST: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels FIRST to FIRST + SIZE of a row, in the dtype of `at`."""
    c = FIRST + tl.arange(0, SIZE)
    if FIRST + SIZE > CHANNELS:
        tl.store(at + c, y.to(at.dtype.element_ty), mask=c < CHANNELS)
    else:
        tl.store(at + c, y.to(at.dtype.element_ty))


@triton.jit
def read_parts(at, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """A row in parts of SIZE channels."""
    parts = ()
    for i in tl.static_range(0, CHANNELS, SIZE):
        parts += (read_part(at, i, SIZE, CHANNELS),)
    return parts


@triton.jit
def larger(a, b):
    """The larger of two numbers, NaN where one of them is: as an integer it would be one like all others, and a clip
    that went wrong would seem to be right."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of_pairs(y, SIZE: tl.constexpr):
    """The larger magnitude of each two of SIZE float32, as an integer of the same order: Hopper compares three integers
    in one instruction, Blackwell three float32 as well, older cards neither."""
    even, odd = tl.split(tl.reshape(y, (SIZE // 2, 2)))
    return larger(tl.abs(even), tl.abs(odd)).to(tl.int32, bitcast=True)


@triton.jit
def peak(x):
    """The largest of all numbers of x, float32 and none below zero, or those as integers: their bits have the same
    order, and a warp finds the largest integer in one instruction. NaN counts as larger than all."""
    return tl.max(x if x.dtype == tl.int32 else x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def quantize_tile(x, TILE: tl.constexpr):
    """One float32 tile -> (INT8 tile, scale): scale = max|tile| / 128, +max saturates at 127 (TurboDiffusion)."""
    amax = larger(peak(tl.abs(x)), 1e-8)
    scaled = tl.minimum(x * tl.div_rn(TILE * 1.0, amax), 127.0)
    return round_to_int8(scaled), amax / TILE


@triton.jit(do_not_specialize=["rows"])
def _quantize_tiles_kernel(x, out, scale, rows, columns, x_row, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    wide = row.to(tl.int64)[:, None]
    values = widen(tl.load(x + wide * x_row + column[None, :], mask=inside, other=0.0))
    rounded, step = quantize_tile(values, TILE)
    tl.store(out + wide * columns + column[None, :], rounded, mask=inside)
    tl.store(scale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), step)


@triton.jit
def _quantize_tokens_kernel(x, out, scale, x_row, CHANNELS: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    parts = read_parts(x + row * x_row, SIZE, CHANNELS)
    largest = tl.abs(parts[0])
    for i in tl.static_range(1, len(parts)):
        largest = larger(largest, tl.abs(parts[i]))
    amax = larger(peak(largest), 1e-8)
    tl.store(scale + row, tl.div_rn(amax, 127.0))
    by = tl.div_rn(127.0, amax)
    for i in tl.static_range(len(parts)):
        write_part(out + row * CHANNELS, round_to_int8(parts[i] * by), i * SIZE, SIZE, CHANNELS)
