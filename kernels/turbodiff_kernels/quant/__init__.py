"""INT8 quantisation: tiles of 128 x 128, as TurboDiffusion's `quant_linear` files and activations use it, or rows."""

import torch
from torch import Tensor

from turbodiff_kernels.backend import operator
from turbodiff_kernels.quant import reference
from turbodiff_kernels.quant.reference import TILE, dequantize_tiles, tiles

__all__ = ["TILE", "dequantize_tiles", "quantize_tiles", "quantize_tokens", "quantize_tokens_into_", "tiles"]


@operator(reference.quantize_tiles, "quant", differentiable=False)
def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, K] and scale float32 [ceil(M / 128), ceil(K / 128)] with `x ~ int8 * scale`."""
    grid = (tiles(x.shape[0]), tiles(x.shape[1]))
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(grid, dtype=torch.float32)


@operator(reference.quantize_tokens, "quant", differentiable=False)
def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, K] and scale float32 [M]: rows of activations, or of weights for the fast product."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


@operator(reference.quantize_tokens_into_, "quant", mutates=("values", "scale"), differentiable=False)
def quantize_tokens_into_(values: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """The same into rows of what exists, int8 [M, K] and float32 [M], both contiguous; returns the values."""
    return values
