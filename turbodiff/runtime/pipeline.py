"""A clip, from the words to the file: every stage of it, in order.

words -> text rows -> (picture -> condition) -> latents, step by step -> frames, chunk by chunk -> mp4 -> library
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from turbodiff.archive import clips
from turbodiff.media.fingerprints import Bytes
from turbodiff.media.joining import check_format, joined, tail_of
from turbodiff.media.pictures import fit_picture
from turbodiff.media.verify import QualityWarning, verify_clip
from turbodiff.media.video import ClipWriter, Written
from turbodiff.models import vae as vae_driver
from turbodiff.models.image_encoder import picture_features
from turbodiff.models.linear import int8_mode
from turbodiff.prompt.tokens import token_weights
from turbodiff.prompt.weights import clean, parse
from turbodiff.runtime import offload
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.denoise import denoise
from turbodiff.runtime.device import installed
from turbodiff.runtime.latents_cache import LatentsCache
from turbodiff.runtime.replan import outside_bytes
from turbodiff.runtime.text import TextCache, TextRows
from turbodiff.sampling.conditioning import image_condition, picture_video
from turbodiff.spec.clips import SIDECAR_VERSION, ClipResult, Predicted, Ran, Sidecar
from turbodiff.spec.errors import FileError
from turbodiff.spec.events import NoticeEvent, PlanEvent
from turbodiff.spec.request import Request

LIBRARIES = ("turbodiff", "torch", "triton", "diffusers", "transformers")


def generate(attempt: Attempt) -> ClipResult:
    """Make the clip of an attempt and put it into the library.

    Raises:
        TurbodiffError: what a person should read; nothing half-done is left behind.
        WaitForMemory: somebody else took the memory meanwhile; nothing half-done is left but latents.
    """
    attempt.send(PlanEvent(plan=attempt.told))
    if attempt.request.continues:
        check_format(attempt.request)
    attempt.models.open(attempt.request, on_disk=attempt.plan.levers.converted == "on_disk")
    attempt.models.make_room(attempt.plan)
    saved = LatentsCache(attempt.state, attempt.id)
    latents = saved.load(attempt.request)
    try:
        if latents is None:
            latents = make_latents(attempt)
            saved.save(latents, attempt.plan)
        else:
            text = "the latents of an earlier attempt are decoded"
            attempt.send(NoticeEvent(key="latents_resumed", text=text, numbers={}))
        clip, sidecar = write_clip(attempt, latents)
    finally:  # the cards that shared the clip are others' again once anybody hears of its end
        attempt.close_ranks()
    saved.delete()
    return sidecar.model_copy(update={"measured": attempt.measured()}).result(clip)


def make_latents(attempt: Attempt) -> Tensor:
    """Words, and a picture where there is one, to latents [1, 16, T, H, W]."""
    text, negative = attempt.run_phase("text_encode", lambda: encode_text(attempt))
    condition = features = None
    if attempt.request.spec.image_encoder:
        features = attempt.run_phase("image_embed", lambda: embed_image(attempt))
    if attempt.request.kind == "i2v":
        condition = attempt.run_phase("image_encode", lambda: attempt.share(lambda: encode_image(attempt)))
    return attempt.share(lambda: denoise(attempt, text, condition, negative, features))


@torch.inference_mode()
def encode_text(attempt: Attempt) -> tuple[TextRows, TextRows | None]:
    """Prompt, and under guidance the negative prompt ("" included), as rows [1, 512, dim] on the CPU.

    A text that was read before comes from the cache; the encoder is loaded only where one was not. Words of a negative
    prompt weigh as those of a prompt do.
    """
    request, models = attempt.request, attempt.models
    texts = (request.prompt, request.negative_prompt) if request.guided else (request.prompt,)
    prompts = [parse(clean(text)) for text in texts]
    cache = TextCache(attempt.state / "embeddings", models.encoder_key(attempt.plan), models.spec.text_encoder.text_len)
    kept = {prompt.text: cache.load(prompt.text) for prompt in prompts}
    rows = {text: found for text, found in kept.items() if found is not None}
    if len(rows) < len(kept):
        with models.text_encoder(attempt.plan) as read:
            for text in [text for text in kept if text not in rows]:
                rows[text] = read(text)
                cache.save(text, rows[text])
    tokenizer = models.tokenizer()
    positive, *negative = [rows[prompt.text].weighted(token_weights(tokenizer, prompt)) for prompt in prompts]
    return positive, negative[0] if negative else None


def start_picture(request: Request) -> Tensor:
    """The picture as the clip's first frame shows it, float32 [1, 3, H, W] in [-1, 1]; the last frame of the clip that
    is continued."""
    if request.continues:
        pixels = tail_of(Path(request.continues)).last
    else:
        pixels = fit_picture(Path(request.image), request.width, request.height, request.fit).pixels
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.inference_mode()
def embed_image(attempt: Attempt) -> Tensor:
    """Features of the picture [1, tokens, dim] that the blocks attend to, on the CPU."""
    models, facts = attempt.models, attempt.request.spec.image_encoder
    assert facts is not None
    with models.on_device("image_encoder", attempt.plan) as encoder:
        picture = offload.to_device(start_picture(attempt.request), models.device.torch_device)
        return picture_features(encoder, picture, facts).cpu()


@torch.inference_mode()
def encode_image(attempt: Attempt) -> Tensor:
    """The picture as the condition [1, 20, T, H, W], float32 on the CPU."""
    device, request, ranks, plan = attempt.models.device, attempt.request, attempt.ranks, attempt.plan
    with attempt.models.on_device("vae", plan) as vae:
        picture = start_picture(request).to(device.dtype)  # as the encoder takes it: half the bytes move
        if ranks is not None:
            ranks.tell("encode", [picture], plan=plan.model_dump(mode="json"))
        video = offload.to_device(picture_video(picture, request.num_frames), device.torch_device)
        encode = partial(vae_driver.encode, vae, video, tile=plan.levers.tile)
        latents = encode() if ranks is None else ranks.alongside(partial(encode, parallel=ranks.parallel))
    return image_condition(latents).float().cpu()


@torch.inference_mode()
def decode(attempt: Attempt, latents: Tensor) -> Iterator[Bytes]:
    """Latents [1, 16, T, H, W] -> chunks of frames uint8 [t, H, W, 3], in order."""
    with attempt.models.on_device("vae", attempt.plan) as vae:
        latents = offload.to_device(latents, attempt.models.device.torch_device)
        ranks, width, columns = attempt.ranks, latents.shape[-1], None
        if ranks is not None:
            ranks.tell("decode", [latents], plan=attempt.plan.model_dump(mode="json"))
            columns = ranks.parallel.columns(width)
        for chunk in vae_driver.decode_stream(vae, latents, tile=attempt.plan.levers.tile, columns=columns):
            frames = vae_driver.frames_to_uint8(chunk)
            if ranks is not None:
                frames = ranks.alongside(partial(ranks.parallel.collect_frames, frames, width))
            yield frames[0].cpu().numpy()


def decode_to(partial: Path, attempt: Attempt, latents: Tensor) -> Written:
    """Latents to the frames of a file, behind those of the clip that they continue; nothing is left of a failure."""
    request, frames, count = attempt.request, decode(attempt, latents), attempt.request.num_frames
    if request.continues:
        before = Path(request.continues)
        frames, count = joined(before, frames), count + tail_of(before).frames - 1
    told = attempt.told
    recipe = {"request": told.request.model_dump(mode="json"), "plan": told.model_dump(mode="json")}
    tags = {"turbodiff": installed("turbodiff"), "job": attempt.id, **recipe}
    writer = ClipWriter(partial, request.width, request.height, request.fps, tags, num_frames=count)
    with writer:
        for chunk in frames:
            attempt.check_cancelled()
            writer.write(chunk)
    assert writer.written is not None
    return writer.written


def write_clip(attempt: Attempt, latents: Tensor) -> tuple[Path, Sidecar]:
    """Latents to a clip in the library; it gets its name only after every frame of the file was checked."""
    request, outputs, output = attempt.request, attempt.outputs, attempt.output
    partial = clips.partial_path(outputs, attempt.id, attempt.number, output)
    final = output or clips.clip_path(outputs, request.kind, request.seed or 0, request.model, attempt.created)
    written = attempt.run_phase("vae_decode", lambda: attempt.share(lambda: decode_to(partial, attempt, latents)))
    try:
        with attempt.phase("write"):
            start = None  # the picture that the first frame should look like
            if request.image:
                with contextlib.suppress(FileError):  # it may be gone by now
                    start = fit_picture(Path(request.image), request.width, request.height, request.fit).pixels
            warnings = verify_clip(written, start, request.prompt)
            attempt.outside_bytes = outside_bytes(attempt.models.device)
            sidecar = sidecar_of(attempt, written, warnings)
            poster = b"" if output else written.poster
            path = clips.publish(partial, final, sidecar, poster, replace=output is not None)
    finally:
        partial.unlink(missing_ok=True)
    return path, sidecar


def sidecar_of(attempt: Attempt, written: Written, warnings: tuple[QualityWarning, ...]) -> Sidecar:
    """The sidecar of a verified clip. `ran` is what really ran, which a wish or a fall-back may have changed."""
    plan, models = attempt.told, attempt.models
    request, attention = plan.request, attempt.attention()
    how = {"attention": attention.kind, "backend": attention.backend, "quant_linear": request.quant_linear}
    weights = {component: Path(file.path).name for component, file in models.files.items()}
    how |= {"int8": int8_mode()} if request.quant_linear == "on" else {}
    return Sidecar(
        v=SIDECAR_VERSION,
        created=attempt.created,
        job=attempt.id,
        attempt=attempt.number,
        request=request,
        plan=plan,
        ran=Ran.model_validate({**how, **models.device.facts(), "encoder": written.encoder, "weights": weights}),
        versions={name: installed(name) for name in LIBRARIES},
        sha256=written.sha256,
        frames=written.frames,
        width=request.width,
        height=request.height,
        fps=request.fps,
        warnings=warnings,
        predicted=Predicted(peak_bytes=plan.peak_bytes, seconds=plan.seconds),
        measured=attempt.measured(),
    )
