"""A look at the clip while it is being made: the middle of the clean estimate as one small JPEG.

A small VAE decodes it in host memory where one is on this disk (LightVAE, TAEHV), on a CPU the VAE itself: nothing of a
card. Elsewhere a linear map projects the 16 channels of a latent to one colour: no weights, less than 8 MiB of the
device.
"""

import base64
import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from turbodiff.models import vae as vae_driver
from turbodiff.models.tiny_vae import TinyDecoder
from turbodiff.runtime.attempt import Attempt
from turbodiff.spec.events import PreviewEvent
from turbodiff.spec.models import ModelSpec

DECODED_SIDE, PROJECTED_SIDE = 32, 128  # most latent pixels of the longer side that are decoded, or projected
PICTURE_SIDE = 256  # pixels
QUALITIES = (70, 50, 30, 15)  # of the JPEG: the first that keeps the event's line below 16 KiB
JPEG_BYTES = 11 << 10  # a third more as base64


# (rows, bias): the colour in [-1, 1] of a normalised latent z [16] is `z @ rows + bias`
# the 16-channel VAE of Wan2.1 and Wan2.2 A14B: ComfyUI, comfy/latent_formats.py, Wan21.latent_rgb_factors and _bias
WAN = (
    (
        (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
        (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
        (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
        (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
    ),
    (-0.1835, -0.0868, -0.3360),
)  # fmt: skip
# the demo's own VAE: scripts/train_demo/fit_preview.py; correlation with unseen frames 0.95 R, 0.97 G, 0.95 B
DEMO = (
    (
        (-0.083, -0.085, -0.039), (-0.093, -0.007, -0.013), (0.150, 0.079, 0.020), (-0.163, -0.198, -0.185),
        (-0.046, -0.031, -0.082), (-0.028, -0.044, -0.019), (0.357, 0.203, 0.020), (-0.132, -0.138, -0.139),
        (-0.004, 0.030, 0.066), (0.205, 0.085, 0.093), (-0.318, -0.403, -0.153), (0.167, 0.323, 0.254),
        (0.028, -0.026, -0.018), (0.119, 0.128, 0.126), (0.146, -0.006, -0.037), (-0.394, -0.331, -0.477),
    ),
    (-0.410, -0.485, -0.440),
)  # fmt: skip


def show(attempt: Attempt, clean: Tensor, step: int) -> None:
    """Report a preview of the clean estimate [1, 16, T, H, W] after a step."""
    vae = attempt.models.preview_vae()
    side = PROJECTED_SIDE if vae is None else DECODED_SIDE
    middle = clean[:, :, clean.shape[2] // 2].float()
    if max(middle.shape[-2:]) > side:
        middle = F.interpolate(middle, scale_factor=side / max(middle.shape[-2:]), mode="area")
    if vae is None:
        frames = project(middle, attempt.models.spec)
    elif isinstance(vae, TinyDecoder):
        frames = vae(middle.cpu())
    else:
        frames = next(vae_driver.decode_stream(vae, middle[:, :, None].cpu()))
    picture = Image.fromarray(vae_driver.frames_to_uint8(frames)[0, 0].cpu().numpy())
    scale = PICTURE_SIDE / max(picture.size) if vae is None else 1
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    for quality in QUALITIES:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if file.tell() <= JPEG_BYTES:
            break
    attempt.send(PreviewEvent(i=step, jpeg=base64.b64encode(file.getvalue()).decode()))


def project(latents: Tensor, spec: ModelSpec) -> Tensor:
    """Normalised latents [1, 16, H, W] -> one frame [1, 3, 1, H, W], about [-1, 1], on their device."""
    rows, bias = (torch.tensor(numbers, device=latents.device) for numbers in (DEMO if spec.bundled else WAN))
    return (torch.einsum("bchw,cr->brhw", latents, rows) + bias[:, None, None])[:, :, None]
