"""INT8 products in Triton, with what follows a product done while the tile is still in registers.

Two scale layouts, one kernel. Tiles of 128 x 128 (TurboDiffusion's files): each 128 of K is multiplied exactly in
INT32, scaled, and added in float32, K ascending; the scaling costs about as much as the product itself. Per token and
per channel (the fast mode): INT32 over all of K, scaled once at the end.
"""

from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbodiff_kernels.backend import arch
from turbodiff_kernels.quant.kernel import quantize_tile
from turbodiff_kernels.quant.reference import TILE, tiles

TRITON_DTYPES = MappingProxyType(
    {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}  # that tokens may have
)


class Tiling(NamedTuple):
    """Rows, columns and depth of one program's tile, with its warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiling(capability: int, tiled: bool) -> Tiling:
    """Shipped configuration per architecture: chosen from ahead-of-time compiles (no spills, shared memory fits)."""
    if tiled:
        return Tiling(TILE, TILE, TILE, 8, 3)
    return Tiling(128, 256, 128, 8, 3) if capability == 90 else Tiling(128, 128, 128, 8, 4)


def int8_linear(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> Tensor:
    """`gelu(a @ b.T + bias)` in `dtype`, as the operator declares."""
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
    _launch(a, a_scale, b, b_scale, bias, out, dtype, None, None, gelu)
    return out


def int8_linear_quantize(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """The same, quantised in tiles without a way through memory; tile scales only."""
    rows, columns = a.shape[0], b.shape[0]
    out = a.new_empty((rows, columns), dtype=torch.int8)
    out_scale = a.new_empty((tiles(rows), tiles(columns)), dtype=torch.float32)
    _launch(a, a_scale, b, b_scale, bias, out, dtype, out_scale, None, gelu)
    return out, out_scale


def int8_linear_add_(
    x: Tensor, gate: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None
) -> None:
    """`x += gate * (a @ b.T + bias)`: tokens x [B, L, N], gate [B, 1, N], a [B * L, K]."""
    _launch(a, a_scale, b, b_scale, bias, x, x.dtype, None, gate, False)


def _launch(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None,
    out: Tensor, dtype: torch.dtype, out_scale: Tensor | None, gate: Tensor | None, gelu: bool,
) -> None:  # fmt: skip
    rows, inner, columns, tiled = *a.shape, b.shape[0], a_scale.dim() == 2
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    batch, length = (out.shape[0], out.shape[1]) if gate is not None else (1, rows)
    if gate is not None:
        gate = gate.expand(batch, 1, columns)
    tile = tiling(arch(a.device), tiled)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
    _int8_linear_kernel[grid](
        a, a_scale, b, b_scale, bias, gate, out, out_scale, rows, columns, inner, length,
        a.stride(0), b.stride(0), out.stride(0) if gate is not None else 0, out.stride(-2),
        gate.stride(0) if gate is not None else 0,
        TILED=tiled, BIAS=bias is not None, GELU=gelu, GATE=gate is not None, QUANTIZE=out_scale is not None,
        DTYPE=TRITON_DTYPES[dtype], ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=8,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """float32 after a way through DTYPE: the unfused passes would have stored it there."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "length"])
def _int8_linear_kernel(
    a, a_scale, b, b_scale, bias, gate, out, out_scale, rows, columns, inner, length,
    a_row, b_row, out_batch, out_row, gate_batch,
    TILED: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, GATE: tl.constexpr, QUANTIZE: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # tiles in groups of GROUP rows of tiles, so that neighbours in time share their operands in L2
    program, row_tiles, column_tiles = tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    per_group = GROUP * column_tiles
    top = program // per_group * GROUP
    height = tl.minimum(row_tiles - top, GROUP)
    i, j = top + program % per_group % height, program % per_group // height
    row, column, k = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    a_at = a + row.to(tl.int64)[:, None] * a_row + k[None, :]
    b_at = b + column.to(tl.int64)[None, :] * b_row + k[:, None]
    depths = tl.cdiv(inner, DEPTH)
    exact = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(depths):
        left = inner - step * DEPTH
        x = tl.load(a_at, mask=(row < rows)[:, None] & (k < left)[None, :], other=0)
        w = tl.load(b_at, mask=(column < columns)[None, :] & (k < left)[:, None], other=0)
        if TILED:
            by = tl.load(a_scale + i * depths + step) * tl.load(b_scale + j * depths + step)
            y += tl.dot(x, w, out_dtype=tl.int32).to(tl.float32) * by
        else:
            exact = tl.dot(x, w, exact, out_dtype=tl.int32)
        a_at += DEPTH
        b_at += DEPTH
    if not TILED:
        by_row = tl.load(a_scale + row, mask=row < rows, other=0.0)
        by_column = tl.load(b_scale + column, mask=column < columns, other=0.0)
        y = exact.to(tl.float32) * by_row[:, None] * by_column[None, :]
    y = _rounded(y, DTYPE)
    if BIAS:
        add = tl.load(bias + column, mask=column < columns, other=0.0).to(DTYPE).to(tl.float32)
        y = _rounded(y + add[None, :], DTYPE)
    if GELU:  # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u)); its root is one instruction; exp(80) is infinite enough
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        half = tl.rsqrt(1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))
        y = _rounded(y * half * half, DTYPE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if QUANTIZE:
        y, amount = quantize_tile(tl.where(inside, y, 0.0), ROWS)
        tl.store(out_scale + i * column_tiles + j, amount)
    line = row.to(tl.int64)
    if GATE:
        for clip in range(i * ROWS // length, (tl.minimum((i + 1) * ROWS, rows) - 1) // length + 1):
            by = tl.load(gate + clip * gate_batch + column, mask=column < columns, other=0.0).to(tl.float32)
            y = tl.where((line // length == clip)[:, None], y * _rounded(by, DTYPE)[None, :], y)
        at = out + (line // length * out_batch + line % length * out_row)[:, None] + column[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        at = out + line[:, None] * out_row + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=inside)
