"""A direct rCM sampler for the trainer's own checks; the product has its own (turbodiff.sampling)."""

import itertools
import math

import torch
from torch import Tensor

from scripts.train_demo.vae import WanVAE
from turbodiff.models.wan_dit import WanDiT


def times(steps: int, sigma_max: float = 80.0) -> list[float]:
    """Rectified-flow times of TurboDiffusion's schedule, ending in 0."""
    angles = [math.atan(sigma_max), 1.5, 1.4, 1.0][:steps]
    return [math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles] + [0.0]


@torch.no_grad()
def sample(
    model: WanDiT, rows: Tensor, bias: Tensor, steps: int, seeds: list[int], shape: tuple[int, ...] = (16, 5, 16, 16)
) -> Tensor:
    """Latents float32 [B, 16, T, h, w] for text rows [B, L, DIM]; SDE; one seed per clip."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).double()

    schedule = times(steps)
    x = noise() * schedule[0]
    for t, following in itertools.pairwise(schedule):
        clock = torch.full((len(x), 1), t * 1000)
        velocity = model(x.to(model.dtype), clock, rows.to(model.dtype), context_bias=bias)
        x0 = x - t * velocity.double()
        x = (1 - following) * x0 + following * noise()
    return x.float()


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Standardised latents [B, 16, T, h, w] -> uint8 clips [B, F, H, W, 3]."""
    with torch.autocast("cpu", torch.bfloat16):
        video = torch.cat([vae.decode(z.transpose(0, 1)[None].bfloat16()).float() for z in latents])
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2)
