"""The contact sheet of a grid: made by whichever run finishes the last cell, a clip of the library like the others."""

from pathlib import Path

from turbodiff.archive.grid_sheets import finish_grid, note_cell
from turbodiff.runtime.attempt import Attempt
from turbodiff.spec.events import NoticeEvent


def cell_done(attempt: Attempt, clip: Path) -> None:
    """Note that a cell of a grid is made; with the last of them make the sheet.

    A sheet that cannot be made is said and fails no job: its clips are there. On a machine that has no library of its
    own nothing is noted: whoever takes the clip home does it (cluster/ports.py).
    """
    cell = attempt.request.grid
    if cell is None or attempt.away:
        return
    try:
        if (whole := note_cell(attempt.state, cell, clip)) is not None:
            sheet = finish_grid(whole, attempt.outputs, clip, attempt.check_cancelled)
            told: dict[str, float | str] = {"clip": sheet.name, "cells": cell.rows * cell.columns}
            attempt.send(NoticeEvent(key="grid_done", text=f"the contact sheet is {sheet}", numbers=told))
    except Exception as error:  # noqa: BLE001  whatever it is, the clip is published
        why: dict[str, float | str] = {"why": str(error)[:200]}
        attempt.send(NoticeEvent(key="grid_failed", text=f"no contact sheet was made: {error}", numbers=why))
