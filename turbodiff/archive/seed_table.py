"""The Markdown table of the seed archive: bytes <-> text <-> rows.

    | 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |
    |---|---|---|---|---|---|
    | 樱花树下的武士,风吹起和服下摆 | 42 | Wan2.1-1.3B | 480p | 动作流畅,光影绝美 | |

Six cells a line. An empty cell is one blank. Inside a cell `\\|` is a bar, `\\n` a line break and `\\\\` a backslash.
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from turbodiff.spec.encodings import Encoding, UnknownEncodingError, decode
from turbodiff.spec.errors import FileError

HEADER = "| 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |"
RULE = "|---|---|---|---|---|---|"
MAX_TABLE_BYTES = 64 << 20  # 100,000 rows of long prompts; more is no table that a person keeps
HEADS = {("提示词", "种子值"), ("prompt", "seed")}
_PARTS = re.compile(r"\\.|[^\\|]+|\\|\|", re.DOTALL)
_ESCAPED = re.compile(r"\\[\\|nr]")
_ESCAPES = {"\\": "\\\\", "|": "\\|", "\n": "\\n", "\r": "\\r"}
_ESCAPING = str.maketrans(_ESCAPES)
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


def decode_table(data: bytes, name: str) -> tuple[str, Encoding]:
    """The text of a file and how it was encoded, recognised without loss (spec/encodings.py tells what can be).

    Raises:
        FileError: another encoding, binary data, or more than 64 MiB.
    """
    if len(data) > MAX_TABLE_BYTES:
        raise FileError(
            "the seed table is too large", code="seeds_large", field=name, got=f"{len(data) >> 20} MiB",
            expected=f"at most {MAX_TABLE_BYTES >> 20} MiB", try_instead="split it into several files",
        )  # fmt: skip
    try:
        return decode(data, sure=("提示词", "种子值"))
    except UnknownEncodingError as error:
        raise FileError(
            "the encoding of the seed table is not known; the file was left as it is", code="seeds_encoding",
            field=name, got=error.got, expected="UTF-8, UTF-16, GBK or GB18030",
            try_instead="open it in an editor and save it as UTF-8",
        ) from None  # fmt: skip


def read_table(text: str) -> list[Row]:
    """The rows of a file, in order; headers, rules and every line that is not six cells are left out.

    A line ends with a line feed; in a file without any, with a carriage return (the old Macintosh).
    """
    rows = []
    before = ""
    end = "\n" if "\n" in text else "\r"
    for line, after in pairwise([*text.removeprefix("\ufeff").split(end), ""]):
        bare, heads_a_table = line.strip(), not before.startswith("|")
        before = bare
        if not bare.startswith("|") or _is_rule(bare):
            continue
        cells = _cells(bare[1:])
        if len(cells) != 6 or not cells[0]:
            continue
        # Markdown: the line above the first rule of a table is its header, in whichever language
        if heads_a_table and _is_rule(after.strip()) and not cells[1].lstrip("-").isdecimal():
            continue
        if (cells[0].lower(), cells[1].lower()) in HEADS:
            continue
        prompt, seed, model, resolution, rating, note = cells
        rows.append(Row(prompt, seed, model, resolution, rating, note, line.removesuffix("\r")))
    return rows


def _is_rule(bare: str) -> bool:
    return "-" in bare and set(bare) <= set("|-: ")


def _cells(bare: str) -> list[str]:
    """What stands before each bar, without escapes; a backslash before the line's last bar ends its cell as well."""
    raw: list[str] = []
    parts: list[str] = []
    for part in _PARTS.findall(bare):
        if part == "|":
            raw.append("".join(parts))
            parts = []
        else:
            parts.append(part)
    if "\\|" in parts:
        raw.append("".join(parts[: len(parts) - 1 - parts[::-1].index("\\|")]) + "\\")
    return [_ESCAPED.sub(lambda found: _UNESCAPES[found.group()], cell.strip()) for cell in raw]


def write_table(rows: Iterable[Row]) -> str:
    """The file with these rows; one that was read comes out byte for byte."""
    lines = [HEADER, RULE]
    for row in rows:
        cells = (cell.strip().translate(_ESCAPING) for cell in row[:6])
        lines.append(row.raw or "|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join(lines) + "\n"
