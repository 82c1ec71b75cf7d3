"""The seed archive: rows in the guide's order of columns, with posters where the clip is still there."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webui.view.clips import media_url

COLUMNS = ("prompt", "seed", "model", "resolution", "rating", "note")


@dataclass(frozen=True)
class SeedRow:
    """One row; `clip` is "" where the row came from a file or its clip is gone."""

    row: int
    clip: str
    poster: str
    cells: tuple[str, ...]


def rows(found: list[Any], posters: Collection[str]) -> list[SeedRow]:
    """Rows of the archive as the table shows them; `posters` are the clips that have one."""
    return [_row(seed, posters) for seed in found]


def _row(seed: Any, posters: Collection[str]) -> SeedRow:
    clip = Path(seed.path).stem if seed.path else ""
    cells = tuple(str(getattr(seed.row, name)) for name in COLUMNS)
    return SeedRow(seed.id, clip, media_url(clip, poster=True) if clip in posters else "", cells)
