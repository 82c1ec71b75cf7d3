"""The contact sheet of a grid: cells are noted as their clips arrive, the last one brings it, a clip like the others.

The notes lie in the state folder of the machine that has the library, whichever machines make the clips. Started as a
program, `python -m turbodiff.archive.grid_sheets NOTES CLIP OUTPUTS`, it makes the sheet of a whole grid.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from turbodiff.archive import clips
from turbodiff.media.contact_sheet import sheet_frames, sheet_size
from turbodiff.media.joining import clip_format, tail_of
from turbodiff.media.verify import verify_clip
from turbodiff.media.video import ClipWriter
from turbodiff.spec.clips import Sidecar
from turbodiff.spec.errors import FileError
from turbodiff.spec.files import atomic_write, open_file
from turbodiff.spec.grids import GridCell
from turbodiff.spec.text import printable

FOLDER = "grids"  # of the state folder: a folder of notes for each grid
MAX_NOTE_BYTES = 8192  # the longest path has 4096, a label at most 60 characters
KEPT_DAYS = 30  # notes of a grid that nobody ends


class Note(NamedTuple):
    """What is noted of a cell that was made."""

    clip: Path
    row_label: str
    column_label: str


Cells = dict[tuple[int, int], Note]  # (row, column) -> its note


def note_cell(state: Path, cell: GridCell, clip: Path) -> Path | None:
    """Note that a cell is made; the folder of the notes once there is one for each cell, else None.

    The folder is the caller's, who makes the sheet: of two who note the last two cells at once, one gets it. What a
    killed maker of the sheet left is taken up again.

    Raises:
        OSError: the disk is full, or cannot be written.
        ValueError: the clip's path cannot be written in a line.
    """
    folder = state / FOLDER / cell.id
    whole = folder.with_suffix(".whole")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError), _held(whole):  # nobody makes its sheet
        _give_back(whole)
    lines = [str(clip.absolute()), printable(cell.row_label), printable(cell.column_label)]
    if "\n" in lines[0]:
        raise ValueError("a line ends inside of the clip's path")
    with atomic_write(folder / f"{cell.row}.{cell.column}") as part:
        part.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    if len(cells_of(folder, cell)) < cell.rows * cell.columns:
        return None
    try:
        return folder.rename(whole)
    except OSError:
        if whole.exists() or not folder.exists():  # somebody else has it, or makes the sheet of earlier clips
            return None
        raise


def cells_of(folder: Path, cell: GridCell) -> Cells:
    """The cells of the grid that `cell` is of that were noted. One whose note cannot be read is as if not made."""
    places = [(row, column) for row in range(cell.rows) for column in range(cell.columns)]
    read = {place: _read_note(folder / f"{place[0]}.{place[1]}") for place in places}
    return {place: note for place, note in read.items() if note is not None}


def _read_note(path: Path) -> Note | None:
    try:
        with open_file(path) as file:
            data = file.read(MAX_NOTE_BYTES + 1)
        clip, row_label, column_label, rest = data.decode("utf-8", "surrogateescape").split("\n")
    except (OSError, ValueError):
        return None
    if len(data) > MAX_NOTE_BYTES or rest or b"\0" in data or not Path(clip).is_absolute():
        return None
    # what is no UTF-8 may be the name of a file, and is no letter of a sheet
    if not (row_label + column_label).isprintable():
        return None
    return Note(Path(clip), row_label, column_label)


@contextlib.contextmanager
def _held(whole: Path) -> Iterator[None]:
    """Hold a folder of notes against every other process; the kernel releases it on any death.

    Raises:
        OSError: it is not there, or another holds it (BlockingIOError).
    """
    held = os.open(whole, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(held)


def _give_back(whole: Path) -> None:
    """Let notes wait for the next cell again; those that are there already are newer."""
    folder = whole.with_suffix("")
    folder.mkdir(exist_ok=True)
    for path in whole.iterdir():
        if not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(whole)


def finish_grid(whole: Path, outputs: Path, clip: Path, check: Callable[[], None] = lambda: None) -> Path:
    """The sheet of a whole grid in the library; its notes go, or wait for a cell that is made again.

    Args:
        whole: the notes, from `note_cell`.
        clip: of the last cell, whose sidecar becomes the sheet's.
        check: called for every frame; what it raises ends this.

    Raises:
        TurbodiffError: a clip of it is gone or cannot be read, or the disk is full.
        OSError: so are notes, or somebody else makes the sheet.
    """
    with _held(whole):
        try:
            sheet = _make(whole, outputs, clips.read_sidecar(clip), check)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong is told
                _give_back(whole)
            raise
        shutil.rmtree(whole)
    return sheet


def sweep_notes(state: Path) -> None:
    """Remove the notes of grids that got no cell for KEPT_DAYS. Call it at start, while nobody makes a clip."""
    oldest_s = time.time() - KEPT_DAYS * 86400
    with contextlib.suppress(OSError):
        for folder in (state / FOLDER).iterdir():
            if not folder.is_symlink() and folder.is_dir() and folder.stat().st_mtime < oldest_s:
                shutil.rmtree(folder, ignore_errors=True)


def _make(whole: Path, outputs: Path, sidecar: Sidecar, check: Callable[[], None]) -> Path:
    cell, request = sidecar.request.grid, sidecar.request
    found = cells_of(whole, cell) if cell else {}
    if cell is None or len(found) < cell.rows * cell.columns:
        raise FileError(
            "a note of the grid is gone or cannot be read", code="bad_grid", field="grid", got=f"{len(found)} cells",
            expected=f"{cell.rows * cell.columns} cells" if cell else "a cell", try_instead="make the grid again",
        )  # fmt: skip
    cells = {place: note.clip for place, note in found.items()}
    rows = [found[row, 0].row_label for row in range(cell.rows)]
    columns = [found[0, column].column_label for column in range(cell.columns)]
    width, height, _, _ = sheet_size(cells, cell.rows, cell.columns)
    fps, longest = clip_format(cells[0, 0]).fps, max(tail_of(path).frames for path in cells.values())
    about = f"{rows[0].split(' ')[0]} × {columns[0].split(' ')[0]}"
    partial = clips.partial_path(outputs, sidecar.job, sidecar.attempt).with_suffix(".grid.mp4")
    try:
        writer = ClipWriter(partial, width, height, fps, {"grid": cell.id, "rows": rows, "columns": columns}, longest)
        with writer:
            for frame in sheet_frames(cells, rows, columns):
                check()
                writer.write(frame)
        written = writer.written
        assert written is not None
        verify_clip(written, None, request.prompt)
        facts = {"sha256": written.sha256, "frames": written.frames, "width": width, "height": height, "fps": fps}
        made = sidecar.model_copy(update={**facts, "note": about, "tags": ("grid",), "warnings": ()})
        name = clips.clip_path(
            outputs, "grid", request.seed or 0, request.model, sidecar.created or datetime.now().astimezone()
        )
        return clips.publish(partial, name, made, written.poster)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    finish_grid(Path(sys.argv[1]), Path(sys.argv[3]), Path(sys.argv[2]))
