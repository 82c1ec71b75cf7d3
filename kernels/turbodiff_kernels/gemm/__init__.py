"""Products of two INT8 matrices, with what a Wan block does next.

The shape of the scales says the mode. Two-dimensional: one per tile of 128 x 128, exactly as TurboDiffusion's files.
One-dimensional: one per token and one per channel, the fast mode (`quantize_tokens` of activations and of weights).
"""

import torch
from torch import Tensor

from turbodiff_kernels import backend
from turbodiff_kernels.quant.reference import tiles


def int8_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b.T` in `dtype`: a int8 [M, K], b int8 [N, K], scales float32 per 128 x 128 tile -> [M, N]."""
    return _int8_matmul(a, a_scale, b, b_scale, dtype)


def int8_linear(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> Tensor:
    """`a @ b.T + bias` and GELU (tanh) if `gelu`, rounded to `dtype` after each: one pass; either mode of scales."""
    return _int8_linear(a, a_scale, b, b_scale, bias, dtype, gelu)


def int8_linear_quantize(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """`quantize_tiles` of `int8_linear`, so that the wide values never reach memory; scales per tile only."""
    return _int8_linear_quantize(a, a_scale, b, b_scale, bias, dtype, gelu)


def int8_linear_add_(
    x: Tensor, gate: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`x += gate * (a @ b.T + bias)`: x [B, L, N] overwritten and returned, gate [B, 1, N], a [B * L, K]."""
    _int8_linear_add_(x, gate, a, a_scale, b, b_scale, bias)
    return x


@backend.operator("int8_matmul")
def _int8_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return backend.choose("gemm", a.device).int8_matmul(a, a_scale, b, b_scale, dtype)


@backend.fake("int8_matmul")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@backend.operator("int8_linear")
def _int8_linear(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool
) -> Tensor:
    return backend.choose("gemm", a.device).int8_linear(a, a_scale, b, b_scale, bias, dtype, gelu)


@backend.fake("int8_linear")
def _(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@backend.operator("int8_linear_quantize")
def _int8_linear_quantize(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool
) -> tuple[Tensor, Tensor]:
    return backend.choose("gemm", a.device).int8_linear_quantize(a, a_scale, b, b_scale, bias, dtype, gelu)


@backend.fake("int8_linear_quantize")
def _(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = a.shape[0], b.shape[0]
    return a.new_empty((rows, columns)), a.new_empty((tiles(rows), tiles(columns)), dtype=torch.float32)


@backend.operator("int8_linear_add_", mutates=("x",))
def _int8_linear_add_(
    x: Tensor, gate: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None
) -> None:
    backend.choose("gemm", a.device).int8_linear_add_(x, gate, a, a_scale, b, b_scale, bias)


@backend.fake("int8_linear_add_")
def _(x: Tensor, gate: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> None:
    return None
