"""A look at the clip while it is being made: the middle of the x0 estimate, decoded as one small frame."""

import base64
import io
from typing import TYPE_CHECKING

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from turbodiff.models import vae as vae_driver
from turbodiff.runtime import offload
from turbodiff.runtime.attempt import Run
from turbodiff.spec.events import PreviewEvent

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

MAX_SIDE = 32  # latent pixels: 256 pixels on screen, and too little memory to matter beside the denoiser
JPEG_QUALITY = 70


def show(run: Run, clean: Tensor, step: int) -> None:
    """Send a preview of the clean estimate [1, 16, T, H, W] after a step; none where the VAE is not at hand."""
    vae = run.shelf.vae_at_hand()
    if vae is not None:
        frame = _frame(vae, offload.to_device(clean, run.shelf.device.torch_device))
        run.say(PreviewEvent(i=step, jpeg=_as_text(frame)))


def _frame(vae: "AutoencoderKLWan", clean: Tensor) -> Image.Image:
    middle = clean[:, :, clean.shape[2] // 2].float()
    scale = min(1.0, MAX_SIDE / max(middle.shape[-2:]))
    if scale < 1:
        middle = F.interpolate(middle, scale_factor=scale, mode="area")
    frames = vae_driver.frames_to_uint8(next(vae_driver.decode_stream(vae, middle[:, :, None])))
    return Image.fromarray(frames[0, 0].cpu().numpy())


def _as_text(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
