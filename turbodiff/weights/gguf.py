"""Reader of the header of a GGUF file, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Quantised tensors get the dtype `GGUF_<type>`; the library `gguf` is needed only to turn them into numbers (load.py).
"""

import io
import math
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from turbodiff.weights.headers import Header, TensorInfo, bad_file, too_much
from turbodiff.weights.limits import MAX_AXES, MAX_TENSORS, is_shape

ALIGNMENT_BYTES = 32  # unless general.alignment says otherwise
MAX_VALUES = 1 << 12  # of metadata
MAX_ITEMS = 600_000  # texts in the arrays of a file: UMT5's vocabulary has 256,384
MAX_TEXT = 1 << 20
MAX_BYTES = 32 << 20  # of the header, without arrays of numbers: a vocabulary takes 6 MB
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF: the shape of a tensor of more than 4 axes


class Type(NamedTuple):
    """A tensor type of ggml: values per block and bytes per block."""

    name: str
    block: int
    nbytes: int


TYPES = {
    0: Type("F32", 1, 4), 1: Type("F16", 1, 2), 30: Type("BF16", 1, 2), 28: Type("F64", 1, 8),
    2: Type("GGUF_Q4_0", 32, 18), 3: Type("GGUF_Q4_1", 32, 20), 6: Type("GGUF_Q5_0", 32, 22),
    7: Type("GGUF_Q5_1", 32, 24), 8: Type("GGUF_Q8_0", 32, 34), 10: Type("GGUF_Q2_K", 256, 84),
    11: Type("GGUF_Q3_K", 256, 110), 12: Type("GGUF_Q4_K", 256, 144), 13: Type("GGUF_Q5_K", 256, 176),
    14: Type("GGUF_Q6_K", 256, 210), 16: Type("GGUF_IQ2_XXS", 256, 66), 17: Type("GGUF_IQ2_XS", 256, 74),
    18: Type("GGUF_IQ3_XXS", 256, 98), 19: Type("GGUF_IQ1_S", 256, 50), 21: Type("GGUF_IQ3_S", 256, 110),
    22: Type("GGUF_IQ2_S", 256, 82), 29: Type("GGUF_IQ1_M", 256, 56), 34: Type("GGUF_TQ1_0", 256, 54),
    35: Type("GGUF_TQ2_0", 256, 66), 39: Type("GGUF_MXFP4", 32, 17),
    20: Type("GGUF_IQ4_NL", 32, 18), 23: Type("GGUF_IQ4_XS", 256, 136),
}  # fmt: skip
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class _Cursor:
    """Reads little-endian values from a file of `size` bytes; running off its end is a ValueError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at, self.taken, self.texts = file, size, 0, 0, 0

    def take(self, count: int) -> bytes:
        part = self.file.read(count) if 0 <= count <= MAX_TEXT else b""
        if len(part) != count:
            raise ValueError("the header is cut short")
        self.at += count
        self.taken += count
        if self.taken > MAX_BYTES:
            raise OverflowError(f"a header of more than {MAX_BYTES} bytes")
        return part

    def skip(self, count: int) -> None:
        if not 0 <= count <= self.size - self.at:
            raise ValueError("the header is cut short")
        self.file.seek(count, io.SEEK_CUR)
        self.at += count

    def integer(self, code: str) -> int:
        number: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return number

    def string(self) -> str:
        self.texts += 1
        if self.texts > MAX_ITEMS:
            raise OverflowError(f"more than {MAX_ITEMS} texts")
        return self.take(self.integer("Q")).decode("utf-8")

    def value(self, kind: int) -> object:
        """One value of the metadata: a number, a text, a list of few numbers; None for what nobody here asks for."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.integer("I"), self.integer("Q")
            if inner == STRING:
                for _ in range(min(count, MAX_ITEMS + 1)):
                    self.string()
                return None
            if inner not in SCALARS or count >= 1 << 48:
                raise ValueError("an array of impossible kind or size")
            if count <= MAX_AXES:
                return [self.value(inner) for _ in range(count)]
            self.skip(count * struct.calcsize(f"<{SCALARS[inner]}"))
            return None
        if kind not in SCALARS:
            raise ValueError(f"metadata of unknown type {kind}")
        scalar: object = struct.unpack(f"<{SCALARS[kind]}", self.take(struct.calcsize(f"<{SCALARS[kind]}")))[0]
        return scalar


def read(path: Path, file: BinaryIO, size: int) -> Header:
    """The header of a GGUF file of `size` bytes, opened at its start.

    Raises:
        FileError: cut short, damaged, larger than any real one, or a tensor type that is not known here.
    """
    try:
        return _parse(path, _Cursor(file, size), size)
    except OverflowError as error:
        raise too_much(path, str(error), f"{MAX_TENSORS} tensors") from None
    except (ValueError, struct.error) as error:
        raise bad_file(path, "the GGUF header is damaged", code="file_damaged", got=str(error)[:120]) from None


def _parse(path: Path, cursor: _Cursor, size: int) -> Header:
    """Magic, counts, metadata, then per tensor: name, shape (fastest axis first), number of its type, offset."""
    cursor.take(4)
    version, tensor_count, value_count = cursor.integer("I"), cursor.integer("Q"), cursor.integer("Q")
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    if tensor_count > MAX_TENSORS or value_count > MAX_VALUES:
        raise OverflowError(f"{tensor_count} tensors and {value_count} values")
    metadata: dict[str, object] = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.integer("I"))
    entries = []
    for _ in range(tensor_count):
        name, axes = cursor.string(), cursor.integer("I")
        if axes > MAX_AXES:
            raise ValueError(f"{axes} axes")
        shape = tuple(cursor.integer("Q") for _ in range(axes))[::-1]
        if not is_shape(shape):
            raise ValueError(f"a tensor of impossible shape {shape}")
        entries.append((name, shape, cursor.integer("I"), cursor.integer("Q")))
    alignment = metadata.get("general.alignment", ALIGNMENT_BYTES)
    if type(alignment) is not int or not 1 <= alignment <= MAX_TEXT:
        raise ValueError(f"alignment {alignment}")
    base = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        if kind not in TYPES:
            raise bad_file(path, "a tensor type that turbodiff does not read", code="key_dtype", key=name, got=kind)
        dtype, block, block_bytes = TYPES[kind]
        row = shape[-1] if shape else 1
        if row % block:
            raise ValueError(f"{name}: rows of {row} values in blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if (end := base + offset + nbytes) > size:
            raise bad_file(
                path, "the file is cut short", code="file_truncated", key=name, got=f"{size} bytes",
                expected=f"{end} bytes",
            )  # fmt: skip
        whole = metadata.get(ORIGINAL_SHAPE + name)
        if isinstance(whole, list) and is_shape(whole) and math.prod(whole) == math.prod(shape):
            shape = tuple(whole)
        tensors[name] = TensorInfo(path, dtype, shape, base + offset, nbytes)
    return Header(path, tensors, {key: value for key, value in metadata.items() if isinstance(value, str)})
