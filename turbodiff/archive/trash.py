"""Deleted clips: they wait in `outputs/.trash` for 30 days, each in the folder of its day, and go back by an undo.

    outputs/.trash/20261123T003107-5f0c1a/2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4    and what lay beside it

One deletion is one batch; its name says when. Every file gets its second name by link(2) before it loses its first,
the clip first of all: a process killed anywhere leaves each clip in the library or in the trash, never nowhere.
"""

import contextlib
import errno
import itertools
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from turbodiff.archive.clips import day_folders, link_all, numbered, poster_path, sidecar_path
from turbodiff.spec.errors import FileError
from turbodiff.spec.files import files_of, make_folder, output_error, sync

TRASH = ".trash"
TRASH_DAYS = 30
_BATCH = re.compile(r"(\d{8}T\d{6})-[0-9a-f]{6}")


def move_to_trash(outputs: Path, clips: Sequence[Path], now: datetime) -> str:
    """Move clips of the library with what lies beside them into a new batch; returns its name.

    Raises:
        OutputError: the disk refused; what was not moved is still in the library.
    """
    try:
        make_folder(outputs / TRASH, ours=True, link=False)
    except OSError as error:
        raise output_error(outputs / TRASH, error.strerror or str(error)) from None
    batch = f"{now.astimezone(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    for clip in clips:
        _move(clip, outputs / TRASH / batch / clip.parent.name / clip.name)
    return batch


def restore(outputs: Path, clips: Iterable[Path]) -> list[Path]:
    """Move clips of the trash back to where they were, beside a clip that took a name meanwhile; returns their paths.

    Raises:
        OutputError: the disk refused; what was not moved is still in the trash.
    """
    found = []
    for clip in clips:
        home = outputs / clip.parent.name / clip.name
        if home.parent.is_symlink():
            raise output_error(home.parent, "it is a link")
        free = (name for number in itertools.count(1) if _is_free(clip, name := numbered(home, number)))
        home = next(free)
        if clip.is_file():  # else somebody else restored it just now
            _move(clip, home)
            found.append(home)
        _remove_empty(clip.parent)
    return found


def erase(clips: Iterable[Path]) -> None:
    """Remove clips of the trash for ever, with what lies beside them.

    Raises:
        FileError: the disk refused.
    """
    for clip in clips:
        try:
            for path in (clip, sidecar_path(clip), poster_path(clip)):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise FileError(
                "the file cannot be removed", code="not_removed", field=clip.name, got=error.strerror or error,
                try_instead="remove it by hand",
            ) from None  # fmt: skip
        _remove_empty(clip.parent)


def trash_folders(outputs: Path) -> list[Path]:
    """The folders of clips in the trash, one a batch and day."""
    found = []
    with contextlib.suppress(OSError):
        for batch in () if (outputs / TRASH).is_symlink() else (outputs / TRASH).iterdir():
            if _BATCH.fullmatch(batch.name) and batch.is_dir() and not batch.is_symlink():
                found += day_folders(batch)
    return found


def purge(outputs: Path, now: datetime) -> None:
    """Remove what was deleted more than 30 days ago. Files that are not of a clip stay."""
    for folder in trash_folders(outputs):
        with contextlib.suppress(ValueError, FileError):
            deleted = datetime.strptime(folder.parent.name[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
            if now - deleted > timedelta(days=TRASH_DAYS):
                erase(path for path in files_of(folder) if path.suffix == ".mp4")


def _pairs(clip: Path, target: Path) -> list[tuple[Path, Path]]:
    """The files of a clip with their names at `target`. What else stands beside it, such as a folder, stays there."""
    names = (lambda path: path, sidecar_path, poster_path)
    return [(name(clip), name(target)) for name in names if name(clip).is_file()]


def _is_free(clip: Path, target: Path) -> bool:
    """Whether every file of a clip can have its name at `target`: nothing has it, not even a link to nowhere, or it is
    this file's other name, from a move that was cut off."""
    return not any(
        os.path.lexists(goal) and not (goal.exists() and source.exists() and goal.samefile(source))
        for source, goal in _pairs(clip, target)
    )


def _move(clip: Path, target: Path) -> None:
    pairs = _pairs(clip, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not link_all([(source, goal) for source, goal in pairs if not goal.exists()]):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        sync(target.parent)
        for source, _ in pairs:
            source.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(target.parent, error.strerror or str(error)) from None


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a day in the trash and its batch where nothing is left in them."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()
