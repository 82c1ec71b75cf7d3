"""What a checkpoint's header says of each tensor (dtype, shape, place of its bytes), and the reader of safetensors.

Nothing of a tensor is read; every offset is inside its file or the file is refused. dtypes carry the names of
safetensors (https://huggingface.co/docs/safetensors). Other formats: pth.py, gguf.py; detect.py chooses the reader.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.weights.limits import MAX_HEADER_BYTES, MAX_MARKS, MAX_TENSORS, is_shape

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
GGUF_PREFIX = "GGUF_"  # of the dtypes of quantised tensors in GGUF files
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
    """The tensors of one checkpoint: one file, or the shards of a folder together.

    `metadata`: what its writer says of it, text by name (safetensors' `__metadata__`, text values of GGUF).
    `inside`: the names of the dicts around the tensors of a torch file, the outer one first; no tensor's name has them.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = MappingProxyType({})
    inside: tuple[str, ...] = ()

    @property
    def written_names(self) -> tuple[str, ...]:
        """The names with those of the dicts around them: what they are called where the same is saved flat."""
        return tuple(".".join((*self.inside, name)) for name in self.tensors)

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
    base = 8 + length
    if length > MAX_HEADER_BYTES and (length > size or file.read(1) != b"{"):
        got = f"header of {length} bytes"
        raise bad_file(path, "not a safetensors, torch or GGUF file", code="file_foreign", got=got)
    if base > size:
        expected = f"{base} or more"
        raise bad_file(path, "the header is cut short", code="file_truncated", got=f"{size} bytes", expected=expected)
    text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if length > MAX_HEADER_BYTES or sum(map(text.count, (b"[", b"{", b","))) > MAX_MARKS:
        raise too_much(path, f"a header of {length} bytes", f"{MAX_HEADER_BYTES} bytes, {MAX_MARKS} entries")
    raw = parse_json(path, text)
    metadata = raw.pop("__metadata__", None)
    told = {} if not isinstance(metadata, dict) else {k: v for k, v in metadata.items() if isinstance(v, str)}
    if len(raw) > MAX_TENSORS:
        raise too_much(path, f"{len(raw)} tensors", f"{MAX_TENSORS}")
    tensors: dict[str, TensorInfo] = {}
    for name, entry in raw.items():
        dtype, shape, ends = _entry(entry)
        if not (is_shape(shape) and is_shape(ends) and len(ends) == 2):
            raise bad_file(path, "an entry of the header is damaged", code="file_damaged", key=name)
        if dtype not in DTYPE_BYTES:
            expected = " ".join(DTYPE_BYTES)
            raise bad_file(path, "unknown dtype", code="key_dtype", key=name, got=dtype[:40], expected=expected)
        start, end = ends
        if end - start != (nbytes := math.prod(shape) * DTYPE_BYTES[dtype]):
            raise bad_file(
                path, "bytes do not match shape and dtype", code="file_damaged", key=name,
                got=f"{end - start} bytes", expected=f"{nbytes} for {dtype} {list(shape)}",
            )  # fmt: skip
        tensors[name] = TensorInfo(path, dtype, tuple(shape), base + start, nbytes)
    _check_cover(path, tensors, base, size)
    return Header(path, tensors, told)


def _entry(entry: object) -> tuple[str, Sequence[int], Sequence[int]]:
    """dtype, shape and ends of an entry of the header as they are there; "" and () for what is of another kind."""
    if not isinstance(entry, dict):
        return "", (), ()
    dtype, shape, ends = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    axes, places = (value if isinstance(value, list) else [-1] for value in (shape, ends))
    return dtype if isinstance(dtype, str) else str(type(dtype)), axes, places


def too_much(path: Path, got: str, expected: str) -> FileError:
    """The error of a file whose header is larger than any real one: it is not read."""
    return bad_file(path, "the header is larger than that of any model", code="file_bomb", got=got, expected=expected)


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
