"""Tile quantisation in plain PyTorch (TurboDiffusion's quantiser for weights and activations)."""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
SMALLEST_AMAX = 1e-8  # an all-zero tile gets the scale 1e-8 / 128


def tiles(size: int) -> int:
    """Tiles that cover `size` rows or columns."""
    return -(-size // TILE)


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """scale = max|tile| / 128; int8 = x * (128 / max|tile|), half to even, so that +max saturates at 127."""
    rows, columns = x.shape
    grid = F.pad(x.float(), (0, tiles(columns) * TILE - columns, 0, tiles(rows) * TILE - rows))
    grid = grid.view(tiles(rows), TILE, tiles(columns), TILE)
    amax = grid.abs().amax(dim=(1, 3), keepdim=True).clamp_min(SMALLEST_AMAX)
    rounded = (grid * (TILE / amax)).round_().clamp_(-128, 127).to(torch.int8)
    return rounded.flatten(0, 1).flatten(1)[:rows, :columns].contiguous(), (amax / TILE)[:, 0, :, 0].contiguous()


def dequantize_tiles(x: Tensor, scale: Tensor) -> Tensor:
    """int8 [M, K] and scale [ceil(M / 128), ceil(K / 128)] -> float32 [M, K]."""
    by_column = scale.repeat_interleave(TILE, dim=1)[:, : x.shape[1]]
    result = x.float()
    for i, part in enumerate(result.split(TILE)):
        part.mul_(by_column[i])
    return result


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> int8 [M, K], scale float32 [M] = max|row| / 127; half to even."""
    amax = x.float().abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_AMAX)
    return (x.float() * (127 / amax)).round_().to(torch.int8), (amax / 127)[:, 0]
