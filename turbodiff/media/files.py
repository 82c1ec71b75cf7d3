"""Bringing bytes to the disk, and the one error for when that fails."""

import hashlib
import os
from pathlib import Path

from turbodiff.spec.errors import OutputError

DISK_FULL = ("No space left", "Disk quota exceeded", "File too large")


def output_error(folder: Path, why: str) -> OutputError:
    """The error for a result that cannot be written, from the words of the system or of ffmpeg."""
    if any(words in why for words in DISK_FULL):
        return OutputError(
            "the disk is full",
            code="disk_full",
            field="output",
            got=folder,
            try_instead="free some space, or another output folder",
        )
    return OutputError(
        "the result cannot be written",
        code="output_unwritable",
        field="output",
        got=f"{folder}: {why.splitlines()[-1][:200] if why else 'the encoder stopped'}",
        try_instead="another output folder",
    )


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
    """Write a whole file and bring it to the disk.

    Raises:
        OSError: the disk refused.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex.

    Raises:
        OSError: not readable.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
