"""What a checkpoint's header says of each tensor (dtype, shape, place of its bytes), and the reader of safetensors.

Nothing of a tensor is read; every offset is inside its file or the file is refused. dtypes carry the names of
safetensors (https://huggingface.co/docs/safetensors). Other formats: pth.py, gguf.py; detect.py chooses the reader.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from turbodiff.spec.errors import FileError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
TRY_AGAIN = "download it again: turbodiff models pull"


class TensorInfo(NamedTuple):
    """Where one tensor lies: `nbytes` from `offset` in `file`; `stride` in elements, None where contiguous."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stride: tuple[int, ...] | None = None


class Header(NamedTuple):
    """The tensors of one checkpoint: one file, or the shards of a folder together."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""
        return tuple(sorted({info.file for info in self.tensors.values()}))


def bad_file(path: Path, what: str, *, code: str, key: str = "", got: object = "", expected: object = "") -> FileError:
    """The error of a damaged or foreign file: `code` keys the sentence, `key` names the tensor at fault."""
    field = f"{path}: {key[:200]}" if key else str(path)
    return FileError(what, code=code, field=field, got=got, expected=expected, try_instead=TRY_AGAIN)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object from a header or an index of shards.

    Raises:
        FileError: not JSON, not an object, or a name occurs twice.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise bad_file(path, "the header is not JSON", code="file_damaged", got=str(error)[:120]) from None
    if not isinstance(raw, dict):
        raise bad_file(path, "the header is not a JSON object", code="file_damaged", got=type(raw).__name__)
    return raw


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def read_safetensors(path: Path, file: BinaryIO, size: int) -> Header:
    """The header of a safetensors file of `size` bytes, opened at its start.

    Raises:
        FileError: cut short, damaged, or of another kind.
    """
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES:
        got = f"header of {length} bytes"
        raise bad_file(path, "not a safetensors, torch or GGUF file", code="file_foreign", got=got)
    base = 8 + length
    if base > size:
        expected = f"{base} or more"
        raise bad_file(path, "the header is cut short", code="file_truncated", got=f"{size} bytes", expected=expected)
    raw = parse_json(path, file.read(length))
    raw.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in raw.items():
        try:
            dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            got = str(entry)[:120]
            raise bad_file(path, "an entry of the header is damaged", code="file_damaged", key=name, got=got)
        if dtype not in DTYPE_BYTES:
            raise bad_file(path, "unknown dtype", code="key_dtype", key=name, got=dtype, expected=" ".join(DTYPE_BYTES))
        if end - start != (nbytes := math.prod(shape) * DTYPE_BYTES[dtype]):
            raise bad_file(
                path, "bytes do not match shape and dtype", code="file_damaged", key=name,
                got=f"{end - start} bytes", expected=f"{nbytes} for {dtype} {list(shape)}",
            )  # fmt: skip
        tensors[name] = TensorInfo(path, dtype, shape, base + start, nbytes)
    _check_cover(path, tensors, base, size)
    return Header(path, tensors)


def _check_cover(path: Path, tensors: Mapping[str, TensorInfo], base: int, size: int) -> None:
    """Refuse tensors that do not follow each other without gap or overlap up to the end of the file."""
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise bad_file(
                path, "tensors overlap or leave a gap", code="file_damaged", key=name, got=info.offset,
                expected=position,
            )  # fmt: skip
        position += info.nbytes
    got, expected = f"{size} bytes", f"{position} bytes"
    if position > size:
        raise bad_file(path, "the file is cut short", code="file_truncated", got=got, expected=expected)
    if position < size:
        raise bad_file(path, "bytes after the last tensor", code="file_damaged", got=got, expected=expected)
