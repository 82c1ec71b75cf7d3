"""The settings inside an mp4: read straight from its boxes, without ffmpeg, numpy or trust.

With `use_metadata_tags` ffmpeg writes key/value pairs as QuickTime does: moov > udta > meta > keys names them, ilst
beside it holds the values (Apple, QuickTime File Format, "Metadata"). With `faststart` moov stands before the frames.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.files import open_file

TAG = "turbodiff"
MAX_TOP_BOXES = 64
MAX_BOXES = 1024  # at one level: ffmpeg writes ten
MAX_TAG_CHARS = 4 << 20
MAX_MOOV_BYTES = 16 << 20  # an hour of video needs less; a larger one is not a clip of ours


class Box(NamedTuple):
    """A box of an mp4: its four-letter name and what it holds."""

    name: bytes
    body: bytes


def read_tags(clip: Path) -> dict[str, str]:
    """Every text tag of an mp4, {} where there is none.

    Raises:
        FileError: not readable, or not an mp4.
    """
    try:
        with open_file(clip) as file:
            moov = _find_moov(file, clip)
    except OSError as error:
        raise FileError(
            "the clip cannot be read", code="clip_unreadable", field=clip.name, got=error.strerror
        ) from None
    inside = [*_boxes(moov)]
    for meta in (*_inside(inside, b"meta"), *_inside(_boxes(b"".join(_inside(inside, b"udta"))), b"meta")):
        # ISO files put 4 bytes of version and flags before the children, QuickTime files do not
        boxes = list(_boxes(meta if meta[4:8] == b"hdlr" else meta[4:]))
        names = [box.body.decode("utf-8", "replace") for keys in _inside(boxes, b"keys") for box in _boxes(keys[8:])]
        tags = {}
        for item in (item for values in _inside(boxes, b"ilst") for item in _boxes(values)):
            index = int.from_bytes(item.name, "big") - 1  # a box's name is the key's number, counted from one
            for data in _inside(_boxes(item.body, 8), b"data"):
                if 0 <= index < len(names):
                    tags[names[index]] = data[8:].decode("utf-8", "replace")
        return tags
    return {}


def read_settings_tag(clip: Path) -> dict[str, object]:
    """The settings that `ClipWriter` wrote into an mp4, {} where there are none.

    Raises:
        FileError: not readable, or not an mp4.
    """
    text = read_tags(clip).get(TAG, "{}")
    try:
        settings = json.loads(text) if len(text) <= MAX_TAG_CHARS else None
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _find_moov(file: BinaryIO, clip: Path) -> bytes:
    end = file.seek(0, 2)
    start = 0
    for _ in range(MAX_TOP_BOXES):
        if start + 8 > end:
            break
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = int.from_bytes(file.read(8), "big"), 16
        if size == 0:
            size = end - start
        if (start == 0 and name != b"ftyp") or size < header:
            break
        if name == b"moov":
            return file.read(min(size - header, MAX_MOOV_BYTES))
        start += size
    raise FileError("not an mp4 file", code="not_mp4", field=clip.name, expected="an mp4 with its index")


def _boxes(data: bytes, most: int = MAX_BOXES) -> Iterator[Box]:
    at = 0
    for _ in range(most):
        if at + 8 > len(data):
            return
        size, name = struct.unpack_from(">I4s", data, at)
        if size < 8:
            return
        yield Box(name, data[at + 8 : at + size])
        at += size


def _inside(boxes: Iterable[Box], name: bytes) -> Iterator[bytes]:
    return (box.body for box in boxes if box.name == name)
