"""A clip, from the words to the file: the story of turbodiff on one screen.

words -> text rows -> (picture -> condition) -> latents, step by step -> frames, chunk by chunk -> mp4 -> library
"""

import contextlib
from pathlib import Path

from torch import Tensor

from turbodiff.archive import clips
from turbodiff.media.fingerprints import Bytes
from turbodiff.media.pictures import fit_picture
from turbodiff.media.verify import Verdict, verify_clip
from turbodiff.media.video import ClipWriter
from turbodiff.runtime import metadata, stages
from turbodiff.runtime.attempt import Job, Orders, Run, Say
from turbodiff.runtime.denoise import denoise
from turbodiff.runtime.latents_cache import SavedLatents
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.errors import FileError
from turbodiff.spec.events import NoticeEvent, PlanEvent, ResultEvent
from turbodiff.spec.request import Request


def generate(job: Job, shelf: ModelCache, say: Say, orders: Orders) -> ResultEvent:
    """Make the clip of a job and put it into the library; returns its `result` event.

    Raises:
        TurbodiffError: what a person should read; nothing half-done is left behind.
        Waits: somebody else took the memory meanwhile; nothing half-done is left but latents.
    """
    run = Run(job, shelf, say, orders)
    say(PlanEvent(plan=job.plan))
    shelf.open(run.request)
    shelf.make_room(run.plan)
    saved = SavedLatents(job.state, job.id, run.request)
    latents = saved.load()
    if latents is None:
        latents = make_latents(run)
        saved.save(latents, run.plan)
    else:
        text = "the latents of an earlier attempt are decoded"
        say(NoticeEvent(key="latents_resumed", text=text, numbers={}))
    clip, verdict = write_clip(run, latents)
    saved.forget()
    return metadata.result(run, clip, verdict)


def make_latents(run: Run) -> Tensor:
    """Words, and a picture where there is one, to latents [1, 16, T, H, W]."""
    with run.phase("text_encode"):
        text, negative = stages.encode_text(run)
    condition = None
    if run.request.kind == "i2v":
        with run.phase("image_encode"):
            condition = stages.encode_image(run)
    return denoise(run, text, condition, negative)


def write_clip(run: Run, latents: Tensor) -> tuple[Path, Verdict]:
    """Latents to a clip in the library; it gets its name only after every frame of the file was checked."""
    job, request = run.job, run.request
    partial = clips.partial_beside(job.output) if job.output else clips.partial_path(job.outputs, job.id, job.attempt)
    final = job.output or clips.clip_path(job.outputs, request.kind, request.seed or 0, request.model, run.created)
    writer = ClipWriter(
        partial, request.width, request.height, request.fps, metadata.settings(run), num_frames=request.num_frames
    )
    with writer, run.phase("vae_decode"):
        for frames in stages.decode(run, latents):
            run.check_cancelled()
            writer.write(frames)
    assert writer.written is not None
    try:
        with run.phase("write"):
            verdict = verify_clip(writer.written, start_picture(request), request.prompt)
            sidecar = metadata.sidecar(run, verdict)
            poster = b"" if job.output else writer.written.poster
            path = clips.publish(partial, final, sidecar, poster, replace=job.output is not None)
    finally:
        partial.unlink(missing_ok=True)
    return path, verdict


def start_picture(request: Request) -> Bytes | None:
    """The picture that the first frame should look like, uint8 RGB [H, W, 3]; None where there is none any more."""
    if request.kind == "i2v":
        with contextlib.suppress(FileError):
            return fit_picture(request).pixels
    return None
