"""Tile quantisation in plain PyTorch (TurboDiffusion's quantiser for weights and activations)."""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
SMALLEST_AMAX = 1e-8  # an all-zero tile gets the scale 1e-8 / 128
PART_ELEMENTS = 1 << 23  # of the float32 copies that a reference makes at a time: 32 MiB each


def tiles(size: int) -> int:
    """Tiles that cover `size` rows or columns."""
    return -(-size // TILE)


def part_rows(width: int, elements: int | None = None) -> int:
    """Rows of so many elements that a reference works on at a time, in whole tiles; of PART_ELEMENTS or as given.

    Every row (or tile) is computed alone, so parts change no number; all at once would take up to 15 times the memory.
    """
    return max(1, (PART_ELEMENTS if elements is None else elements) // width // TILE) * TILE


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """scale = max|tile| / 128; int8 = x * (128 / max|tile|), half to even, so that +max saturates at 127."""
    size = part_rows(x.shape[1])
    values = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((tiles(x.shape[0]), tiles(x.shape[1])), dtype=torch.float32)
    for part, into, scales in zip(x.split(size), values.split(size), scale.split(size // TILE), strict=True):
        rounded, step = _quantize_tiles(part)
        into.copy_(rounded)
        scales.copy_(step)
    return values, scale


def _quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_tiles` of all of x at once."""
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
    values, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
    return quantize_tokens_into_(values, scale, x), scale


def quantize_tokens_into_(values: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """The same into `values` and `scale`."""
    size = part_rows(x.shape[1])
    for part, into, scales in zip(x.split(size), values.split(size), scale.split(size), strict=True):
        amax = part.float().abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_AMAX)
        into.copy_((part.float() * (127 / amax)).round_())
        scales.copy_((amax / 127)[:, 0])
    return values
