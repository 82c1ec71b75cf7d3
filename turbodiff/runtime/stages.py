"""Text, picture and frames: the phases around the denoiser, one function each."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from turbodiff.models import vae as vae_driver
from turbodiff.prompt.clean import clean
from turbodiff.prompt.tokens import token_weights
from turbodiff.prompt.weights import parse
from turbodiff.runtime import embeddings, residency
from turbodiff.runtime.embeddings import TextRows
from turbodiff.runtime.run import Run
from turbodiff.sampling.conditioning import image_condition, picture_video


@torch.inference_mode()
def encode_text(run: Run) -> TextRows:
    """The prompt as text rows [1, 512, dim] on the CPU; a prompt that was read before comes from the cache."""
    prompt = parse(clean(run.request.prompt))
    shelf, folder = run.shelf, run.job.state / "embeddings"
    key = embeddings.text_key(shelf.text_identity(), prompt.text)
    text = embeddings.load_rows(folder, key, shelf.spec.text_encoder.text_len)
    if text is None:
        with shelf.text_encoder(run.plan) as read:
            text = read(prompt.text)
        embeddings.keep_rows(folder, key, text)
    return embeddings.weigh(text, token_weights(shelf.tokenizer(), prompt))


@torch.inference_mode()
def encode_image(run: Run) -> Tensor:
    """The picture as the condition [1, 20, T, H, W], float32 on the CPU."""
    from turbodiff.media.images import fit_picture

    pixels = torch.from_numpy(np.array(fit_picture(run.request).pixels))
    picture = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
    with run.shelf.vae(run.plan) as vae:
        video = residency.to_device(picture_video(picture, run.request.num_frames), run.shelf.device.torch_device)
        latents = vae_driver.encode(vae, video, tile=tile_side(run))
    return image_condition(latents).float().cpu()


@torch.inference_mode()
def decode(run: Run, latents: Tensor) -> Iterator[np.ndarray]:
    """Latents [1, 16, T, H, W] -> chunks of frames uint8 [t, H, W, 3], in order."""
    with run.shelf.vae(run.plan) as vae:
        latents = residency.to_device(latents, run.shelf.device.torch_device)
        for chunk in vae_driver.decode_stream(vae, latents, tile=tile_side(run)):
            yield vae_driver.frames_to_uint8(chunk)[0].cpu().numpy()


def tile_side(run: Run) -> int | None:
    """Side of a VAE tile in latent pixels, None for the whole picture."""
    return TILE_SIDE if run.plan.levers.vae == "tiled" else None


TILE_SIDE = 32  # 256 pixels and a halo of 64 on each side: a fifth of the whole 480p decode's memory
