"""What a checkpoint holds, read from its header in milliseconds: names, dtypes, shapes and where the bytes lie.

Nothing of a tensor is read and nothing of the file is executed; every offset is inside its file or the file is refused.
Formats: safetensors (https://huggingface.co/docs/safetensors), torch's zip (pth.py), GGUF (gguf.py); a folder of shards
or its index file counts as one checkpoint. dtypes carry the names of safetensors.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from turbodiff.spec.errors import FileError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
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
    metadata: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold them."""
        return tuple(sorted({info.file for info in self.tensors.values()}))


def is_float(info: TensorInfo) -> bool:
    """Whether the tensor holds real numbers, in a float dtype or in GGUF blocks."""
    return info.dtype in FLOATS or info.dtype.startswith("GGUF_")


def bad_file(path: Path, what: str, *, code: str, key: str = "", got: Any = "", expected: Any = "") -> FileError:
    """The error of a damaged or foreign file: `code` keys the sentence, `key` names the tensor at fault."""
    field = f"{path}: {key[:200]}" if key else str(path)
    return FileError(what, code=code, field=field, got=got, expected=expected, try_instead=TRY_AGAIN)


def read_header(path: Path | str) -> Header:
    """The header of a checkpoint: a file, an index of shards, or a folder that holds one or the other.

    Raises:
        FileError: missing, truncated, damaged, of an unknown kind, or a pickle that does more than hold tensors.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.name.endswith(".index.json"):
            return _read_index(path)
        return _read_file(path)
    except FileNotFoundError:
        raise bad_file(path, "there is no such file", code="file_missing") from None
    except OSError as error:
        raise bad_file(path, "the file cannot be read", code="file_unreadable", got=error.strerror) from None


def _read_file(path: Path) -> Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if size < 16:
        raise bad_file(path, "the file is empty or cut short", code="file_truncated", got=f"{size} bytes")
    if start.startswith(b"PK\x03\x04"):
        from turbodiff.weights import pth  # it imports this module

        return pth.read(path)
    if start.startswith(b"GGUF"):
        from turbodiff.weights import gguf

        return gguf.read(path)
    if known := _not_weights(start):
        raise bad_file(path, f"this is {known}, not weights", code="file_foreign")
    return _read_safetensors(path, size)


def _not_weights(start: bytes) -> str:
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05":
        return "a bare pickle (torch's format before 1.6)"
    return ""


def _read_safetensors(path: Path, size: int) -> Header:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise bad_file(
                path, "not a safetensors, torch or GGUF file", code="file_foreign", got=f"header of {length} bytes"
            )
        if 8 + length > size:
            raise bad_file(
                path,
                "the header is cut short",
                code="file_truncated",
                got=f"{size} bytes",
                expected=f"{8 + length} or more",
            )
        raw = _parse_json(path, file.read(length))
    metadata = raw.pop("__metadata__", {})
    tensors = {name: _safetensors_info(path, name, entry, 8 + length) for name, entry in raw.items()}
    _check_cover(path, tensors, 8 + length, size)
    return Header(path, tensors, metadata if isinstance(metadata, dict) else {})


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise bad_file(path, "the header is not JSON", code="file_damaged", got=str(error)[:120]) from None
    if not isinstance(raw, dict):
        raise bad_file(path, "the header is not a JSON object", code="file_damaged", got=type(raw).__name__)
    return raw


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _safetensors_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise bad_file(path, "an entry of the header is damaged", code="file_damaged", key=name, got=str(entry)[:120])
    if dtype not in DTYPE_BYTES:
        raise bad_file(path, "unknown dtype", code="key_dtype", key=name, got=dtype, expected=" ".join(DTYPE_BYTES))
    if end - start != (expected := math.prod(shape) * DTYPE_BYTES[dtype]):
        raise bad_file(
            path, "bytes do not match shape and dtype", code="file_damaged", key=name,
            got=f"{end - start} bytes", expected=f"{expected} for {dtype} {list(shape)}",
        )  # fmt: skip
    return TensorInfo(path, dtype, shape, base + start, end - start)


def _check_cover(path: Path, tensors: Mapping[str, TensorInfo], base: int, size: int) -> None:
    """Tensors follow each other without gap or overlap up to the end of the file, as the format demands."""
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise bad_file(
                path,
                "tensors overlap or leave a gap",
                code="file_damaged",
                key=name,
                got=info.offset,
                expected=position,
            )
        position += info.nbytes
    if position > size:
        raise bad_file(
            path, "the file is cut short", code="file_truncated", got=f"{size} bytes", expected=f"{position} bytes"
        )
    if position < size:
        raise bad_file(
            path, "bytes after the last tensor", code="file_damaged", got=f"{size} bytes", expected=f"{position} bytes"
        )


def _read_folder(folder: Path) -> Header:
    indexes = sorted(folder.glob("*.index.json"))
    if indexes:
        return _read_index(_plainest(indexes))
    files = sorted(file for file in folder.iterdir() if file.name.endswith(ENDINGS))
    if not files:
        raise bad_file(
            folder, "no weights in this folder", code="file_missing", expected="*.safetensors or *.index.json"
        )
    return _read_file(_plainest(files))


def _plainest(files: Iterable[Path]) -> Path:
    """Safetensors before others, and without a variant: `model.safetensors` before `model.fp16.safetensors`."""
    return min(files, key=lambda file: (file.suffix == ".bin", file.name.count("."), len(file.name), file.name))


def _read_index(path: Path) -> Header:
    index = _parse_json(path, path.read_bytes())
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(_is_plain_name(name) for name in where.values()):
        raise bad_file(path, "not an index of shards", code="file_damaged", expected='{"weight_map": {tensor: file}}')
    names = sorted(set(where.values()))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        found = f"{len(names) - len(missing)} of {len(names)}"
        raise bad_file(path, "shards are missing", code="file_missing", got=found, expected=", ".join(missing))
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        tensors |= _read_file(path.parent / name).tensors
    lost = sorted(set(where) - set(tensors))
    if lost:
        raise bad_file(path, "a tensor of the index is in no shard", code="key_missing", key=lost[0])
    return Header(path, tensors, {})


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(ENDINGS) and Path(name).name == name
