"""Rotary position of a token in a video: its head channels are shared between time, height and width."""

import torch
from torch import Tensor

THETA = 10000.0  # Wan2.1


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode (time, height, width): 128 -> (44, 42, 42), 64 -> (24, 20, 20) (Wan2.1)."""
    space = head_dim // 6 * 2
    return head_dim - 2 * space, space, space


def rope_tables(
    frames: int, height: int, width: int, head_dim: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for a grid of tokens, positions from 0, each float32 [frames * height * width, head_dim / 2].

    `frames`, `height`, `width` count tokens, not pixels. Angles are float32 as in TurboDiffusion.
    """
    grid = (frames, height, width)
    angles = []
    for axis, channels in enumerate(rope_split(head_dim)):
        frequencies = THETA ** -(torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
        along = torch.outer(torch.arange(grid[axis], dtype=torch.float32, device=device), frequencies)
        shape = [size if i == axis else 1 for i, size in enumerate(grid)]
        angles.append(along.view(*shape, -1).expand(*grid, -1))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos(), table.sin()
