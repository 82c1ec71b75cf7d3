"""Header of a GGUF file, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Quantised tensors get the dtype `GGUF_<type>`; the library `gguf` is needed only to turn
them into numbers.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.weights.headers import Header, TensorInfo, bad_file

ALIGNMENT_BYTES = 32  # unless general.alignment says otherwise
MAX_ITEMS = 1 << 20
MAX_AXES = 8
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF: the shape of a tensor of more than 4 axes
PREFIX = "GGUF_"


class Type(NamedTuple):
    """A tensor type of ggml: values per block and bytes per block."""

    name: str
    block: int
    nbytes: int


class Entry(NamedTuple):
    """A tensor as the header lists it: the number of its type, its offset from the start of the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


TYPES = {
    0: Type("F32", 1, 4), 1: Type("F16", 1, 2), 30: Type("BF16", 1, 2), 28: Type("F64", 1, 8),
    2: Type("GGUF_Q4_0", 32, 18), 3: Type("GGUF_Q4_1", 32, 20), 6: Type("GGUF_Q5_0", 32, 22),
    7: Type("GGUF_Q5_1", 32, 24), 8: Type("GGUF_Q8_0", 32, 34), 10: Type("GGUF_Q2_K", 256, 84),
    11: Type("GGUF_Q3_K", 256, 110), 12: Type("GGUF_Q4_K", 256, 144), 13: Type("GGUF_Q5_K", 256, 176),
    14: Type("GGUF_Q6_K", 256, 210), 20: Type("GGUF_IQ4_NL", 32, 18), 23: Type("GGUF_IQ4_XS", 256, 136),
}  # fmt: skip
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class _Cursor:
    """Reads little-endian values from a mapped file; running off its end is a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError("the header is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner == ARRAY or count > MAX_ITEMS:
                raise ValueError("an array of impossible size")
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"metadata of unknown type {kind}")
        return self.number(SCALARS[kind])


def read(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        FileError: cut short, damaged, or a tensor type that is not known here.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(path, _Cursor(data), size)
        except (ValueError, struct.error) as error:
            raise bad_file(path, "the GGUF header is damaged", code="file_damaged", got=str(error)[:120]) from None


def _parse(path: Path, cursor: _Cursor, size: int) -> Header:
    cursor.take(4)
    version, tensor_count, value_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3) or max(tensor_count, value_count) > MAX_ITEMS:
        raise ValueError(f"version {version}, {tensor_count} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT_BYTES)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"alignment {alignment}")
    base = -(-cursor.at // alignment) * alignment
    tensors = {entry.name: _info(path, entry, base, size, metadata) for entry in entries}
    return Header(path, tensors, metadata)


def _entry(cursor: _Cursor) -> Entry:
    name, axes = cursor.string(), cursor.number("I")
    if axes > MAX_AXES:
        raise ValueError(f"{axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]  # ggml names the fastest axis first
    return Entry(name, shape, cursor.number("I"), cursor.number("Q"))


def _info(path: Path, entry: Entry, base: int, size: int, metadata: dict[str, Any]) -> TensorInfo:
    name, shape, kind, offset = entry
    if kind not in TYPES:
        raise bad_file(path, "a tensor type that turbodiff does not read", code="key_dtype", key=name, got=kind)
    dtype, block, block_bytes = TYPES[kind]
    row = shape[-1] if shape else 1
    if row % block:
        raise ValueError(f"{name}: rows of {row} values in blocks of {block}")
    nbytes = math.prod(shape) // block * block_bytes
    if base + offset + nbytes > size:
        raise bad_file(
            path, "the file is cut short", code="file_truncated", key=name, got=f"{size} bytes",
            expected=f"{base + offset + nbytes} bytes",
        )  # fmt: skip
    whole = metadata.get(ORIGINAL_SHAPE + name)
    if isinstance(whole, list) and math.prod(whole) == math.prod(shape):
        shape = tuple(whole)
    return TensorInfo(path, dtype, shape, base + offset, nbytes)


def dequantize(data: Any, dtype: str) -> Any:
    """Blocks (numpy uint8 [rows, bytes of a row]) of type `GGUF_<type>` -> numpy float32 [rows, values of a row].

    Raises:
        FileError: the library is not installed.
    """
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize as library
    except ImportError:
        raise FileError(
            "GGUF weights need the gguf package", code="gguf_missing", try_instead="pip install 'turbodiff[gguf]'"
        ) from None
    return library(data, GGMLQuantizationType[dtype.removeprefix(PREFIX)])
