"""Files on disk: atomic replacement, durability, checksums, and the one error for a result that cannot be written."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from turbodiff.spec.environment import home_folder
from turbodiff.spec.errors import OutputError

STEM_BYTES = 180  # of 255 that a name may have on Linux; what temporary names add takes at most 60
DISK_FULL = ("No space left", "Disk quota exceeded", "File too large")


# what a name may lead to instead of a file
KINDS = {
    stat.S_IFDIR: "it is a folder", stat.S_IFIFO: "it is a named pipe", stat.S_IFSOCK: "it is a socket",
    stat.S_IFCHR: "it is a device", stat.S_IFBLK: "it is a device",
}  # fmt: skip


class NotAFileError(OSError):
    """What a name leads to is something else than a file; `strerror` says what."""


def check_file(path: Path) -> None:
    """Raise where something else than a file stands under a name; a name without anything is fine.

    Raises:
        NotAFileError: a folder, a pipe, a socket or a device.
        OSError: there is no right to look.
    """
    with contextlib.suppress(FileNotFoundError):
        if (kind := stat.S_IFMT(path.stat().st_mode)) != stat.S_IFREG:
            raise NotAFileError(errno.EINVAL, KINDS.get(kind, "it is no file"), str(path))


def check_own_folder(path: Path) -> None:
    """Raise where a folder of ours is a link: what it leads to is not ours.

    Raises:
        NotAFileError: it is one.
    """
    if path.is_symlink():
        raise NotAFileError(errno.EINVAL, "it is a link", str(path))


def open_file(path: Path) -> BufferedReader:
    """A file that a person named, open for reading. A pipe that nobody writes to is refused, not waited for.

    Raises:
        OSError: it is not there, may not be read, or is no file (NotAFileError).
    """
    check_file(path)  # opening a socket or some devices fails in words of their own
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # changed in between
        file.close()
        raise NotAFileError(errno.EINVAL, "it is no file", str(path))
    return file


def proc_lines(path: Path) -> list[str]:
    """The lines of a file of /proc. Paths in it need not be UTF-8, and hold any white space but the end of a line.

    Raises:
        OSError: not readable.
    """
    return [line for line in os.fsdecode(path.read_bytes()).split("\n") if line]


def mount_fields(line: str) -> list[str]:
    r"""The fields of a line of /proc/self/mounts or mountinfo, which write a space in a path as \040 (proc(5))."""
    return [re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field) for field in line.split(" ")]


def file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system below a path ("ext4", "9p", ...), "" if the kernel does not say (proc(5))."""
    try:
        lines = proc_lines(Path("/proc/self/mounts")) if mounts is None else mounts.split("\n")
    except OSError:
        return ""
    best, found = -1, ""
    for _, point, kind, *_ in filter(lambda fields: len(fields) > 2, map(mount_fields, lines)):
        if path.is_relative_to(point) and len(point) > best:
            best, found = len(point), kind
    return found


@contextlib.contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, to be written in the block; rename it to `path` when the block succeeds.

    After an error the temporary file is removed and what `path` held before is unchanged. The folder is made.

    Args:
        durable: fsync the file before the rename, so that a power cut leaves either the old content or the new.

    Raises:
        OSError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{cut_name(path.name, STEM_BYTES)}.{os.getpid()}.{threading.get_native_id()}.part")
    try:
        yield part
        if durable:
            sync(part)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def make_folder(path: Path, mode: int = 0o777, ours: bool = False, link: bool = True) -> None:
    """Make a folder where there is none. What else stands under its name, a dangling link included, is kept beside it.

    Args:
        ours: the name is one of our own, not a person's: a folder there that is closed to us is kept beside it, too.
        link: a link to a folder will do; False where files are moved: they shall not end up elsewhere.

    Raises:
        OSError: the disk refused.
    """
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
        rights = os.W_OK | os.X_OK
        if link if path.is_symlink() else not ours or os.access(path, rights, effective_ids=True):
            return
        if not os.access(path.parent, rights, effective_ids=True):  # a disk that can only be read, too
            return
    except FileExistsError:
        pass
    path.rename(path.with_name(f"{path.name}-replaced-{secrets.token_hex(4)}"))
    path.mkdir(mode)


def cut_name(name: str, most_bytes: int) -> str:
    """The start of a name, in at most so many bytes: file systems count them, and a Chinese character takes three."""
    return name.encode("utf-8", "surrogateescape")[:most_bytes].decode("utf-8", "ignore")


def files_of(folder: Path) -> list[Path]:
    """The files of a folder of ours that may be moved or removed, [] where it cannot be read.

    A link may lead anywhere and is left out; behind a folder that is itself one nothing is ours.
    """
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            with os.scandir(folder) as entries:
                return [Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]
    return []


def sync(path: Path) -> None:
    """fsync a file or a folder.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a whole file under its own name and fsync it.

    Raises:
        OSError: the disk refused.
    """
    path.write_bytes(data)
    sync(path)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex.

    Raises:
        OSError: not readable.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def output_error(folder: Path, why: str) -> OutputError:
    """The error for a result that cannot be written, from the words of the system or of ffmpeg."""
    if any(words in why for words in DISK_FULL):
        return OutputError(
            "the disk is full", code="disk_full", field="output", got=folder,
            try_instead="free some space, or another output folder",
        )  # fmt: skip
    got = f"{folder}: {why.splitlines()[-1][:200] if why else 'the encoder stopped'}"
    return OutputError(
        "the result cannot be written", code="output_unwritable", field="output", got=got,
        try_instead="another output folder",
    )  # fmt: skip


def state_folder() -> Path:
    """Where the queue, the caches and the logs live: $TURBODIFF_STATE, else the XDG state folder."""
    home = os.environ.get("XDG_STATE_HOME") or home_folder() / ".local" / "state"
    return Path(os.environ.get("TURBODIFF_STATE") or Path(home) / "turbodiff")
