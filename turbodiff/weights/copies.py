"""Weights as they run, kept on disk where host memory cannot hold what is made of a file at load time. No torch.

A file that holds the numbers of its network is mapped, and takes no memory of its own. One in another dtype, and one
that becomes INT8, is made anew. Where that is too much (`Levers.converted`), every layer goes into a copy as soon as it
is made and is mapped from there (weights/converted.py), by later clips too, while its file is what it was. Copies lie
in one folder below that of the downloads. They are listed, deleted and moved with their models (weights/storage.py),
and make room for each other. One process writes a copy, others wait and take it: a lock of the kernel, which also holds
between containers and computers that share the disk, and which nobody holds who was killed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.files import file_system
from turbodiff.spec.numbers import GIB, gib
from turbodiff.weights.folders import CONVERTED

RESERVE_BYTES = GIB  # left free on the disk
DATA, INDEX, PART = ".weights", ".json", ".part"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_INDEX_BYTES = 16 << 20
IN_MEMORY = ("tmpfs", "ramfs", "rootfs")  # file systems on which a copy takes the very memory that it is to save
HELD = (errno.EWOULDBLOCK, errno.EAGAIN)
WAIT_S = 240.0  # for another process; then one of one's own is made, before the watchdog ends who reads nothing
LOOK_S = 0.2
FORMAT = 1  # of a copy; another one is made where it changes


class Copy(NamedTuple):
    """One copy: the file of its numbers, beside which its index lies, and the file that it was made of."""

    path: Path
    source: Path
    nbytes: int

    @property
    def index_path(self) -> Path:
        """Where its tensors are said to lie."""
        return self.path.with_suffix(INDEX)


def copy_of(root: Path, source: Path, files: Sequence[Path], how: str) -> Copy:
    """The copy that belongs to a file as it is now.

    Args:
        root: the folder of downloads.
        files: those that hold its tensors.
        how: what is made of it, such as "torch.bfloat16 int8 tiles".
    """
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([FORMAT, how, stats]).encode()).hexdigest()[:16]
    return Copy(root.absolute() / CONVERTED / f"{source.stem[:60]}-{key}{DATA}", source.absolute(), 0)


def copies(root: Path) -> tuple[Copy, ...]:
    """The copies that are whole, those first that were not used for longest."""
    found = []
    for index in (root.absolute() / CONVERTED).glob(f"*{INDEX}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            told, data = read_index(index), index.with_suffix(DATA)
            found.append((data.stat().st_mtime_ns, Copy(data, Path(str(told["source"])), data.stat().st_size)))
    return tuple(copy for _, copy in sorted(found))


def read_index(path: Path) -> dict[str, object]:
    """What an index says.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    if not path.is_file() or path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(path)
    told = json.loads(path.read_text("utf-8"))
    if not isinstance(told, dict):
        raise ValueError(path)
    return told


def room_bytes(root: Path) -> int | None:
    """Bytes that copies may take, in whole GiB, those that are there included: they make room. None where the folder
    cannot be written, or is memory."""
    folder = root.absolute() / CONVERTED
    try:
        here = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(here, os.W_OK) or file_system(here.resolve()) in IN_MEMORY:
            return None
        there = sum(path.stat().st_size for path in folder.iterdir()) if here == folder else 0
        room = shutil.disk_usage(here).free + there - RESERVE_BYTES
    except OSError:
        return None
    return max(0, room) // GIB * GIB


def open_part(copy: Copy, wait_s: float = WAIT_S) -> tuple[Path, BinaryIO]:
    """The empty file into which this process alone writes a copy, locked until it is closed; where another process
    writes that copy, after it has ended.

    Raises:
        OSError: the folder cannot be written.
    """
    copy.path.parent.mkdir(parents=True, exist_ok=True)
    path, end_s = copy.path.with_name(f".{copy.path.name}{PART}"), time.monotonic() + wait_s
    own = copy.path.with_name(f".{copy.path.name}.{secrets.token_hex(4)}{PART}")
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno not in HELD:  # a disk without locks
                return own, own.open("w+b")
            if time.monotonic() > end_s:
                path = own
            else:
                time.sleep(LOOK_S)
            continue
        if is_at(file, path):
            file.truncate()
            return path, file
        file.close()  # while we waited it got its name, or was removed


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one under that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def make_room(root: Path, copy: Copy, need_bytes: int) -> None:
    """Delete what is left of copies that nobody writes, copies whose files are gone, and of the others those that were
    not used for longest until there is room for a new one.

    Raises:
        FileError: all of that is not enough.
        OSError: the folder cannot be written.
    """
    for left in copy.path.parent.glob(f".*{PART}"):
        with contextlib.suppress(OSError), left.open("r+b") as file:  # ours is locked, as are those of others
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink(missing_ok=True)
    discard(copy)
    for other in sorted(copies(root), key=lambda other: other.source.exists()):
        short = shutil.disk_usage(copy.path.parent).free < need_bytes + RESERVE_BYTES
        if short or not other.source.exists():
            discard(other)
    if (free := shutil.disk_usage(copy.path.parent).free) < need_bytes + RESERVE_BYTES:
        raise no_room(copy, free, need_bytes)


def discard(copy: Copy) -> None:
    """Remove a copy; one that is mapped stays readable for who has it. The data go first: without them an index is
    nothing, and what is left of a copy is found by its index."""
    for path in (copy.path, copy.index_path):
        path.unlink(missing_ok=True)


def refused(copy: Copy, error: OSError, need_bytes: int) -> FileError:
    """The error of a disk that takes no copy: it is full, or may not be written."""
    if error.errno in FULL:
        free_bytes = 0
        with contextlib.suppress(OSError):
            free_bytes = shutil.disk_usage(copy.path.parent).free
        return no_room(copy, free_bytes, need_bytes)
    return FileError(
        "a copy of weights that are converted while they are read cannot be written", code="copy_refused",
        field=str(copy.path.parent), got=error.strerror or str(error), expected="a folder that this user may write to",
        try_instead="get the right to write there, or set TURBODIFF_MODELS to another folder",
    )  # fmt: skip


def damaged(copy: Copy, layer: str) -> FileError:
    """The error of a copy whose index does not fit the network, after it was removed."""
    discard(copy)
    return FileError(
        "a copy of converted weights is damaged, and was removed", code="copy_damaged", field=str(copy.path),
        got=f"other sizes of {layer}", expected="those of the network",
        try_instead="run this again: the copy is made anew",
    )  # fmt: skip


def no_room(copy: Copy, free_bytes: int, need_bytes: int) -> FileError:
    """The error of a disk that is too full for a copy."""
    return FileError(
        "no room on the disk for a copy of weights that are converted while they are read", code="copy_full",
        field=str(copy.path.parent), got=f"{gib(free_bytes)} free", expected=gib(need_bytes + RESERVE_BYTES),
        try_instead="free some of it, or set TURBODIFF_MODELS to a folder on a larger disk",
    )  # fmt: skip
