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
_ESCAPED = re.compile(r"\\[\\|nr]")
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


class Row(NamedTuple):
    """One line of the table; the first four cells say which clip; `raw`: the line it was read from, "" for our own."""

    prompt: str
    seed: str
    model: str
    resolution: str
    rating: str = ""
    note: str = ""
    raw: str = ""


def read_table(text: str) -> list[Row]:
    """The rows of a file, in order; the header, the rule and every line that is not six cells are left out."""
    rows = []
    for line in text.removeprefix("\ufeff").split("\n"):
        bare = line.strip()
        if not bare.startswith("|") or set(bare) <= set("|-: "):
            continue
        cells = [
            _ESCAPED.sub(lambda found: _UNESCAPES[found.group()], cell.strip()) for cell in _CELL.findall(bare[1:])
        ]
        if len(cells) == 6 and cells[0] and (cells[0], cells[1]) != ("提示词", "种子值"):
            prompt, seed, model, resolution, rating, note = cells
            rows.append(Row(prompt, seed, model, resolution, rating, note, line.removesuffix("\r")))
    return rows


def write_table(rows: list[Row]) -> str:
    """The file with these rows; one that was read comes out byte for byte."""
    lines = [HEADER, RULE]
    for row in rows:
        cells = (cell.strip().translate(_ESCAPING) for cell in row[:6])
        lines.append(row.raw or "|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join(lines) + "\n"
