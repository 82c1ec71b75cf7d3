"""Is there a place for a clip, and a program that can write it? Asked before minutes of work, not after them."""

import os
from pathlib import Path

from turbodiff.archive.clips import check_outputs
from turbodiff.media.ffmpeg import check_encoder
from turbodiff.spec.errors import OutputError
from turbodiff.spec.numbers import gib

RESERVE_BYTES = 1 << 30  # for everybody else on that disk
BYTES_PER_PIXEL = 1.5  # of every frame: three times what x264 makes of grain at CRF 16; latents take a quarter byte


def check_place(outputs: Path, state: Path, width: int, height: int, num_frames: int) -> None:
    """Fail now where a clip of this size could not be written later.

    Raises:
        OutputError: the folder takes no file, or one of the two disks has too little room; field `output` or `state`.
        FileError: ffmpeg cannot encode.
    """
    check_encoder()
    needed = need_bytes(width, height, num_frames)
    check_room(outputs, needed, "output")
    check_outputs(outputs)
    check_room(state, needed, "state")


def need_bytes(width: int, height: int, num_frames: int) -> int:
    """Bytes that should be free before a clip of this size is begun."""
    return RESERVE_BYTES + int(BYTES_PER_PIXEL * width * height * num_frames)


def check_room(folder: Path, needed_bytes: int, field: str) -> None:
    """Fail where the disk of a folder, which need not exist yet, has less than `needed_bytes` left.

    Raises:
        OutputError: code disk_full.
    """
    free = free_bytes(folder)
    if free is not None and free < needed_bytes:
        raise OutputError(
            "there is too little room on the disk",
            code="disk_full",
            field=field,
            got=f"{gib(free)} free for {folder}",
            expected=f"at least {gib(needed_bytes)}",
            try_instead="free some space, or another " + ("--outputs" if field == "output" else "--state-dir"),
        )


def free_bytes(folder: Path) -> int | None:
    """Bytes that we may still write where a folder is or would be; None where the file system does not say."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None
