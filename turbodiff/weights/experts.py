"""Which expert of a two-network model a file is: what a person says, then its metadata, its name, the folder.

The two networks of Wan2.2 A14B have the same keys and shapes, so no header tells. A name is asked only where a model
with two networks has these sizes, and what it tells must be about noise: `HighNoise`, `low_noise`, `i2vHighV20`,
`-HN-`, `_L_`, `高噪声`; never `High Quality`, `low_vram`, `高清` or `低显存`, nor `高低噪`, which is both. A folder
is asked only where the file's own name and title say nothing, and one that calls itself Wan2.1 is no half of a pair,
whatever folder it lies in. A person says it in a file beside the weights, `NAME.toml`, with `expert = "high"`, "low"
or "single" (`turbodiff models tell FILE --expert high` writes it).
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, cast

from turbodiff.spec.errors import FileError
from turbodiff.spec.files import atomic_write, check_file

Side = Literal["high", "low", "single", ""]
SIDECAR = ".toml"
MAX_SIDECAR_BYTES = 1 << 16
TITLES = ("general.name", "general.basename", "modelspec.title", "title", "name")  # of GGUF and of safetensors
TASK = re.compile(r"(?i)(?<![a-z])t?i2v|t2v|(?<=[a-z])i2v|(?<![a-z])q\d_k_[sml](?![a-z])")  # and GGUF's sizes
HAN = "[\u4e00-\u9fff]"
# 高噪声, 低噪音, 噪声高, 高雜訊, 高ノイズ; 噪点 is the grain of a photograph
NOISE = r"(?<![高低])[高低][\s_-]?(?:噪(?![点點])[声聲音]?|[雜杂][訊讯]|ノイズ)|噪[声聲音]?[\s_-]?[高低](?!" + HAN + ")"
ALONE = f"(?<!{HAN})[高低](?!{HAN})"  # 高 and 低 begin many words
TOKEN = re.compile(rf"(?P<noise>{NOISE})|{ALONE}|(?:(?!{NOISE}){HAN})+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
OTHER_WAY = str.maketrans("高低", "低高")
SIDES: Mapping[str, Literal["high", "low"]] = {
    "high": "high", "hi": "high", "h": "high", "hn": "high", "highnoise": "high", "noisehigh": "high",
    "low": "low", "lo": "low", "l": "low", "ln": "low", "lownoise": "low", "noiselow": "low",
}  # fmt: skip
CLEAR = ("hn", "ln", "highnoise", "lownoise", "noisehigh", "noiselow")
OTHER = {"high": "low", "low": "high", "hi": "lo", "lo": "hi", "h": "l", "l": "h", "hn": "ln", "ln": "hn"}
# What high and low may be about beside noise; such a word stands after or before
ABOUT = re.compile(
    r"(?:显存|顯存|内存|記憶體|清|[质質]|品[质質]|[画畫]|分辨|解析|[帧幀步配速精频頻耗]|[细細]|延[迟遲]|[动動]|光|噪[点點]).*|"
    r"quality|qual|v?ram|mem|gpu|res|def|steps?$|poly|light|key|motion|cfg|rank|speed|end|fps|precision|detail|bit|cost|"
    r"power|angle|cam|level|fidelity|compress|size|latency|budget|dim|loss|lr|score|shot|heel|school|fantasy|sigma|freq|contrast|dynamic|kick|energy|impact|pitch|tech|fashion"
)
WAN21 = re.compile(r"(?i)wan[\W_x]*2[\W_]*1(?!\d)")
WAN22 = re.compile(r"(?i)wan[\W_]*2[\W_]*2(?!\d)|a14b|wan2214b")
PLAIN_FOLDER = re.compile(
    r"noise|models?|experts?|transformer|dit|unet|wan|diffusion|net(work)?|\d+|模型|模型文件|专家|專家"
)
JOINING = ("and", "n", "or", "to", "和", "与", "與", "及")


class Told(NamedTuple):
    """What a name tells: the side or "", and whether it says noise or only high and low."""

    side: Side
    clear: bool = False


NOTHING = Told("")


def told_by_person(path: Path) -> Side:
    """What the file beside the weights says; "" where there is none or it does not say."""
    beside = path.with_name(path.name + SIDECAR)
    try:
        if not beside.is_file() or beside.stat().st_size > MAX_SIDECAR_BYTES:
            return ""
        side = tomllib.loads(beside.read_text("utf-8")).get("expert", "")
    except (OSError, ValueError, RecursionError):
        return ""
    return cast(Side, side) if side in ("high", "low", "single") else ""


def tell(path: Path, side: Side) -> Path:
    """Write what a person says of a file beside it, in place of what was said before; returns the file written.

    Raises:
        FileError: there is no such file, or nothing can be written there.
    """
    try:
        check_file(path)
        path.stat()
    except FileNotFoundError:
        raise FileError("there is no such file", code="file_missing", field=str(path)) from None
    except OSError as error:
        raise FileError("cannot be read", code="file_unreadable", field=str(path), got=error.strerror) from None
    beside, line = path.with_name(path.name + SIDECAR), f'expert = "{side}"'
    try:
        lines = beside.read_text("utf-8").splitlines() if beside.is_file() else []
        lines = [old for old in lines if not re.match(r"\s*expert\s*=", old)]
        with atomic_write(beside) as part:
            part.write_text("\n".join([line, *lines]) + "\n", "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError("cannot be written", code="output_unwritable", field=str(beside), got=error) from None
    return beside


def expert_of(path: Path, metadata: Mapping[str, str], *, alone: bool) -> tuple[Side, bool]:
    """The side that a file is, "" where nothing tells, and whether its name says that it must be one of two.

    `alone`: a model with one network has the same sizes, so that high and low without a word of noise tell only in a
    name that says Wan2.2, or where the other one lies beside it.
    """
    if side := told_by_person(path):
        return side, False
    titles = " ".join(metadata.get(title, "")[:200] for title in TITLES)
    own = f"{path.stem} {titles}"
    single = alone and not WAN22.search(own) and WAN21.search(own) is not None
    hint = bool(WAN22.search(own) or (not single and WAN22.search(path.parent.name)))
    named = _told(path.stem)
    if named.side and not named.clear and alone and not hint and not _has_counterpart(path, path.stem):
        named = NOTHING
    title = _told(titles)
    if title.clear and named.side and title.side != named.side:
        return "", True  # they contradict each other
    side = title.side if title.clear else named.side
    return side or ("" if single else _told_by_folders(path)), hint


def _tokens(text: str) -> Iterator[tuple[str, int, int]]:
    plain = TASK.sub(lambda match: "/" * len(match[0]), text)
    for match in TOKEN.finditer(plain):
        word = match[0].lower()
        if match["noise"]:
            word = "highnoise" if "高" in word else "lownoise"
        yield {"高": "high", "低": "low"}.get(word, word), match.start(), match.end()


def _told(text: str) -> Told:
    words = [word for word, *_ in _tokens(text)]
    clear, loose = set[Side](), set[Side]()
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        if before == "noise" and place > 1 and words[place - 2] in SIDES:
            before = ""  # that noise is the one before it: high_noise_low_vram
        after = words[place + 1] if place + 1 < len(words) else ""
        joined = next((end for end in ("highnoise", "lownoise") if word.endswith(end) and word != "slownoise"), "")
        side = SIDES.get(joined or word)
        if side is None:
            continue
        rest = [other for other in words[place + 1 : place + 4] if other not in JOINING]
        twin = rest[0] if rest else ""
        if SIDES.get(twin, side) != side and (twin in CLEAR or rest[1:2] == ["noise"]):
            clear.add(side)  # high_low_noise, 高/低噪: a file for both
        if joined or word in CLEAR or after.startswith("noise") or (before == "noise" and word in ("high", "low")):
            clear.add(side)
        elif not ABOUT.match(after) and not ABOUT.fullmatch(before):
            loose.add(side)
    for found, is_clear in ((clear, True), (loose, False)):
        if found:
            return Told(next(iter(found)), is_clear) if len(found) == 1 else NOTHING
    return NOTHING


def _told_by_folders(path: Path) -> Side:
    """What the nearest folder tells, or the next above one that only holds (`transformer`, `models`).

    Of a folder that is about something else, too, a word of noise counts, high or low at its end (`AniSora_v3_high`),
    and what differs from a folder beside it in that word alone; of a farther one only a name about nothing else.
    """
    if path.parent.name in ("transformer", "transformer_2") and (path.parent.parent / "transformer_2").is_dir():
        return "high" if path.parent.name == "transformer" else "low"  # diffusers' names
    nearest = True
    for folder in (path.parent, path.parent.parent):
        told, words = _told(folder.name), [word for word, *_ in _tokens(folder.name)]
        plain = all(PLAIN_FOLDER.fullmatch(word) for word in words if word not in SIDES)
        ends = nearest and words[-1:] == [told.side]
        if told.side and (told.clear or plain or ends or (nearest and _has_counterpart(folder, folder.name))):
            return told.side
        nearest = nearest and plain
    return ""


def _has_counterpart(path: Path, name: str) -> bool:
    """Whether what differs only in high and low lies beside a path whose name, or its stem, is `name`."""
    for word, start, end in _tokens(name):
        if other := OTHER.get(word):
            found, rest = name[start:end], path.name[end:]
            other = other.upper() if found.isupper() else other.title() if found[0].isupper() else other
            other = found.translate(OTHER_WAY) if found in ("高", "低") else other
            if path.with_name(name[:start] + other + rest).exists():
                return True
    return False
