"""Finds ffmpeg and runs it so that its error lines are kept and nothing can block on them."""

import contextlib
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from typing import IO

from turbodiff.spec.errors import FileError


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


@cache
def check_encoder() -> None:
    """Fail before the work where ffmpeg cannot make our clips; asked once, until it can.

    Raises:
        FileError: there is no ffmpeg, it does not run, or it was built without x264.
    """
    path = ffmpeg_path()
    try:
        asked = subprocess.run([path, "-hide_banner", "-h", "encoder=libx264"], capture_output=True, timeout=30)
        said = asked.stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError) as error:
        raise _no_encoder(path, error) from None
    if not said.startswith("Encoder libx264"):
        raise _no_encoder(path, "an ffmpeg without libx264")


def _no_encoder(path: str, got: object) -> FileError:
    return FileError(
        "ffmpeg cannot encode H.264", code="ffmpeg_missing", got=f"{path}: {got}", expected="an ffmpeg with libx264",
        try_instead="unset IMAGEIO_FFMPEG_EXE, or pip install --force-reinstall imageio-ffmpeg",
    )  # fmt: skip


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
