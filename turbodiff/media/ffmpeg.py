"""Finding ffmpeg and running it so that its complaints are kept and nothing can block on them."""

import contextlib
import os
import subprocess
from collections.abc import Sequence
from typing import IO

import imageio_ffmpeg

from turbodiff.spec.errors import FileError


def ffmpeg_path() -> str:
    """The ffmpeg that imageio-ffmpeg brings (or the one in $IMAGEIO_FFMPEG_EXE).

    Raises:
        FileError: there is none.
    """
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise FileError(
            "ffmpeg is missing",
            code="ffmpeg_missing",
            got=error,
            try_instead="pip install --force-reinstall imageio-ffmpeg",
        ) from None


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
        return status, self._read_errors()

    def kill(self) -> None:
        """End it now; safe to call twice."""
        self._process.kill()
        self.finish()

    def _read_errors(self) -> str:
        if self._errors < 0:
            return ""
        text = os.pread(self._errors, 64 * 1024, 0).decode("utf-8", "replace").strip()
        os.close(self._errors)
        self._errors = -1
        return text
