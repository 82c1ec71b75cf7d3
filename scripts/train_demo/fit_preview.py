"""Fits the preview's linear map from latents to colours (turbodiff/runtime/preview.py) to the demo's own VAE.

    python -m scripts.train_demo.fit_preview

prints the 16 rows and the bias, and the correlation per colour with frames that the fit did not see.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.train_demo.captions import held_out_captions
from scripts.train_demo.render import random_clip
from turbodiff.models import vae as vae_driver
from turbodiff.spec.models import find_model
from turbodiff.weights.load import load_into
from turbodiff.weights.locate import bundled_root

CLIPS, FITTED_SHARE = 48, 0.75


@torch.inference_mode()
def samples(clips: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents [n, 16] of held-out clips and the mean colours [n, 3] in [-1, 1] that the VAE decodes them to.

    Of the four frames of a latent the third is taken.
    """
    with torch.device("meta"):
        module = vae_driver.make_vae(**find_model("demo").vae.model_dump())
    vae = load_into(module, bundled_root() / "vae.safetensors", dtype=torch.float32, component="vae").module
    captions, random = held_out_captions(), np.random.default_rng(seed)
    latents, colours = [], []
    for index in range(clips):
        clip = torch.from_numpy(random_clip(captions[index % len(captions)], random).copy())
        encoded = vae_driver.encode(vae, clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
        for t, chunk in enumerate(vae_driver.decode_stream(vae, encoded)):
            frame = F.interpolate(chunk[:, :, min(2, chunk.shape[2] - 1)], size=encoded.shape[-2:], mode="area")
            latents.append(encoded[0, :, t].flatten(1).T)
            colours.append(frame[0].flatten(1).T)
    return torch.cat(latents).double(), torch.cat(colours).double()


def main() -> None:
    """Fit by least squares, print the map and how well it does on the rest."""
    latents, colours = samples(CLIPS)
    given = torch.cat([latents, torch.ones(len(latents), 1, dtype=latents.dtype)], dim=1)
    fitted = int(FITTED_SHARE * len(given))
    rows = torch.linalg.lstsq(given[:fitted], colours[:fitted]).solution
    for row in rows.tolist():
        print("(" + ", ".join(f"{number:.3f}" for number in row) + "),")
    for name, guess, colour in zip("RGB", (given[fitted:] @ rows).T, colours[fitted:].T, strict=True):
        print(name, f"{torch.corrcoef(torch.stack([guess, colour]))[0, 1]:.3f}")


if __name__ == "__main__":
    main()
