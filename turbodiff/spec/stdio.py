"""Standard streams that cannot fail: closed, full or broken ones, and encodings that lack a letter, stop no work.

Standard library only: the first thing that a process of ours does is `make_safe`.
"""

import codecs
import errno
import io
import os
import select
import sys


class SafeFile(io.FileIO):
    """A descriptor whose first write error is kept in `error` instead of being raised."""

    error: OSError | None = None

    def write(self, data, /):  # type: ignore[no-untyped-def,override]  # any buffer, as FileIO
        """Write, and tell a caller that all is well."""
        if self.error is None:
            try:
                while (written := super().write(data)) is None:  # a pipe that is not to block, and is full
                    select.select([], [self.fileno()], [])
                return written
            except OSError as error:
                self.error = error
        return len(data)


def escape(error: UnicodeError) -> tuple[str, int]:
    r"""Characters that an encoding lacks as \uXXXX, in surrogate pairs beyond that: valid inside JSON strings, too."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)), error.end


def make_safe() -> None:
    """Open what is closed of descriptors 0, 1 and 2 on /dev/null, and make sys.stdout and sys.stderr safe.

    A descriptor below 3 that stayed closed would be given to the next file: the database would get what is printed.
    """
    codecs.register_error("turbodiff.escape", escape)
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: fd
    sys.stdin = sys.stdin or open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # somebody else's, for example a test's
        encoding = getattr(stream, "encoding", None) or "utf-8"
        direct = fd == 2 or os.isatty(fd)
        raw = io.BufferedWriter(SafeFile(fd, "w", closefd=False))
        safe = io.TextIOWrapper(raw, encoding, "turbodiff.escape", line_buffering=direct, write_through=fd == 2)
        setattr(sys, name, safe)
        setattr(sys, f"__{name}__", safe)


def output_error() -> OSError | None:
    """Why not all of standard output was written, None if it was or if its reader just went away."""
    if sys.stdout is None:
        return None
    sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None)
    return error if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EBADF) else None
