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
    block = triton.next_power_of_2(columns)
    _quantize_tokens_kernel[(rows,)](
        x, out, scale, columns, x.stride(0), BLOCK=block, num_warps=block_warps(block), enable_fp_fusion=False
    )


def block_warps(block: int) -> int:
    """Warps for one program that holds `block` values: at most 32 float32 registers of them per thread."""
    return min(16, max(1, block // 1024))


@triton.jit
def round_to_int8(x):
    """Nearest INT8, ties to even, of float32 -128.5 < x < 127.5: adding 1.5 * 2^23 pushes the fraction out and leaves
    the integer in the lowest byte, where a conversion would take two instructions more, one of them slow.

    Launch with `enable_fp_fusion=False` where `x` is a product that must be rounded before.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_tile(x, TILE: tl.constexpr):
    """One float32 tile -> (INT8 tile, scale): scale = max|tile| / 128, +max saturates at 127 (TurboDiffusion)."""
    amax = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-8)
    scaled = tl.minimum(x * tl.div_rn(TILE * 1.0, amax), 127.0)
    return round_to_int8(scaled), amax / TILE


@triton.jit(do_not_specialize=["rows"])
def _quantize_tiles_kernel(x, out, scale, rows, columns, x_row, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    wide = row.to(tl.int64)[:, None]
    values = tl.load(x + wide * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    rounded, step = quantize_tile(values, TILE)
    tl.store(out + wide * columns + column[None, :], rounded, mask=inside)
    tl.store(scale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), step)


@triton.jit
def _quantize_tokens_kernel(x, out, scale, columns, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < columns
    values = tl.load(x + row * x_row + c, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(values), 0), 1e-8)
    tl.store(out + row * columns + c, round_to_int8(values * tl.div_rn(127.0, amax)), mask=inside)
    tl.store(scale + row, tl.div_rn(amax, 127.0))
