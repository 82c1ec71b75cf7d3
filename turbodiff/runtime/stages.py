"""Text, picture and frames: the phases around the denoiser, one function each."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from turbodiff.models import vae as vae_driver
from turbodiff.prompt.tokens import token_weights
from turbodiff.prompt.weights import clean, parse
from turbodiff.runtime import embeddings, offload
from turbodiff.runtime.attempt import Run
from turbodiff.runtime.embeddings import TextRows
from turbodiff.sampling.conditioning import image_condition, picture_video
from turbodiff.spec.request import Request
from turbodiff.spec.shapes import VAE_TILE


@torch.inference_mode()
def encode_text(run: Run) -> tuple[TextRows, TextRows | None]:
    """Prompt, and under guidance the negative prompt, as rows [1, 512, dim] on the CPU.

    A text that was read before comes from the cache. Words of a negative prompt weigh as those of a prompt do.
    """
    prompts = [parse(clean(text)) for text in texts_of(run.request)]
    rows = _rows_of(run, [prompt.text for prompt in prompts])
    tokenizer = run.shelf.tokenizer()
    text, *negative = [embeddings.weigh(rows[prompt.text], token_weights(tokenizer, prompt)) for prompt in prompts]
    return text, negative[0] if negative else None


def _rows_of(run: Run, texts: Sequence[str]) -> dict[str, TextRows]:
    """The rows of clean texts, from the cache where they are; the encoder is loaded only where some are not."""
    shelf, folder = run.shelf, run.job.state / "embeddings"
    keys = {text: embeddings.text_key(shelf.text_identity(run.plan), text) for text in texts}
    kept = {text: embeddings.load_rows(folder, key, shelf.spec.text_encoder.text_len) for text, key in keys.items()}
    rows = {text: found for text, found in kept.items() if found is not None}
    unread = [text for text in keys if text not in rows]
    if unread:
        with shelf.text_encoder(run.plan) as read:
            for text in unread:
                rows[text] = read(text)
                embeddings.keep_rows(folder, keys[text], rows[text])
    return rows


def texts_of(request: Request) -> list[str]:
    """The texts that a request needs read: its prompt, and with UniPC's guidance the negative one, "" included."""
    guided = request.sampler == "unipc" and request.guidance > 1
    return [request.prompt, request.negative_prompt] if guided else [request.prompt]


@torch.inference_mode()
def encode_image(run: Run) -> Tensor:
    """The picture as the condition [1, 20, T, H, W], float32 on the CPU."""
    from turbodiff.media.pictures import fit_picture

    pixels = torch.from_numpy(np.array(fit_picture(run.request).pixels))
    picture = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
    with run.shelf.vae(run.plan) as vae:
        picture = picture.to(run.shelf.device.dtype)  # as the encoder takes it: half the bytes move
        video = picture_video(picture, run.request.num_frames)
        video = offload.to_device(video, run.shelf.device.torch_device)
        latents = vae_driver.encode(vae, video, tile=tile_side(run))
    return image_condition(latents).float().cpu()


@torch.inference_mode()
def decode(run: Run, latents: Tensor) -> Iterator[np.ndarray]:
    """Latents [1, 16, T, H, W] -> chunks of frames uint8 [t, H, W, 3], in order."""
    with run.shelf.vae(run.plan) as vae:
        latents = offload.to_device(latents, run.shelf.device.torch_device)
        for chunk in vae_driver.decode_stream(vae, latents, tile=tile_side(run)):
            yield vae_driver.frames_to_uint8(chunk)[0].cpu().numpy()


def tile_side(run: Run) -> int | None:
    """Side of a VAE tile in latent pixels, None for the whole picture."""
    return VAE_TILE if run.plan.levers.vae == "tiled" else None
