"""A clip, from the words to the file: every stage of it, in order.

words -> text rows -> (picture -> condition) -> latents, step by step -> frames, chunk by chunk -> mp4 -> library
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from turbodiff.archive import clips
from turbodiff.media.ffmpeg import NVENC, nvenc_fault
from turbodiff.media.fingerprints import Bytes
from turbodiff.media.finishing import RawFrames, frames_between
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
from turbodiff.runtime.attempt import Attempt, Result
from turbodiff.runtime.denoise import denoise
from turbodiff.runtime.device import installed
from turbodiff.runtime.finishing import finished
from turbodiff.runtime.grid import cell_done
from turbodiff.runtime.half_vae import NotFiniteError
from turbodiff.runtime.latents_cache import LatentsCache
from turbodiff.runtime.replan import outside_bytes
from turbodiff.runtime.text import TextCache, TextRows
from turbodiff.sampling.conditioning import image_condition, picture_video
from turbodiff.spec.clips import SIDECAR_VERSION, ClipResult, Predicted, Ran, Sidecar
from turbodiff.spec.errors import FileError
from turbodiff.spec.events import NoticeEvent, PlanEvent
from turbodiff.spec.plan import PhaseName
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
    attempt.check_kernels()
    attempt.models.open(attempt.request, on_disk=attempt.plan.levers.converted == "on_disk")
    attempt.models.make_room(attempt.plan)
    saved = LatentsCache(attempt.state, attempt.id)
    latents = saved.load(attempt.request)
    try:
        if latents is None:
            latents = make_latents(attempt)
            attempt.exchange = attempt.plan.levers.exchange
            saved.save(latents, attempt.plan)
        else:
            earlier = saved.load_plan(attempt.request)
            attempt.exchange = earlier.levers.exchange if earlier else "full"
            text = "the latents of an earlier attempt are decoded"
            attempt.send(NoticeEvent(key="latents_resumed", text=text, numbers={}))
        clip, sidecar = write_clip(attempt, latents)
    finally:  # the cards that shared the clip are others' again once anybody hears of its end
        attempt.close_ranks()
    saved.delete()
    cell_done(attempt, clip)
    return sidecar.model_copy(update={"measured": attempt.measured()}).result(clip)


def make_latents(attempt: Attempt) -> Tensor:
    """Words, and a picture where there is one, to latents [1, 16, T, H, W]."""
    text, negative = attempt.run_phase("text_encode", lambda: encode_text(attempt))
    condition = features = None
    if attempt.request.spec.image_encoder:
        features = attempt.run_phase("image_embed", lambda: embed_image(attempt))
    if attempt.request.kind == "i2v":
        condition = vae_phase(
            attempt, "image_encode", lambda: attempt.share("image_encode", lambda: encode_image(attempt))
        )
    return attempt.share("denoise", lambda: denoise(attempt, text, condition, negative, features))


def vae_phase(attempt: Attempt, name: PhaseName, work: Callable[[], Result]) -> Result:
    """A phase of the VAE; where float16 could not hold its numbers it begins again, from now on without."""
    try:
        return attempt.run_phase(name, work)
    except NotFiniteError:
        attempt.models.forbid_half_vae()
    return attempt.run_phase(name, work)  # only now: the traceback held tensors


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
        return as_tensor(tail_of(Path(request.continues)).last)
    return as_tensor(fit_picture(Path(request.image), request.width, request.height, request.fit).pixels)


def as_tensor(pixels: Bytes) -> Tensor:
    """A picture uint8 [H, W, 3] as float32 [1, 3, H, W] in [-1, 1]."""
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
    """The picture, and one to end with, as the condition [1, 20, T, H, W], float32 on the CPU."""
    device, request, ranks, plan = attempt.models.device, attempt.request, attempt.ranks, attempt.plan
    with attempt.models.on_device("vae", plan) as vae:
        dtype = next(vae.parameters()).dtype
        first, last = start_picture(request).to(dtype), None  # as the encoder takes it: half the bytes move
        if request.end_image:
            fitted = fit_picture(Path(request.end_image), request.width, request.height, request.fit)
            last = as_tensor(fitted.pixels).to(dtype)
        if ranks is not None:
            ranks.tell(
                "encode", [first if last is None else torch.cat((first, last))], plan=plan.model_dump(mode="json")
            )
        video = offload.to_device(picture_video(first, request.num_frames, last), device.torch_device)
        encode = partial(vae_driver.encode, vae, video, tile=plan.levers.tile)
        latents = encode() if ranks is None else ranks.alongside(partial(encode, parallel=ranks.parallel))
        if dtype == torch.float16 and not latents.isfinite().all():
            raise NotFiniteError
    return image_condition(latents, last=last is not None).float().cpu()


@torch.inference_mode()
def decode(attempt: Attempt, latents: Tensor) -> Iterator[Bytes]:
    """Latents [1, 16, T, H, W] -> chunks of frames uint8 [t, H, W, 3], in order."""
    with attempt.models.on_device("vae", attempt.plan) as vae:
        latents = offload.sent(latents, attempt.models.device.torch_device)
        ahead = 1 if attempt.models.device.is_cuda else 0
        ranks, width, columns = attempt.ranks, latents.shape[-1], None
        if ranks is not None:
            ranks.tell("decode", [latents], plan=attempt.plan.model_dump(mode="json"))
            columns = ranks.parallel.columns(width)
        queued: deque[tuple[Callable[[], Tensor], ...]] = deque()  # while one leaves the device, it makes the next
        for chunk in vae_driver.decode_stream(vae, latents, tile=attempt.plan.levers.tile, columns=columns):
            frames = vae_driver.frames_to_uint8(chunk)
            if ranks is not None:
                frames = ranks.alongside(partial(ranks.parallel.collect_frames, frames, width))
            parts = (frames[0], chunk.isfinite().all()) if chunk.dtype == torch.float16 else (frames[0],)
            queued.append(tuple(offload.leaving(part, latents.device) for part in parts))
            if len(queued) > ahead:
                yield arrived(*queued.popleft())
        for left in queued:
            yield arrived(*left)


def arrived(frames: Callable[[], Tensor], finite: Callable[[], Tensor] | None = None) -> Bytes:
    """Frames that left the device.

    Raises:
        NotFiniteError: they are none, by what left with them.
    """
    if finite is not None and not finite():
        raise NotFiniteError
    return frames().numpy()


def decoded(attempt: Attempt, latents: Tensor) -> tuple[Iterator[Bytes], int]:
    """Latents to frames, behind those of the clip that they continue, and how many."""
    request, frames = attempt.request, decode(attempt, latents)
    if not request.continues:
        return frames, request.num_frames
    before = Path(request.continues)
    return joined(before, frames), request.num_frames + tail_of(before).frames - 1


def write_frames(
    path: Path, attempt: Attempt, frames: Iterator[Bytes], count: int, fps: int, times: int = 1
) -> Written:
    """Frames to a file, `times` as wide and as high as the clip; nothing is left of a failure."""
    told, request = attempt.told, attempt.request
    recipe = {"request": told.request.model_dump(mode="json"), "plan": told.model_dump(mode="json")}
    tags = {"turbodiff": installed("turbodiff"), "job": attempt.id, **recipe}
    size = times * request.width, times * request.height
    writer = ClipWriter(path, *size, fps, tags, num_frames=count, wish=request.encoder)
    with writer:
        if request.encoder == "nvenc" and writer.encoder != NVENC:
            text = f"{writer.encoder} writes the file: the card's encoder does not work here: {nvenc_fault()}"
            attempt.send(NoticeEvent(key="nvenc_unusable", text=text, numbers={"encoder": writer.encoder}))
        for chunk in frames:
            attempt.check_cancelled()
            writer.write(chunk)
    assert writer.written is not None
    return writer.written


def make_file(target: Path, attempt: Attempt, latents: Tensor) -> Written:
    """Latents to the frames of a file: decoded, and finished where that is asked for.

    Each phase but the last leaves its frames raw beside the file; they are gone whatever happens.
    """
    request, phases = attempt.request, attempt.request.finishing
    size, spilled = (request.width, request.height, request.fps), [Path(f"{target}.{name}") for name in phases]

    def first() -> Written | RawFrames:
        frames, count = decoded(attempt, latents)
        if not phases:
            return write_frames(target, attempt, frames, count, request.fps)
        return RawFrames.spill(spilled[0], frames, *size)

    def then(raw: RawFrames, place: int) -> Written | RawFrames:
        frames, fps, times = finished(attempt, phases[place], raw)
        if place + 1 == len(phases):
            return write_frames(target, attempt, frames, frames_between(raw.frames, raw.fps, fps), fps, times)
        return RawFrames.spill(spilled[place + 1], frames, times * raw.width, times * raw.height, fps)

    try:
        made = vae_phase(attempt, "vae_decode", lambda: attempt.share("vae_decode", first))
        for place, name in enumerate(phases):
            assert isinstance(made, RawFrames)
            made = attempt.run_phase(name, partial(then, made, place))
    finally:
        for path in spilled:
            path.unlink(missing_ok=True)
    assert isinstance(made, Written)
    return made


def write_clip(attempt: Attempt, latents: Tensor) -> tuple[Path, Sidecar]:
    """Latents to a clip in the library; it gets its name only after every frame of the file was checked."""
    request, outputs, output = attempt.request, attempt.outputs, attempt.output
    partial = clips.partial_path(outputs, attempt.id, attempt.number, output)
    final = output or clips.clip_path(outputs, request.kind, request.seed or 0, request.model, attempt.created)
    written = make_file(partial, attempt, latents)
    try:
        with attempt.phase("write"):
            start = None  # the picture that the first frame should look like
            if request.image:
                with contextlib.suppress(FileError):  # it may be gone by now
                    start = fit_picture(Path(request.image), written.width, written.height, request.fit).pixels
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
    how |= {"exchange": attempt.exchange} if attempt.exchange != "full" else {}
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
        width=written.width,
        height=written.height,
        fps=written.fps,
        warnings=warnings,
        predicted=Predicted(peak_bytes=plan.peak_bytes, seconds=plan.seconds),
        measured=attempt.measured(),
    )
