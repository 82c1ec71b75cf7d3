"""The INT8 product in plain PyTorch: float32 products of the dequantised tiles.

A product of two tiles is exact in INT32 and in float32 alike (128 * 128 * 128 < 2^24); scaling before or after it
differs by one rounding, about 1e-7 of the result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiff_kernels.quant.reference import TILE, dequantize_tiles, quantize_tiles

ROW_TILES = 32  # rows are multiplied 32 tiles at a time, which bounds the float32 copies


def int8_linear(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> Tensor:
    """`gelu(a @ b.T + bias)` as the operator declares, rounded to `dtype` after each of the three."""
    weight = _dequantize(b, b_scale).T
    y = torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    part = ROW_TILES * TILE
    for rows, scale, into in zip(
        a.split(part), a_scale.split(ROW_TILES if a_scale.dim() == 2 else part), y.split(part), strict=True
    ):
        into.copy_(_dequantize(rows, scale) @ weight)
    if bias is not None:
        y.add_(bias.to(dtype))
    return F.gelu(y, approximate="tanh") if gelu else y


def int8_linear_quantize(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """`int8_linear`, then `quantize_tiles`."""
    return quantize_tiles(int8_linear(a, a_scale, b, b_scale, bias, dtype, gelu))


def int8_linear_add_(
    x: Tensor, gate: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`x += gate * (a @ b.T + bias)` as the operator declares; the gate is rounded to the dtype of x."""
    return x.addcmul_(int8_linear(a, a_scale, b, b_scale, bias, x.dtype).view(x.shape), gate.to(x.dtype))


def _dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """int8 [M, K] and scales per tile or per row -> float32 [M, K]."""
    return dequantize_tiles(x, scale) if scale.dim() == 2 else x * scale[:, None]
