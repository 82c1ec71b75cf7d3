"""Finds ffmpeg and runs it so that its error lines are kept and nothing can block on them."""

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from turbodiff.spec.cached import Once
from turbodiff.spec.errors import FileError
from turbodiff.spec.request import Encoder

# Encoders with their options, best first. All stay above the 40 dB of luma PSNR that media/verify.py asks for, so that
# "below 40 dB" means damage: the lowest of shapes, grain at 240p and 480p, and white noise, measured 2026-11:
# libx264 41.6 dB (CRF 16 is visually lossless; the cap on the quantiser is what holds for noise); libopenh264, which
# LGPL builds have, 41.6 dB (in one slice it fails on noise). NVENC was not measured; a clip below 40 dB is refused.
ENCODERS = {
    "libx264": ("-c:v", "libx264", "-preset", "veryfast", "-crf", "16", "-qmax", "17", "-pix_fmt", "yuv420p"),
    "libopenh264": (
        "-c:v", "libopenh264", "-rc_mode", "quality", "-b:v", "200M", "-slices", "4", "-qmin", "14", "-qmax", "17",
        "-pix_fmt", "yuv420p",
    ),
    "h264_nvenc": ("-c:v", "h264_nvenc", "-preset", "p5", "-rc", "constqp", "-qp", "14", "-pix_fmt", "yuv420p"),
}  # fmt: skip
NVENC = "h264_nvenc"
NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # of the driver on Linux, under WSL

# Demuxers of files that hold their frames themselves
CONTAINERS = "mov,matroska,avi,gif,mpegts,ogg"


def ffmpeg_path() -> str:
    """The ffmpeg that imageio-ffmpeg brings (or the one in $IMAGEIO_FFMPEG_EXE).

    Raises:
        FileError: there is none.
    """
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        again = "pip install --force-reinstall imageio-ffmpeg"
        raise FileError("ffmpeg is missing", code="ffmpeg_missing", got=error, try_instead=again) from None


@Once
def h264_encoder() -> str:
    """The first of ENCODERS that this ffmpeg has and that encodes here; asked once, until there is one.

    Raises:
        FileError: there is no ffmpeg, it does not run, or it can encode no H.264.
    """
    path, said = ffmpeg_path(), ""
    for name in ENCODERS:
        fault = _fault(path, name)
        if not fault:
            return name
        said = said or fault
    raise FileError(
        "ffmpeg cannot encode H.264", code="ffmpeg_missing", got=f"{path}: {said}",
        expected="an ffmpeg with " + ", ".join(ENCODERS),
        try_instead="unset IMAGEIO_FFMPEG_EXE, or pip install --force-reinstall imageio-ffmpeg",
    )  # fmt: skip


@Once
def nvenc_fault() -> str:
    """Why the card's encoder writes no mp4 here: this ffmpeg lacks it, there is no card, its driver is too old; ""
    where it encoded a frame. Asked once; without a driver ffmpeg is not started."""
    if not any(map(os.path.exists, NVIDIA_DEVICES)):
        return "no NVIDIA driver"
    try:
        return _fault(ffmpeg_path(), NVENC)
    except FileError as error:
        return str(error)


def encoder_for(wish: Encoder) -> str:
    """The one of ENCODERS that writes a file; where NVENC is wished and does not work the one that else writes it.

    Raises:
        FileError: as `h264_encoder`.
    """
    return NVENC if wish == "nvenc" and not nvenc_fault() else h264_encoder()


def _fault(path: str, name: str) -> str:
    """What ffmpeg says where it cannot encode two frames with an encoder; "" where it can."""
    trial = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "256x256", "-i", "pipe:0", *ENCODERS[name])
    command = [path, "-hide_banner", "-loglevel", "error", *trial, "-f", "null", "-"]
    try:
        ran = subprocess.run(command, input=bytes(2 * 256 * 256 * 3), capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if ran.returncode == 0:
        return ""
    last = ran.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return last[:200] or f"exit status {ran.returncode}"


def source(clip: Path) -> tuple[str, ...]:
    """A clip as ffmpeg's input: a file by its name, whatever that looks like, that may name no other file and no host.
    A playlist under the name of a clip is refused."""
    return ("-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS, "-i", f"file:{clip.absolute()}")


class Ffmpeg:
    """One ffmpeg process; its error lines go to memory, so that a full pipe can never hold it up.

    Args:
        arguments: everything after the program's name.
        feed: whether bytes are written to its standard input; else they are read from its standard output.
        inherit: file descriptors that the process may open as /dev/fd/N.
    """

    def __init__(self, arguments: Sequence[str], *, feed: bool, inherit: Sequence[int] = ()) -> None:
        self._errors = os.memfd_create("ffmpeg-errors")
        self._process = subprocess.Popen(
            [ffmpeg_path(), "-hide_banner", "-loglevel", "error", "-nostats", *arguments],
            stdin=subprocess.PIPE if feed else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if feed else subprocess.PIPE,
            stderr=self._errors,
            pass_fds=tuple(inherit),
        )

    @property
    def stdin(self) -> IO[bytes]:
        """Where frames go in."""
        assert self._process.stdin
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        """Where frames come out."""
        assert self._process.stdout
        return self._process.stdout

    def finish(self) -> tuple[int, str]:
        """Wait for the end; exit status and error lines."""
        with contextlib.suppress(OSError):
            (self._process.stdin or self.stdout).close()
        status = self._process.wait()
        if self._errors < 0:
            return status, ""
        text = os.pread(self._errors, 64 * 1024, 0).decode("utf-8", "replace").strip()
        os.close(self._errors)
        self._errors = -1
        return status, text

    def kill(self) -> None:
        """End it now; safe to call twice."""
        self._process.kill()
        self.finish()
