"""Products of two INT8 matrices, with what a Wan block does next.

The shape of the scales says the mode. Two-dimensional: one per tile of 128 x 128, exactly as TurboDiffusion's files.
One-dimensional: one per token and one per channel, the fast mode (`quantize_tokens` of activations and of weights).
"""

import torch
from torch import Tensor

from turbodiff_kernels.backend import operator
from turbodiff_kernels.gemm import reference
from turbodiff_kernels.quant.reference import tiles


@operator(reference.int8_linear, "gemm", differentiable=False)
def int8_linear(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> Tensor:
    """`a @ b.T + bias` and GELU (tanh) if `gelu`, rounded to `dtype` after each: one pass; either mode of scales.

    a int8 [M, K], b int8 [N, K], scales float32, bias [N] -> [M, N].
    """
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@operator(reference.int8_linear_quantize, "gemm", differentiable=False)
def int8_linear_quantize(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_tiles` of `int8_linear`, so that the wide values never reach memory; scales per tile only."""
    rows, columns = a.shape[0], b.shape[0]
    return a.new_empty((rows, columns)), a.new_empty((tiles(rows), tiles(columns)), dtype=torch.float32)


@operator(reference.int8_linear_add_, "gemm", mutates=("x",), differentiable=False)
def int8_linear_add_(
    x: Tensor, gate: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`x += gate * (a @ b.T + bias)`: x [B, L, N] overwritten and returned, gate [B, 1, N], a [B * L, K]."""
    return x
