"""The Markdown table of the seed archive: bytes <-> text <-> rows.

    | 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |
    |---|---|---|---|---|---|
    | 樱花树下的武士,风吹起和服下摆 | 42 | Wan2.1-1.3B | 480p | 动作流畅,光影绝美 | |

Six cells a line. An empty cell is one blank. Inside a cell `\\|` is a bar, `\\n` a line break and `\\\\` a backslash.
"""

import codecs
import re
from itertools import pairwise
from typing import NamedTuple

from turbodiff.spec.errors import FileError

HEADER = "| 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |"
RULE = "|---|---|---|---|---|---|"
MAX_TABLE_BYTES = 64 << 20  # 100,000 rows of long prompts; more is no table that a person keeps
MARKS = (  # of Unicode at the start of a file; UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
HEADS = {("提示词", "种子值"), ("prompt", "seed")}
# Frequent characters of modern Chinese: 13 to 36 % of Chinese prompts of seven characters and more, none of those of
# Korean, Japanese, Russian and Greek prompts that read as GB18030 (the ones in tests/archive/test_seeds.py).
FREQUENT = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体"
)
FREQUENT_SHARE = 0.08
OTHER_SHARE = 0.2
# signs, kana and wide letters, which stand at the same place in the Chinese and Japanese standards; emoji
_NEUTRAL = re.compile(
    "[\u2010-\u2027\u20ac\u2605\u2606\u3000-\u30ff\uff00-\uffef\u00d7\u00b7\U00010000-\U0010ffff\u2600-\u27bf\ufe0f]"
)
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


class Encoding(NamedTuple):
    """How a file turns text into bytes: the codec, and the mark before the text ("" without one)."""

    codec: str = "utf-8"
    mark: bytes = b""

    def encode(self, text: str) -> bytes:
        """The bytes of a text; half a surrogate pair, which no encoding has, becomes "?"."""
        return self.mark + text.encode(self.codec, "replace")


def decode_table(data: bytes, name: str) -> tuple[str, Encoding]:
    """The text of a file and how it was encoded, recognised without loss: UTF-8, UTF-16 and -32, GBK and GB18030.

    Notepad and Excel on a Chinese Windows write GBK ("ANSI") or UTF-16 ("Unicode").

    Raises:
        FileError: another encoding, binary data, or more than 64 MiB.
    """
    if len(data) > MAX_TABLE_BYTES:
        raise FileError(
            "the seed table is too large", code="seeds_large", field=name, got=f"{len(data) >> 20} MiB",
            expected=f"at most {MAX_TABLE_BYTES >> 20} MiB", try_instead="split it into several files",
        )  # fmt: skip
    for mark, codec in MARKS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], Encoding(codec, mark), name)
    if b"\0" in data:  # UTF-16 without a mark: the other half of each ASCII letter, bar and digit
        big_endian = data[0::2].count(0) > data[1::2].count(0)
        return _decoded(data, Encoding("utf-16-be" if big_endian else "utf-16-le"), name)
    try:
        return data.decode(), Encoding()
    except UnicodeDecodeError as error:
        wrong = error
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        text = ""
    # text in another encoding reads as GB18030 too: as Greek, boxes or rare characters, or as any of the common ones
    hanzi = [character for character in text if "\u4e00" <= character <= "\u9fff"]
    frequent = sum(character in FREQUENT for character in hanzi)
    others = sum(character > "\x7f" and not _NEUTRAL.match(character) for character in text) - len(hanzi)
    told = "提示词" in text and "种子值" in text
    if not told and (not text or frequent < FREQUENT_SHARE * len(hanzi) or others > OTHER_SHARE * len(hanzi)):
        raise _unknown(data, wrong, name)
    return text, Encoding("gb18030")


def _decoded(data: bytes, encoding: Encoding, name: str) -> tuple[str, Encoding]:
    try:
        return data.decode(encoding.codec), encoding
    except UnicodeDecodeError as error:
        raise _unknown(data, error, name) from None


def _unknown(data: bytes, error: UnicodeDecodeError, name: str) -> FileError:
    line = data.count(b"\n", 0, error.start) + 1
    got = f"line {line}: bytes {data[error.start : error.start + 8].hex(' ')}"
    return FileError(
        "the encoding of the seed table is not known; the file was left as it is", code="seeds_encoding", field=name,
        got=got, expected="UTF-8, UTF-16, GBK or GB18030",
        try_instead="open it in an editor and save it as UTF-8",
    )  # fmt: skip


def read_table(text: str) -> list[Row]:
    """The rows of a file, in order; headers, rules and every line that is not six cells are left out."""
    rows = []
    before = ""
    for line, after in pairwise([*text.removeprefix("\ufeff").split("\n"), ""]):
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


def write_table(rows: list[Row]) -> str:
    """The file with these rows; one that was read comes out byte for byte."""
    lines = [HEADER, RULE]
    for row in rows:
        cells = (cell.strip().translate(_ESCAPING) for cell in row[:6])
        lines.append(row.raw or "|" + "".join(f" {cell} |" if cell else " |" for cell in cells))
    return "\n".join(lines) + "\n"
