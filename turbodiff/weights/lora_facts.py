"""What a LoRA file says of itself, for the form: title, trigger words, expert, picture. Nothing of a tensor is read."""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.files import atomic_write
from turbodiff.weights.detect import read_header
from turbodiff.weights.experts import Side, expert_of
from turbodiff.weights.lora_names import DENSE, HIGH, LOW, read_name

TITLES = ("modelspec.title", "ss_output_name")
WORDS = ("modelspec.trigger_phrase", "modelspec.trigger_word", "trigger_words", "trained_words", "ss_training_comment")
TAGS = "ss_tag_frequency"  # kohya: {folder: {tag: how often}} as JSON
THUMBNAIL, MAX_PICTURE_CHARS = "modelspec.thumbnail", 4 << 20
BLOCK = re.compile(r"blocks[._]\d+")
PICTURES = (".png", ".preview.png", ".jpg", ".jpeg", ".webp")
MAX_WORDS, MAX_WORD_CHARS, MAX_TAGS_BYTES = 6, 60, 4 << 20


class LoraFacts(NamedTuple):
    """Title and trigger words, "" and () where the file names none; the expert that it seems to be for, or "".

    dense: some change of a weight is no low rank. dim: the width that most low-rank factors have beside their rank.
    block_bytes: 16-bit factors of the linears of one block, each of the largest rank that it has in any block: beside
    INT8 weights every block holds as many, zeros where the file has none (runtime/loras.py).
    """

    title: str = ""
    words: tuple[str, ...] = ()
    expert: Side = ""
    dense: bool = False
    dim: int = 0
    block_bytes: int = 0


def lora_facts(path: Path) -> LoraFacts:
    """What the metadata and the name tell; nothing where the file cannot be read, which is said when it is used."""
    try:
        stat = path.stat()
    except OSError:
        return LoraFacts()
    return _facts(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _facts(path: Path, _size: int, _mtime_ns: int) -> LoraFacts:
    try:
        header = read_header(path)
        metadata, names = header.metadata, header.written_names
        shapes = {name: info.shape for name, info in header.tensors.items() if len(info.shape) == 2}
    except FileError:
        metadata, names, shapes = {}, (), {}
    # keys first: a file with both experts is for both, whatever its name says
    low = sum(1 for name in names if LOW.search(name))
    high = len(names) - low if low else sum(1 for name in names if HIGH.search(name))
    side = expert_of(path, metadata, alone=True)[0] if not low and not high else "low" if not high else "high"
    expert: Side = "" if (low and high) or side == "single" else side
    title = next((metadata[key] for key in TITLES if metadata.get(key)), "")[:MAX_WORD_CHARS]
    named = next((metadata[key] for key in WORDS if metadata.get(key)), "")
    words = [word.strip() for word in named[: MAX_WORDS * MAX_WORD_CHARS].split(",")] if named else _frequent(metadata)
    told = tuple(word[:MAX_WORD_CHARS] for word in words if word.isprintable() and word)[:MAX_WORDS]
    dense = any(read_name(name).part in DENSE and not name.endswith(".bias") for name in names)
    widths = Counter(max(shape) for name, shape in shapes.items() if read_name(name).part in ("down", "up"))
    dim = next((width for width, _ in widths.most_common(1)), 0)
    most: dict[tuple[str, str], int] = {}
    for name, shape in shapes.items():
        stored = read_name(name)
        if stored.part in ("down", "up") and BLOCK.search(stored.owner):
            factor = (BLOCK.sub("", stored.owner), stored.part)
            most[factor] = max(most.get(factor, 0), 2 * shape[0] * shape[1])
    return LoraFacts(title if title.isprintable() else "", told, expert, dense, dim, sum(most.values()))


def _frequent(metadata: Mapping[str, str]) -> list[str]:
    """The tags that were trained most often."""
    try:
        folders = json.loads(metadata.get(TAGS, "{}")[:MAX_TAGS_BYTES])
        counts = [(n, tag) for tags in folders.values() for tag, n in tags.items() if isinstance(n, int)]
    except (ValueError, AttributeError, RecursionError):
        return []
    return [tag.strip() for _, tag in sorted(counts, key=lambda pair: (-pair[0], pair[1]))[:MAX_WORDS]]


def lora_picture(lora: Path, folder: Path) -> Path | None:
    """The picture beside a LoRA, or that of its metadata (`modelspec.thumbnail`, a data: URL) written into `folder`.

    Not one byte of it is decoded here; None where there is none that can be read.
    """
    beside = [lora.with_suffix(ending) for ending in PICTURES]
    if found := next((path for path in beside if path.is_file()), None):
        return found
    try:
        head, _, text = read_header(lora).metadata.get(THUMBNAIL, "").partition(",")
        if not head.startswith("data:image/") or not head.endswith(";base64") or len(text) > MAX_PICTURE_CHARS:
            return None
        data = base64.b64decode(text, validate=True)
        kept = folder / f"lora-{hashlib.sha256(data).hexdigest()[:24]}"
        if not kept.exists():
            with atomic_write(kept) as part:
                part.write_bytes(data)
    except (FileError, ValueError, OSError):
        return None
    return kept
