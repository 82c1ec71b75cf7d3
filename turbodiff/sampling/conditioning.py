"""What a clip starts from: the noise of its seed, and for image to video what the network is told about the picture."""

import torch
from torch import Tensor

from turbodiff.spec.shapes import CONDITION_CHANNELS, LATENT_CHANNELS


def picture_video(image: Tensor, num_frames: int) -> Tensor:
    """Picture [B, 3, H, W] in [-1, 1] -> video [B, 3, num_frames, H, W]: the picture, then mid-grey frames of zeros."""
    video = image.new_zeros(*image.shape[:2], num_frames, *image.shape[2:])
    video[:, :, 0] = image
    return video


def image_condition(picture_latents: Tensor) -> Tensor:
    """Latents [B, 16, T, H, W] of `picture_video` -> condition [B, 20, T, H, W] (Wan2.2).

    The first four channels are a mask: one on the latent frame that is given, zero on those to be made.
    """
    b, c, *grid = picture_latents.shape
    assert c == LATENT_CHANNELS, picture_latents.shape
    mask = picture_latents.new_zeros(b, CONDITION_CHANNELS - LATENT_CHANNELS, *grid)
    mask[:, :, 0] = 1
    return torch.cat((mask, picture_latents), dim=1)


class Noise:
    """A seeded stream of float32 normal draws of one shape.

    On the CPU, the default, a seed means the same picture on every machine. With `device="cuda"` the stream is
    TurboDiffusion's own, which depends on the GPU; the draws then lie on that device.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self) -> Tensor:
        """The next draw, float32 of the shape, on the stream's device."""
        generator = self._generator
        return torch.randn(self.shape, generator=generator, dtype=torch.float32, device=generator.device)
