"""The table of `outputs/seeds.md`: six cells a line, as people keep it by hand; pure text in, text out.

    | 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |
    |---|---|---|---|---|---|
    | 樱花树下的武士,风吹起和服下摆 | 42 | Wan2.1-1.3B | 480p | 动作流畅,光影绝美 | |

An empty cell is one blank. Inside a cell `\\|` is a bar, `\\n` a line break and `\\\\` a backslash.
"""

import re
from typing import NamedTuple

HEADER = "| 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |"
RULE = "|---|---|---|---|---|---|"

_CELL = re.compile(r"((?:\\.|[^\\|])*\\?)\|")
_ESCAPES = {"\\": "\\\\", "|": "\\|", "\n": "\\n", "\r": "\\r"}
_ESCAPING = str.maketrans(_ESCAPES)
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


class Row(NamedTuple):
    """One line of the table, cell by cell; `raw` is the line it was read from, "" for one of our own."""

    prompt: str
    seed: str
    model: str
    resolution: str
    rating: str = ""
    note: str = ""
    raw: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes two rows the same clip: prompt, seed, model, resolution."""
        return self.prompt, self.seed, self.model, self.resolution


def write_row(row: Row) -> str:
    """The line of a row; one that was read comes out byte for byte."""
    if row.raw:
        return row.raw
    cells = (cell.strip() for cell in row[:6])
    return "|" + "".join(f" {_escaped(cell)} |" if cell else " |" for cell in cells)


def read_row(line: str) -> Row | None:
    """The row of a line; None for the header, the rule and everything that is not six cells."""
    text = line.strip()
    if not text.startswith("|") or set(text) <= set("|-: "):
        return None
    cells = [_unescaped(cell.strip()) for cell in _CELL.findall(text[1:])]
    if len(cells) != 6 or not cells[0] or (cells[0], cells[1]) == ("提示词", "种子值"):
        return None
    prompt, seed, model, resolution, rating, note = cells
    return Row(prompt, seed, model, resolution, rating, note, line.removesuffix("\r"))


def read_table(text: str) -> list[Row]:
    """The rows of a file, in order."""
    return [row for line in text.removeprefix("\ufeff").split("\n") if (row := read_row(line))]


def write_table(rows: list[Row]) -> str:
    """The file with these rows."""
    return "\n".join([HEADER, RULE, *map(write_row, rows)]) + "\n"


def _escaped(cell: str) -> str:
    return cell.translate(_ESCAPING)


def _unescaped(cell: str) -> str:
    return re.sub(r"\\[\\|nr]", lambda found: _UNESCAPES[found.group()], cell)
