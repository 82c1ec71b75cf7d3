"""Header of a torch zip file (.pth, .pt, .bin): its pickle is read by an interpreter that can only make tensors.

A pickle may name any function to call. This one may name OrderedDict, torch's rebuild functions, its storage types and
its dtypes; anything else is refused before it is looked up. Nothing of torch is imported, no tensor is read.
Format: torch.serialization writes `<root>/data.pkl` and one uncompressed member `<root>/data/<key>` per storage.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from turbodiff.weights.headers import DTYPE_BYTES, Header, TensorInfo, bad_file

MAX_PICKLE_BYTES = 64 << 20  # 1,600 tensors take 0.3 MB
LOCAL_HEADER_BYTES = 30  # zip: fixed part of a member's header; lengths of name and extra field at 26 and 28

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
WRAPPERS = ("state_dict", "model", "module")


class Dtype(NamedTuple):
    """A storage type or a dtype that the pickle named."""

    name: str


class Storage(NamedTuple):
    """A storage that the pickle named: `numel` elements of `dtype` in the member `key`."""

    dtype: str
    key: str
    numel: int


class View(NamedTuple):
    """A tensor that the pickle built: a strided view of a storage, offset and stride in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TensorUnpickler(pickle._Unpickler):  # the Python one: the memo of the C one grows to any index that a file names
    """Reads a pickle of tensors; refuses every name that is not on the list below."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for.

        Raises:
            UnpicklingError: the name is not on the list.
        """
        if module in {"torch", "torch.storage"} and name in STORAGES:
            return Dtype(STORAGES[name])
        if module == "torch" and name in DTYPES:
            return Dtype(DTYPES[name])
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
            ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that `("storage", type, key, device, numel)` names."""
        kind, dtype, key, _device, numel = pid
        if kind != "storage" or not isinstance(dtype, Dtype) or not isinstance(key, str) or not _is_count(numel):
            raise pickle.UnpicklingError("storage")
        return Storage(dtype.name, key, numel)

    def load_build(self) -> None:
        """Attributes (a state dict's version numbers) are dropped: nothing of ours can be changed by a file."""
        self.stack.pop()

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _rebuild_v2(storage: Storage, offset: int, shape: Any, stride: Any, *_rest: Any) -> View:
    return _rebuild_v3(storage, offset, shape, stride, False, None, Dtype(storage.dtype))


def _rebuild_v3(
    storage: Storage, offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Dtype, *_rest: Any
) -> View:
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
        raise pickle.UnpicklingError("tensor")
    return View(storage, dtype.name, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: View, *_rest: Any) -> View:
    return data


def read(path: Path) -> Header:
    """The header of a torch zip file.

    Raises:
        FileError: cut short, damaged, compressed, of the other byte order, or a pickle that names anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            root = _root(path, members)
            state = _unpickle(path, _small_member(path, archive, members[f"{root}data.pkl"]))
            order = members.get(f"{root}byteorder")
            if order and _small_member(path, archive, order) != b"little":
                raise bad_file(path, "written on a big-endian machine", code="file_foreign")
    except zipfile.BadZipFile as error:
        raise bad_file(path, "the file is cut short", code="file_truncated", got=error) from None
    views, metadata = _tensors(path, state)
    with path.open("rb") as file:
        return Header(
            path, {name: _place(path, file, members, root, name, view) for name, view in views.items()}, metadata
        )


def _root(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    for name in members:
        if name == "data.pkl" or name.endswith("/data.pkl"):
            return name.removesuffix("data.pkl")
    raise bad_file(path, "a zip file, but not torch's", code="file_foreign", expected="a member data.pkl")


def _small_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_PICKLE_BYTES or member.compress_type != zipfile.ZIP_STORED:
        raise bad_file(
            path, "the pickle is too large or compressed", code="file_damaged", got=f"{member.file_size} bytes"
        )
    return archive.read(member)


def _unpickle(path: Path, text: bytes) -> Any:
    try:
        return TensorUnpickler(io.BytesIO(text)).load()
    except pickle.UnpicklingError as error:
        raise bad_file(
            path, "the pickle does more than hold tensors", code="file_unsafe", key="data.pkl", got=str(error)[:120],
            expected="tensors only",
        ) from None  # fmt: skip
    except Exception as error:  # noqa: BLE001  a hostile pickle can raise anything
        raise bad_file(
            path,
            "the pickle is damaged",
            code="file_damaged",
            key="data.pkl",
            got=f"{type(error).__name__}: {error}"[:120],
        ) from None


def _tensors(path: Path, state: Any) -> tuple[dict[str, View], dict[str, Any]]:
    """The tensors and the plain values of the state dict, which may be wrapped once."""
    if isinstance(state, dict):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
        views = {key: value for key, value in inner.items() if isinstance(key, str) and isinstance(value, View)}
        if views:
            plain = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, str | int | float | bool)}
            return views, plain
    raise bad_file(
        path, "no tensors in this file", code="file_foreign", got=type(state).__name__, expected="a state dict"
    )


def _place(
    path: Path, file: BinaryIO, members: dict[str, zipfile.ZipInfo], root: str, name: str, view: View
) -> TensorInfo:
    member = members.get(f"{root}data/{view.storage.key}")
    numbers = (view.offset, *view.shape, *view.stride)
    if member is None or member.compress_type != zipfile.ZIP_STORED:
        raise bad_file(
            path, "a tensor without bytes", code="file_damaged", key=name, expected=f"member {view.storage.key}"
        )
    if not all(map(_is_count, numbers)) or len(view.shape) != len(view.stride):
        raise bad_file(path, "a tensor of impossible shape", code="file_damaged", key=name, got=str(numbers)[:120])
    itemsize = DTYPE_BYTES[view.dtype]
    elements = 1 + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
    elements = elements if math.prod(view.shape) else 0
    if (view.offset + elements) * itemsize > member.file_size:
        raise bad_file(
            path, "a tensor larger than its bytes", code="file_truncated", key=name, got=f"{member.file_size} bytes",
            expected=f"{(view.offset + elements) * itemsize} bytes",
        )  # fmt: skip
    start = _data_offset(path, file, member, name) + view.offset * itemsize
    stride = None if _is_contiguous(view) else view.stride
    return TensorInfo(path, view.dtype, view.shape, start, elements * itemsize, stride)


def _data_offset(path: Path, file: BinaryIO, member: zipfile.ZipInfo, name: str) -> int:
    """Where a member's bytes start: the local header's lengths may differ from the directory's (torch pads to 64)."""
    file.seek(member.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES or not header.startswith(b"PK\x03\x04"):
        raise bad_file(path, "the archive is damaged", code="file_damaged", key=name)
    start = member.header_offset + LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", header[26:30]))
    if start + member.file_size > path.stat().st_size:
        raise bad_file(path, "the file is cut short", code="file_truncated", key=name)
    return start


def _is_contiguous(view: View) -> bool:
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 60
