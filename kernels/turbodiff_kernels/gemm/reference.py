"""The INT8 product in plain PyTorch: float32 products of the dequantised tiles.

A product of two tiles is exact in INT32 and in float32 alike (128 * 128 * 128 < 2^24); scaling before or after it
differs by one rounding, about 1e-7 of the result.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiff_kernels.quant.reference import TILE, dequantize_tiles, quantize_tiles, tiles

ROW_TILES = 8  # rows are multiplied 8 tiles at a time, which bounds the float32 copies


def int8_linear(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> Tensor:
    """`gelu(a @ b.T + bias)` as the operator declares, rounded to `dtype` after each of the three."""
    y = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    for rows, part in _parts(a, a_scale, b, b_scale, bias, dtype, gelu):
        y[rows] = part
    return y


def int8_linear_quantize(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """`int8_linear`, then `quantize_tiles`; the wide values exist for some rows at a time."""
    values = a.new_empty(a.shape[0], b.shape[0])
    scale = a.new_empty((tiles(a.shape[0]), tiles(b.shape[0])), dtype=torch.float32)
    for rows, part in _parts(a, a_scale, b, b_scale, bias, dtype, gelu):
        first = rows.start // TILE
        values[rows], scale[first : first + tiles(len(part))] = quantize_tiles(part)
    return values, scale


def int8_linear_add_(
    x: Tensor, gate: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`x += gate * (a @ b.T + bias)` as the operator declares; the gate is rounded to the dtype of x."""
    gate, length = gate.to(x.dtype)[:, 0], x.shape[1]
    for rows, part in _parts(a, a_scale, b, b_scale, bias, x.dtype):
        for sample in range(rows.start // length, -(-rows.stop // length)):  # x need not be contiguous across its clips
            first, last = max(rows.start, sample * length), min(rows.stop, (sample + 1) * length)
            here = x[sample, first - sample * length : last - sample * length]
            here.addcmul_(part[first - rows.start : last - rows.start], gate[sample if len(gate) > 1 else 0])
        del part, here  # later parts find the room of the first: once x is touched nothing runs out of memory
    return x


def _parts(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of `int8_linear` at a time, and which they are."""
    weight = _dequantize(b, b_scale).T
    for start in range(0, len(a), ROW_TILES * TILE):
        rows = slice(start, min(len(a), start + ROW_TILES * TILE))
        scales = slice(start // TILE, start // TILE + ROW_TILES) if a_scale.dim() == 2 else rows
        y = (_dequantize(a[rows], a_scale[scales]) @ weight).to(dtype)
        if bias is not None:
            y.add_(bias.to(dtype))
        y = F.gelu(y, approximate="tanh") if gelu else y
        yield rows, y
        del y


def _dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """int8 [M, K] and scales per tile or per row -> float32 [M, K]."""
    return dequantize_tiles(x, scale) if scale.dim() == 2 else x * scale[:, None]
