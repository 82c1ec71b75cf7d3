"""INT8 quantisation: tiles of 128 x 128, as TurboDiffusion's `quant_linear` files and activations use it, or rows."""

import torch
from torch import Tensor

from turbodiff_kernels import backend
from turbodiff_kernels.quant.reference import TILE, dequantize_tiles, tiles

__all__ = ["TILE", "dequantize_tiles", "quantize_tiles", "quantize_tokens", "tiles"]


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, K] and scale float32 [ceil(M / 128), ceil(K / 128)] with `x ~ int8 * scale`."""
    return _quantize_tiles(x)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, K] and scale float32 [M]: rows of activations, or of weights for the fast product."""
    return _quantize_tokens(x)


@backend.operator("quantize_tiles")
def _quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    return backend.choose("quant", x.device).quantize_tiles(x)


@backend.fake("quantize_tiles")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return x.new_empty((rows, columns), dtype=torch.int8), x.new_empty(
        (tiles(rows), tiles(columns)), dtype=torch.float32
    )


@backend.operator("quantize_tokens")
def _quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    return backend.choose("quant", x.device).quantize_tokens(x)


@backend.fake("quantize_tokens")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
