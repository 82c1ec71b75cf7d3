"""Whether the VAE may compute in float16 on this card: bfloat16's bytes and speed with eight times its precision.

float16 ends at 65504, and whether a VAE stays below depends on its weights and on the card's libraries. So a short
clip is encoded and decoded in float32 and in float16, once per file, card, driver, torch and version of the kernels;
the verdict lies beside those of the kernels (turbodiff_kernels/backend.py). What no short clip tells is looked at in
each one: a chunk with a number that is none ends the phase, which begins again in bfloat16.
"""

import hashlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from turbodiff_kernels import backend

from turbodiff.models import vae as vae_driver
from turbodiff.models.vae import Vae
from turbodiff.runtime import offload

LEAST_DB = 50.0  # of the frames in float16 against those in float32; a bfloat16 VAE is near 40
# of the clip that is tried: its work fits beside float32 weights where a tile's does beside its own
SIDE, FRAMES = 128, 5
OVERFLOWED = "a number of a clip became infinite"

log = logging.getLogger("turbodiff.worker")


class NotFiniteError(Exception):
    """A number of a clip in float16 is none."""


def usable(key: str, device: torch.device, wide: Callable[[], Vae]) -> bool:
    """Whether the VAE of a file, named by `key`, is safe in float16 on a card; tried now where that is not known.

    wide: makes it in float32, in host memory.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        return not backend.checked(*_place(key, device), lambda: fault(wide(), device))
    except torch.OutOfMemoryError:  # nothing is known, and bfloat16 needs no trial
        return False


def forbid(key: str, device: torch.device) -> None:
    """Remember that float16 failed in a clip."""
    op, _, machine, file = _place(key, device)
    backend.keep_verdict(file, machine, op, OVERFLOWED)


def fault(vae: Vae, device: torch.device) -> str:
    """What is wrong with a float32 VAE's frames in float16 on a device, "" where nothing is; it is in float16 then."""
    video, frames = offload.to_device(moving_shapes(), device), list[Tensor]()
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        for dtype in (torch.float32, torch.float16):
            with offload.on_device(vae.to(dtype), device):
                latents = vae_driver.encode(vae, video)
                frames.append(vae_driver.decode(vae, latents).float().clamp_(-1, 1))
    exact, half = frames
    if not half.isfinite().all():
        return "its frames are not finite"
    decibels = 10 * (4 / (exact - half).double().square().mean().clamp_min(1e-12)).log10().item()
    log.info("the VAE in float16 is within %.1f dB of float32", decibels)
    return "" if decibels >= LEAST_DB else f"its frames are within {decibels:.1f} dB only"


def moving_shapes() -> Tensor:
    """A short clip with edges, gradients and all colours, float32 [1, 3, FRAMES, SIDE, SIDE] in [-1, 1]."""
    time, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (FRAMES, SIDE, SIDE)), indexing="ij")
    disc = ((x - 0.3 - 0.3 * time).square() + (y - 0.5).square() < 0.05).float()
    stripes = (8 * torch.pi * (x + time) * y).sin()
    return torch.stack((2 * disc - 1, (1 - disc) * stripes, 2 * y - 1)).clamp(-1, 1)[None]


def _place(key: str, device: torch.device) -> tuple[str, torch.device, str, Path]:
    op = f"vae float16 {hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return op, device, backend.machine_of(device), backend.verdicts_file()
