"""A look at the clip while it is being made: the middle of the clean estimate, decoded as one small frame."""

import base64
import io

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from turbodiff.models import vae as vae_driver
from turbodiff.runtime.attempt import Attempt
from turbodiff.spec.events import PreviewEvent

MAX_SIDE = 32  # latent pixels: 256 pixels on screen, and too little memory to matter beside the denoiser
JPEG_QUALITY = 70


def show(attempt: Attempt, clean: Tensor, step: int) -> None:
    """Send a preview of the clean estimate [1, 16, T, H, W] after a step; none where the VAE is not at hand."""
    vae = attempt.models.preview_vae()
    if vae is None:
        return
    middle = clean[:, :, clean.shape[2] // 2].float()
    scale = min(1.0, MAX_SIDE / max(middle.shape[-2:]))
    if scale < 1:
        middle = F.interpolate(middle, scale_factor=scale, mode="area")
    frames = vae_driver.frames_to_uint8(next(vae_driver.decode_stream(vae, middle[:, :, None])))
    file = io.BytesIO()
    Image.fromarray(frames[0, 0].cpu().numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
    attempt.send(PreviewEvent(i=step, jpeg=base64.b64encode(file.getvalue()).decode()))
