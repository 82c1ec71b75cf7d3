"""The small decoder of TAEHV for Wan2.1 latents (taew2_1, lighttaew2_1): a look at a clip, not its frames.

Known by its published keys: a row `decoder.0` to `.22` of 2-D convolutions, in which each block of three also sees the
frame before, and each of three stages doubles height and width; two of them double the frames (MIT,
github.com/madebyollin/taehv; widths 256, 128, 64, 64). It takes normalised latents as they are and makes colours in
[0, 1]; of a first latent frame only the last of its four frames is one of the clip.
"""

from typing import cast

import torch
from torch import Tensor, nn

from turbodiff.spec.shapes import LATENT_CHANNELS, TINY_VAE_WIDTHS


class TinyDecoder(nn.Module):
    """Normalised latents [1, 16, h, w] -> one frame [1, 3, 1, 8h, 8w] in about [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        wide, *narrower = TINY_VAE_WIDTHS
        layers: list[nn.Module] = [Squash(), nn.Conv2d(LATENT_CHANNELS, wide, 3, padding=1), nn.ReLU()]
        for stage, width in enumerate(narrower):
            layers += [MemoryBlock(wide) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), MoreFrames(wide, 2 if stage else 1)]
            layers.append(nn.Conv2d(wide, width, 3, padding=1, bias=False))
            wide = width
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(wide, 3, 3, padding=1))

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """The last of the four frames that a first latent frame makes."""
        frames = cast(Tensor, self.decoder(latents))
        return frames[-1:, :, None] * 2 - 1


class Squash(nn.Module):
    """`3 tanh(x / 3)`: no latent is beyond 3."""

    def forward(self, x: Tensor) -> Tensor:
        """In any shape."""
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Three convolutions over a frame beside the one before it (zeros before the first), and the frame itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (2 * width, width, width)
        convs = [layer for size in sizes for layer in (nn.Conv2d(size, width, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*convs[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Frames [t, width, h, w]."""
        before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        return torch.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class MoreFrames(nn.Module):
    """Each frame becomes `times` frames, one after the other."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Frames [t, width, h, w] -> [t * times, width, h, w]."""
        return cast(Tensor, self.conv(x)).reshape(-1, *x.shape[1:])
