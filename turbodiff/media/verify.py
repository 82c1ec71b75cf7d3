"""Is the file on the disk what was sent to the encoder? Every frame is decoded and compared; metadata proves nothing.

Of 150 random damages of a clip the frame count in its index noticed none; decoding in full with every error fatal
noticed all truncations and half of the rest; the comparison with the fingerprints of the sent frames finds the others.

A correctly written clip may still be all black, frozen or noisy at its start: it is kept with a warning, read off the
fingerprints. Measured 2026-11, on clips of the demo model and its VAE (128x128) and on footage at 480p:

    largest grain of the first quarter / of the rest, levels: 30 good clips 0.0-0.3 / 0.0-0.9; noise in the first latent
    frame of sigma 0.8 (a few specks) 0.2-0.6 / 0.1, of sigma 1.5 (plainly seen) 3.4-9.6 / 0.0-1.3
    change of the block that changes most, levels: good clips 41-240, slow footage 28-41, a small thing far away 15-40;
    still latents 7, still footage 0.5, constant frames 0
    first frame against the clean one, finer than a block: sigma 0.8 3-6, sigma 1.5 12-15 levels
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from turbodiff.media.ffmpeg import Ffmpeg
from turbodiff.media.fingerprints import Bytes, Fingerprint, fingerprint_planes, fingerprint_rgb, psnr
from turbodiff.media.tags import TAG, read_tags
from turbodiff.media.video import Written
from turbodiff.prompt.lint import STILLNESS, STOPPING
from turbodiff.spec.errors import FileError, VerifyError
from turbodiff.spec.files import sha256_of

MIN_LUMA_PSNR_DB = 40.0  # the encoder itself stays above 41 (media/video.py)
MIN_CHROMA_PSNR_DB = 38.0  # of block means; the encoder stays above 42, also on noise

QualityWarning = Literal["black", "frozen", "stops_halfway", "noisy_start"]

BLACK_LUMA = 4.0  # no block of any frame is brighter, of 255
FROZEN_LEVELS = 8.0  # no block of the thumbnail changes by more over the whole clip
STOPPED_SHARE = 0.4  # of the frames, the last ones, that nothing moves in: less is a pause at the end
STOPPED_FRAMES = 4
MOVED_LEVELS = 24.0  # what moved before changed some block by more, or it is too small or slow to tell that it stopped
MOVED_TIMES = 4.0  # and by so much more than anything does after
GRAIN_LEVELS = 2.0  # of noise beyond what the rest has; a third of it is hardly seen
GRAIN_TIMES = 1.8  # texture that comes and goes stays below
PICTURE_LEVELS = 20.0  # between first frame and picture, finer than a block; a VAE's own blur costs 5 to 16


def verify_clip(written: Written, picture: Bytes | None = None, prompt: str = "") -> tuple[QualityWarning, ...]:
    """Decode a clip in full and hold it to what was sent to the encoder; what is legal, but worth a badge.

    Args:
        picture: the picture that the clip starts from, uint8 RGB [H, W, 3]; its first frame should look like it.
        prompt: a clip that is asked to be still may be.

    Raises:
        VerifyError: missing, truncated, any decoder error, wrong number of frames, size, rate or settings, a frame
            below 40 dB of luma (38 of chroma) against what was sent, or any byte changed since it was written.
    """
    with_errors = ["-xerror", "-err_detect", "explode"]
    out = ["-map", "0:v:0", "-fps_mode", "passthrough", "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "pipe:1"]
    ffmpeg = Ffmpeg(["-nostdin", *with_errors, "-i", str(written.path.absolute()), *out], feed=False)
    try:
        count = _compare_frames(ffmpeg, written)
        status, errors = ffmpeg.finish()
    except BaseException:
        ffmpeg.kill()
        raise
    if status or errors:
        raise _rejected("the clip does not decode", "clip_broken", errors[:200] or f"exit status {status}")
    if count != written.frames:
        raise _rejected("frames are missing", "clip_frames", count, written.frames)
    try:
        tags, sha256 = read_tags(written.path), sha256_of(written.path)
    except FileError as error:
        raise _rejected(error.what, "clip_tags", error.got) from None
    except OSError as error:
        raise _rejected("the clip cannot be read", "clip_unreadable", error.strerror) from None
    for name in (TAG, "comment"):
        if tags.get(name) != written.settings:
            raise _rejected(f"the settings in tag {name} are damaged", "clip_tags", tags.get(name, "none")[:80])
    if sha256 != written.sha256:
        raise _rejected("the file changed after it was written", "clip_changed", sha256[:12], written.sha256[:12])
    start = fingerprint_rgb(picture) if picture is not None else None
    return tuple(quality_warnings(written.fingerprints, start, prompt))


def _compare_frames(ffmpeg: Ffmpeg, written: Written) -> int:
    """Hold every decoded frame of a yuv4mpeg stream to what was sent; how many there were.

    The stream begins with a line "YUV4MPEG2 W832 H480 F16:1 ...", then follow "FRAME" lines with the planes Y, Cb, Cr.
    """
    head = ffmpeg.stdout.readline(200)
    if not head:
        return 0
    fields = {word[:1]: word[1:] for word in head.decode("ascii", "replace").split()[1:]}
    rate = re.fullmatch(r"(\d+):(\d+)", fields.get("F", ""))
    width, height = int(fields.get("W", 0)), int(fields.get("H", 0))
    fps = int(rate[1]) / max(int(rate[2]), 1) if rate else 0.0
    if (width, height) != (written.width, written.height):
        raise _rejected("wrong size", "clip_size", f"{width}x{height}", f"{written.width}x{written.height}")
    if fps != written.fps:
        raise _rejected("wrong frame rate", "clip_fps", fps, written.fps)
    pixels, count = width * height, 0
    half = (height // 2, width // 2)
    while ffmpeg.stdout.readline(200).startswith(b"FRAME"):
        data = np.frombuffer(ffmpeg.stdout.read(pixels * 3 // 2), np.uint8)
        if data.size < pixels * 3 // 2:
            break
        if count < written.frames:
            y, cb, cr = np.split(data, (pixels, pixels * 5 // 4))
            decoded = fingerprint_planes(y.reshape(height, width), cb.reshape(half), cr.reshape(half))
            got = psnr(written.fingerprints[count], decoded)
            if got.luma_db < MIN_LUMA_PSNR_DB or got.chroma_db < MIN_CHROMA_PSNR_DB:
                raise _rejected(
                    f"frame {count} is not what was sent", "clip_differs",
                    f"{got.luma_db:.1f} dB luma, {got.chroma_db:.1f} dB chroma",
                    f"at least {MIN_LUMA_PSNR_DB:.0f} and {MIN_CHROMA_PSNR_DB:.0f} dB",
                )  # fmt: skip
        count += 1
    return count


def _rejected(what: str, code: str, got: object, expected: object = "") -> VerifyError:
    return VerifyError(
        what, code=code, field="output", got=got, expected=expected, try_instead="decode again from the kept latents"
    )


def quality_warnings(
    frames: Sequence[Fingerprint], picture: Fingerprint | None = None, prompt: str = ""
) -> Iterator[QualityWarning]:
    """What may be wrong with the look of a clip.

    "black": nothing can be seen in any frame. "frozen": no part of the picture changes from the first frame to the
    last. "stops_halfway": it moved plainly, and nothing does in the last two fifths or more. "noisy_start": the first
    quarter has noise that the rest has not, or the first frame noise that its picture has not.

    Args:
        frames: fingerprints of every frame, in order.
        picture: of the picture that the clip starts from, at the clip's size.
        prompt: who asks for stillness gets it without a remark.
    """
    luma = np.stack([frame.thumbnail[..., 0] for frame in frames])
    if luma.max() < BLACK_LUMA:
        yield "black"
    still = len(frames) > 1 and float(np.ptp(luma, axis=0).max()) < FROZEN_LEVELS
    if still and not STILLNESS.search(prompt):
        yield "frozen"
    if not still and len(luma) >= 2 * STOPPED_FRAMES and not (STILLNESS.search(prompt) or STOPPING.search(prompt)):
        held = max(STOPPED_FRAMES, math.ceil(STOPPED_SHARE * len(luma)))
        rest = float(np.ptp(luma[-held:], axis=0).max())
        before = float(np.ptp(luma[: len(luma) - held + 1], axis=0).max())
        if rest < FROZEN_LEVELS and before > max(MOVED_LEVELS, MOVED_TIMES * rest):
            yield "stops_halfway"
    first, grain = math.ceil(len(frames) / 4), [frame.grain for frame in frames]
    noisy = len(frames) > 1 and _is_grainier(max(grain[:first]), max(grain[first:]))
    if picture is not None and not noisy:
        # root mean square of what differs within the blocks of the thumbnails: detail and noise, not light or colour
        whole = 255**2 / 10 ** (psnr(frames[0], picture).luma_db / 10)
        blocks = float(np.square(frames[0].thumbnail[..., 0] - picture.thumbnail[..., 0]).mean())
        fine = math.sqrt(max(0.0, whole - blocks))
        noisy = _is_grainier(grain[0], picture.grain) or fine > PICTURE_LEVELS
    if noisy:
        yield "noisy_start"


def _is_grainier(one: float, other: float) -> bool:
    return one > GRAIN_TIMES * other and one**2 - other**2 > GRAIN_LEVELS**2
