"""Image to video: what the network is told about the picture (Wan2.2)."""

import torch
from torch import Tensor

from turbodiff.spec.shapes import CONDITION_CHANNELS, LATENT_CHANNELS


def picture_video(image: Tensor, num_frames: int) -> Tensor:
    """Picture [B, 3, H, W] in [-1, 1] -> video [B, 3, num_frames, H, W]: the picture, then mid-grey frames of zeros."""
    video = image.new_zeros(*image.shape[:2], num_frames, *image.shape[2:])
    video[:, :, 0] = image
    return video


def image_condition(picture_latents: Tensor) -> Tensor:
    """Latents [B, 16, T, H, W] of `picture_video` -> condition [B, 20, T, H, W].

    The first four channels are a mask: one on the latent frame that is given, zero on those to be made.
    """
    b, c, *grid = picture_latents.shape
    assert c == LATENT_CHANNELS, picture_latents.shape
    mask = picture_latents.new_zeros(b, CONDITION_CHANNELS - LATENT_CHANNELS, *grid)
    mask[:, :, 0] = 1
    return torch.cat((mask, picture_latents), dim=1)
