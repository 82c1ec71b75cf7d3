"""Weights as they run, kept on disk where host memory cannot hold what is made of a file at load time. No torch.

A file that holds the numbers of its network is mapped, and takes no memory of its own. One in another dtype, and one
that becomes INT8, is made anew. Where that is too much (`Levers.converted`), every layer goes into a copy as soon as it
is made and is mapped from there (weights/converted.py), by later clips too, while its file is what it was. Copies lie
in one folder below that of the downloads. They are listed, deleted and moved with their models (weights/storage.py),
and make room for each other.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from turbodiff.spec.errors import FileError
from turbodiff.spec.numbers import GIB, gib
from turbodiff.weights.folders import CONVERTED

RESERVE_BYTES = GIB  # left free on the disk
DATA, INDEX, PART = ".weights", ".json", ".part"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_INDEX_BYTES = 16 << 20
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
    cannot be written."""
    folder = root.absolute() / CONVERTED
    try:
        here = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(here, os.W_OK):
            return None
        there = sum(path.stat().st_size for path in folder.iterdir()) if here == folder else 0
        room = shutil.disk_usage(here).free + there - RESERVE_BYTES
    except OSError:
        return None
    return max(0, room) // GIB * GIB


def make_room(root: Path, copy: Copy, need_bytes: int) -> None:
    """Delete copies whose files are gone, and of the others those that were not used for longest until there is room
    for a new one.

    Raises:
        FileError: all of that is not enough.
    """
    copy.path.parent.mkdir(parents=True, exist_ok=True)
    for part in copy.path.parent.glob(f".*{PART}"):  # of a process that was killed
        if not psutil.pid_exists(int(part.name.split(".")[-2]) if part.name.split(".")[-2].isdecimal() else 0):
            part.unlink(missing_ok=True)
    discard(copy)
    for other in sorted(copies(root), key=lambda other: other.source.exists()):
        short = shutil.disk_usage(copy.path.parent).free < need_bytes + RESERVE_BYTES
        if short or not other.source.exists():
            discard(other)
    if (free := shutil.disk_usage(copy.path.parent).free) < need_bytes + RESERVE_BYTES:
        raise no_room(copy, free, need_bytes)


def part_of(copy: Copy) -> Path:
    """Where this process writes a copy before it is whole."""
    return copy.path.with_name(f".{copy.path.name}.{os.getpid()}{PART}")


def discard(copy: Copy) -> None:
    """Remove a copy; one that is mapped stays readable for who has it."""
    for path in (copy.index_path, copy.path):
        path.unlink(missing_ok=True)


def no_room(copy: Copy, free_bytes: int, need_bytes: int) -> FileError:
    """The error of a disk that is too full for a copy."""
    return FileError(
        "no room on the disk for a copy of weights that are converted while they are read", code="copy_full",
        field=str(copy.path.parent), got=f"{gib(free_bytes)} free", expected=gib(need_bytes + RESERVE_BYTES),
        try_instead="free some of it, or set TURBODIFF_MODELS to a folder on a larger disk",
    )  # fmt: skip
