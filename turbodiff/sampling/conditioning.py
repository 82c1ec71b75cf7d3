"""What a clip starts from: the noise of its seed, and for image to video what the network is told about the picture."""

import torch
from torch import Tensor

from turbodiff.spec.shapes import CONDITION_CHANNELS, LATENT_CHANNELS


def picture_video(image: Tensor, num_frames: int, last: Tensor | None = None) -> Tensor:
    """Picture [B, 3, H, W] in [-1, 1] -> video [B, 3, num_frames, H, W]: the picture, then mid-grey frames of zeros,
    and at the end the picture `last`, if there is one."""
    video = image.new_zeros(*image.shape[:2], num_frames, *image.shape[2:])
    video[:, :, 0] = image
    if last is not None:
        video[:, :, -1] = last
    return video


def image_condition(picture_latents: Tensor, *, last: bool = False) -> Tensor:
    """Latents [B, 16, T, H, W] of `picture_video` -> condition [B, 20, T, H, W] (Wan2.2).

    The first four channels are a mask: one on frames that are given, zero on those to be made. They are the four frames
    of a latent frame; the first latent frame is one frame, which counts for all four. So an end picture (`last`) is the
    last channel of the last latent frame, as in Wan's first-last-frame models.
    """
    b, c, *grid = picture_latents.shape
    assert c == LATENT_CHANNELS, picture_latents.shape
    mask = picture_latents.new_zeros(b, CONDITION_CHANNELS - LATENT_CHANNELS, *grid)
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
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
