"""Is the file on the disk what was sent to the encoder? Every frame is decoded and compared; metadata proves nothing.

Of 150 random damages of a clip the frame count in its index noticed none; decoding in full with every error fatal
noticed all truncations and half of the rest; the comparison with the marks of the sent frames finds the others.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from turbodiff.media.ffmpeg import Ffmpeg
from turbodiff.media.fingerprints import Bytes, Mark, Planes, chroma_psnr_db, luma_psnr_db, mark_planes, mark_rgb
from turbodiff.media.quality_checks import Flaw, flaws
from turbodiff.media.tags import TAG, read_tags
from turbodiff.media.video import Written
from turbodiff.spec.errors import FileError, VerifyError
from turbodiff.spec.files import sha256_of

MIN_LUMA_PSNR_DB = 40.0  # the encoder itself stays above 41 (media/video.py)
MIN_CHROMA_PSNR_DB = 38.0  # of block means; the encoder stays above 42, also on noise


@dataclass(frozen=True)
class Verdict:
    """A clip that holds every frame as sent; `warnings` are legal, but worth a badge (media/flaws.py)."""

    sha256: str
    frames: int
    warnings: tuple[Flaw, ...] = ()


@dataclass(frozen=True)
class Stream:
    """The head of a decoded stream."""

    width: int
    height: int
    fps: float


def verify_clip(written: Written, picture: Bytes | None = None, prompt: str = "") -> Verdict:
    """Decode a clip in full and hold it to what was sent to the encoder.

    Args:
        picture: the picture that the clip starts from, uint8 RGB [H, W, 3]; its first frame should look like it.
        prompt: a clip that is asked to be still may be.

    Raises:
        VerifyError: missing, truncated, any decoder error, wrong number of frames, size, rate or settings, a frame
            below 40 dB of luma (38 of chroma) against what was sent, or any byte changed since it was written.
    """
    _check_decoded(written)
    _check_settings(written)
    try:
        sha256 = sha256_of(written.path)
    except OSError as error:
        raise _rejected("the clip cannot be read", "clip_unreadable", error.strerror) from None
    if sha256 != written.sha256:
        raise _rejected("the file changed after it was written", "clip_changed", sha256[:12], written.sha256[:12])
    start = mark_rgb(picture) if picture is not None else None
    return Verdict(sha256, written.frames, tuple(flaws(written.marks, start, prompt)))


def _check_decoded(written: Written) -> None:
    with_errors = ["-xerror", "-err_detect", "explode"]
    out = ["-map", "0:v:0", "-fps_mode", "passthrough", "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "pipe:1"]
    ffmpeg = Ffmpeg(["-nostdin", *with_errors, "-i", str(written.path.absolute()), *out], feed=False)
    try:
        count = _compare(ffmpeg, written)
        status, errors = ffmpeg.finish()
    except BaseException:
        ffmpeg.kill()
        raise
    if status or errors:
        raise _rejected("the clip does not decode", "clip_broken", errors[:200] or f"exit status {status}")
    if count != written.frames:
        raise _rejected("frames are missing", "clip_frames", count, written.frames)


def _compare(ffmpeg: Ffmpeg, written: Written) -> int:
    head = ffmpeg.stdout.readline(200)
    if not head:
        return 0
    stream = _stream(head)
    if (stream.width, stream.height) != (written.width, written.height):
        raise _rejected(
            "wrong size", "clip_size", f"{stream.width}x{stream.height}", f"{written.width}x{written.height}"
        )
    if stream.fps != written.fps:
        raise _rejected("wrong frame rate", "clip_fps", stream.fps, written.fps)
    count = 0
    for planes in _frames(ffmpeg, stream):
        if count < written.frames:
            _compare_frame(count, written.marks[count], mark_planes(planes))
        count += 1
    return count


def _compare_frame(index: int, sent: Mark, got: Mark) -> None:
    luma, chroma = luma_psnr_db(sent, got), chroma_psnr_db(sent, got)
    if luma < MIN_LUMA_PSNR_DB or chroma < MIN_CHROMA_PSNR_DB:
        raise _rejected(
            f"frame {index} is not what was sent",
            "clip_differs",
            f"{luma:.1f} dB luma, {chroma:.1f} dB chroma",
            f"at least {MIN_LUMA_PSNR_DB:.0f} and {MIN_CHROMA_PSNR_DB:.0f} dB",
        )


def _stream(head: bytes) -> Stream:
    """The first line of a yuv4mpeg stream: YUV4MPEG2 W832 H480 F16:1 ..."""
    fields = {word[:1]: word[1:] for word in head.decode("ascii", "replace").split()[1:]}
    rate = re.fullmatch(r"(\d+):(\d+)", fields.get("F", ""))
    fps = int(rate[1]) / max(int(rate[2]), 1) if rate else 0.0
    return Stream(int(fields.get("W", 0)), int(fields.get("H", 0)), fps)


def _frames(ffmpeg: Ffmpeg, stream: Stream) -> Iterator[Planes]:
    half = (stream.height // 2, stream.width // 2)
    shapes = ((stream.height, stream.width), half, half)
    size = sum(height * width for height, width in shapes)
    while ffmpeg.stdout.readline(200).startswith(b"FRAME"):
        data = ffmpeg.stdout.read(size)
        if len(data) < size:
            return
        yield Planes(*_split(np.frombuffer(data, np.uint8), shapes))


def _split(data: Bytes, shapes: tuple[tuple[int, int], ...]) -> Iterator[Bytes]:
    start = 0
    for height, width in shapes:
        yield data[start : start + height * width].reshape(height, width)
        start += height * width


def _check_settings(written: Written) -> None:
    try:
        tags = read_tags(written.path)
    except FileError as error:
        raise _rejected(error.what, "clip_tags", error.got) from None
    for name in (TAG, "comment"):
        if tags.get(name) != written.settings:
            raise _rejected(f"the settings in tag {name} are damaged", "clip_tags", tags.get(name, "none")[:80])


def _rejected(what: str, code: str, got: object, expected: object = "") -> VerifyError:
    return VerifyError(
        what, code=code, field="output", got=got, expected=expected, try_instead="decode again from the kept latents"
    )
