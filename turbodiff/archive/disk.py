"""Is there a place for a clip, and a program that can write it? Asked before minutes of work, not after them."""

import contextlib
import errno
import os
import re
import time
from functools import partial
from pathlib import Path

from turbodiff.archive.clips import PARTIAL, partial_path, sidecar_path
from turbodiff.gpu.process_identity import is_alive, process_mark, start_ticks
from turbodiff.media.ffmpeg import h264_encoder
from turbodiff.spec.cached import Once
from turbodiff.spec.errors import OutputError
from turbodiff.spec.files import files_of, make_folder, output_error, write_synced
from turbodiff.spec.numbers import gib

FOLDER_ERRORS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EACCES)  # not the name's fault
# archive/clips.py, partial_path: the process's mark, of which older versions wrote the number alone
LEFT = re.compile(r"\..+\.((\d+)(?:-(\d+)-([0-9a-f]{16}))?)\.partial\.mp4(?:\.json|\.jpg)?")
STALE_S = 60.0  # a clip that is being written, also from a container with its own process ids, is younger
RESERVE_BYTES = 1 << 30  # for everybody else on that disk
BYTES_PER_PIXEL = 1.5  # of every frame: three times what x264 makes of grain at CRF 16; latents take a quarter byte


def check_place(outputs: Path, state: Path, width: int, height: int, num_frames: int) -> None:
    """Fail now where a clip of this size could not be written later. The folder of the library is made.

    Raises:
        OutputError: the folder takes no file, or one of the two disks has too little room; field `output` or `state`.
        FileError: ffmpeg cannot encode.
    """
    h264_encoder()
    _check_room(outputs, width * height * num_frames, "output")
    _check_library(outputs, int(time.monotonic()))
    _check_room(state, width * height * num_frames, "state")


def remove_left(outputs: Path) -> None:
    """Remove what killed runs left among the temporary files of a library; what another container's run may be writing
    is younger than a minute."""
    for path in files_of(outputs / PARTIAL):
        parts = path.name.split(".")
        with contextlib.suppress(OSError):
            gone = len(parts) > 3 and parts[2].isdecimal() and not is_alive(int(parts[2]))
            if gone and time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()


def check_output(output: Path, width: int, height: int, num_frames: int) -> None:
    """Fail now where a clip could not be written under a name that a person typed. An existing file will be replaced,
    and what killed runs left in the folder is removed.

    Raises:
        OutputError: field `output`: a folder, not an .mp4, no such folder, a name that this file system or the event
            protocol cannot hold, not writable, or too little room.
        FileError: ffmpeg cannot encode.
    """
    h264_encoder()
    what = expected = try_instead = ""
    try:
        output.is_dir()
    except OSError as error:  # a folder above it is closed to this user
        raise output_error(output.parent, error.strerror or str(error)) from None
    if why := _unusable_name(output):
        what, expected, try_instead = f"the name cannot be used: {why}", "a short name in UTF-8", "-o out.mp4"
    elif output.is_dir():
        what, expected, try_instead = "the output is a folder", "a file name", f"-o {output / 'out.mp4'}"
    elif output.suffix.lower() != ".mp4":
        what, expected, try_instead = "clips are mp4 files", "a name ending in .mp4", f"-o {output.stem or 'out'}.mp4"
    elif not output.parent.is_dir():
        what, expected, try_instead = "the folder does not exist", "an existing folder", f"mkdir -p {output.parent}"
    if what:
        raise OutputError(
            what, code="output_unwritable", field="output", got=output, expected=expected, try_instead=try_instead
        )
    _check_takes_a_file(output.parent, output.parent)
    place = process_mark(os.getpid()).partition("-")[2].rpartition("-")[2]
    for path in output.parent.glob(".*.partial.mp4*"):  # of runs that were killed, not of another machine's
        if not (left := LEFT.fullmatch(path.name)):
            continue
        pid, gone = int(left[2]), not is_alive(int(left[2]))
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove
            if left[4] and left[4] == place:  # of this boot, in our PID namespace: one that is not to be seen is over
                gone = gone or start_ticks(pid) not in (None, int(left[3]))
            else:
                gone = gone and time.time() - path.stat().st_mtime > STALE_S
            if gone:
                path.unlink()
    _check_room(output.resolve().parent, width * height * num_frames, "output")


def free_bytes(folder: Path) -> int | None:
    """Bytes that we may still write where a folder is or would be; None where the file system does not say."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _unusable_name(output: Path) -> str:
    """Why a clip, its sidecar or its temporary file cannot have this name here; "" when they can."""
    try:
        str(output).encode()  # it travels to the worker as JSON
        if output.resolve().exists() and not (output.is_file() or output.is_dir()):
            return "it is no plain file"
        with contextlib.suppress(FileNotFoundError, ValueError):  # "." has no name: a folder, which is said later
            sidecar_path(output).lstat()
        if output.parent.is_dir() and output.suffix:
            probe = partial_path(output.parent, 0, 0, output)
            probe.touch()
            probe.unlink()
    except UnicodeEncodeError:
        return "it is not UTF-8"
    except RuntimeError:  # pathlib's word for a link to itself, before Python 3.13
        return "it is a link to itself"
    except OSError as error:
        return "" if error.errno in FOLDER_ERRORS else error.strerror or str(error)
    return ""


def _check_room(folder: Path, pixels: int, field: str) -> None:
    """Fail with code disk_full where the disk of a folder, which need not exist yet, is too full for so many pixels."""
    free, needed_bytes = free_bytes(folder), RESERVE_BYTES + int(BYTES_PER_PIXEL * pixels)
    if free is not None and free < needed_bytes:
        raise OutputError(
            "there is too little room on the disk",
            code="disk_full",
            field=field,
            got=f"{gib(free)} free for {folder}",
            expected=f"at least {gib(needed_bytes)}",
            try_instead="free some space, or another " + ("--outputs" if field == "output" else "--state-dir"),
        )


@partial(Once, size=4)
def _check_library(outputs: Path, second: int) -> None:
    """Fail where a library takes no file; one that did is not asked again within the same second: each time costs the
    disk two writes, and 50 clients may submit at once."""
    _check_takes_a_file(outputs, outputs / PARTIAL)


def _check_takes_a_file(told: Path, folder: Path) -> None:
    """Fail where a file cannot be written to `folder`, which is made; the error names the folder `told`."""
    probe = folder / f".turbodiff-{os.getpid()}"
    try:
        make_folder(folder, ours=folder.name == PARTIAL, link=folder.name != PARTIAL)
        try:
            write_synced(probe, b"?")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(told, error.strerror or str(error)) from None
