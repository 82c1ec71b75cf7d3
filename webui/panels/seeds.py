"""The seed archive: rows in the guide's order of columns, with posters where the clip is still there."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from webui.markup import Html, action, download, el, poster
from webui.panels.stage import media_url
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import Seed

COLUMNS = ("prompt", "seed", "model", "resolution", "rating", "note")


@dataclass(frozen=True)
class SeedRow:
    """One row; `poster` is "" where the row came from a file or its clip is gone."""

    row: int
    poster: str
    cells: tuple[str, ...]


def seed_rows(found: Iterable[Seed], posters: Collection[str]) -> list[SeedRow]:
    """Rows of the archive as the table shows them; `posters` are the clips that have one."""
    rows = []
    for seed in found:
        clip = Path(seed.path).stem if seed.path else ""
        cells = tuple(str(getattr(seed.row, name)) for name in COLUMNS)
        rows.append(SeedRow(seed.id, media_url(clip, poster=True) if clip in posters else "", cells))
    return rows


def draw(rows: list[SeedRow], searched: bool, words: Words) -> Html:
    """The archive as a table, the guide's columns in the guide's order."""
    if not rows:
        return el("div", words("seeds.no_match" if searched else "seeds.none"), cls="td-blank")
    lines = [el("tr", el("th", ""), [el("th", words(f"seeds.{name}")) for name in COLUMNS], el("th", ""))]
    for row in rows:
        cells = [
            el("td", cell, cls="td-num" if name == "seed" else "")
            for name, cell in zip(COLUMNS, row.cells, strict=True)
        ]
        use = action("use_seed", row.row, words("seeds.use"), form=True, cls="plain")
        lines.append(el("tr", el("td", poster(row.poster, "td-mini")), cells, el("td", use)))
    return el("div", el("table", lines, cls="td-table"), cls="td-scroll td-html", data_rows=len(rows))


def draw_export(words: Words) -> Html:
    """The link that saves the archive as a Markdown table."""
    return download("/seeds.md", words("seeds.export"), cls="td-btn", download="seeds.md")
