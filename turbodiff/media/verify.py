"""Is the file on the disk what was sent to the encoder? Every frame is decoded and compared; metadata proves nothing.

Of 150 random damages of a clip the frame count in its index noticed none; decoding in full with every error fatal
noticed all truncations and half of the rest; the comparison with the fingerprints of the sent frames finds the others.
"""

import re
from dataclasses import dataclass

import numpy as np

from turbodiff.media.ffmpeg import Ffmpeg
from turbodiff.media.fingerprints import Bytes, Planes, fingerprint_planes, fingerprint_rgb, psnr
from turbodiff.media.quality_checks import QualityWarning, quality_warnings
from turbodiff.media.tags import TAG, read_tags
from turbodiff.media.video import Written
from turbodiff.spec.errors import FileError, VerifyError
from turbodiff.spec.files import sha256_of

MIN_LUMA_PSNR_DB = 40.0  # the encoder itself stays above 41 (media/video.py)
MIN_CHROMA_PSNR_DB = 38.0  # of block means; the encoder stays above 42, also on noise


@dataclass(frozen=True)
class Verdict:
    """A clip that holds every frame as sent; `warnings` are legal, but worth a badge (media/quality_checks.py)."""

    sha256: str
    frames: int
    warnings: tuple[QualityWarning, ...] = ()


def verify_clip(written: Written, picture: Bytes | None = None, prompt: str = "") -> Verdict:
    """Decode a clip in full and hold it to what was sent to the encoder.

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
    return Verdict(sha256, written.frames, tuple(quality_warnings(written.fingerprints, start, prompt)))


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
            planes = Planes(y.reshape(height, width), cb.reshape(half), cr.reshape(half))
            got = psnr(written.fingerprints[count], fingerprint_planes(planes))
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
