"""Reader of the header of a torch zip file (.pth, .pt, .bin): its pickle is interpreted without calling anything.

A pickle may name any function to call. This one may name OrderedDict, torch's rebuild functions, its storage types and
its dtypes; anything else is refused before it is looked up. torch is not imported, no tensor is read.
Format: torch.serialization writes `<root>/data.pkl` and one uncompressed member `<root>/data/<key>` per storage.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple, cast

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


def _rebuild_v2(storage: Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *_rest: object) -> View:
    return _rebuild_v3(storage, offset, shape, stride, False, None, Dtype(storage.dtype))


def _rebuild_v3(
    storage: Storage, offset: int, shape: Sequence[int], stride: Sequence[int], _grad: object, _hooks: object,
    dtype: Dtype, *_rest: object,
) -> View:  # fmt: skip
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
        raise pickle.UnpicklingError("tensor")
    return View(storage, dtype.name, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: View, *_rest: object) -> View:
    return data


# Everything that a pickle may name, and what it stands for
ALLOWED: Mapping[tuple[str, str], object] = {
    **{(module, name): Dtype(dtype) for module in ("torch", "torch.storage") for name, dtype in STORAGES.items()},
    **{("torch", name): Dtype(dtype) for name, dtype in DTYPES.items()},
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class TensorUnpickler(pickle._Unpickler):  # the Python one: the memo of the C one grows to any index that a file names
    """Reads a pickle of tensors; refuses every name that is not in ALLOWED."""

    stack: list[object]

    def find_class(self, module: str, name: str) -> object:
        """What a name in the pickle stands for.

        Raises:
            UnpicklingError: the name is not allowed.
        """
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: object) -> Storage:
        """The storage that `("storage", type, key, device, numel)` names."""
        kind, dtype, key, _device, numel = cast(Sequence[object], pid)
        if kind == "storage" and isinstance(dtype, Dtype) and isinstance(key, str) and _is_count(numel):
            return Storage(dtype.name, key, cast(int, numel))
        raise pickle.UnpicklingError("storage")

    def load_build(self) -> None:
        """Drop attributes (a state dict's version numbers): a file cannot change an object of ours."""
        self.stack.pop()

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def read(path: Path, file: BinaryIO, size: int) -> Header:
    """The header of a torch zip file of `size` bytes.

    Raises:
        FileError: cut short, damaged, compressed, of the other byte order, or a pickle that names anything but tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
            if not pickles:
                expected = "a member data.pkl"
                raise bad_file(path, "a zip file, but not torch's", code="file_foreign", expected=expected)
            root = pickles[0].removesuffix("data.pkl")
            views = _unpickle(path, _small_member(path, archive, members[pickles[0]]))
            order = members.get(f"{root}byteorder")
            if order and _small_member(path, archive, order) != b"little":
                raise bad_file(path, "written on a big-endian machine", code="file_foreign")
    except zipfile.BadZipFile as error:
        raise bad_file(path, "the file is cut short", code="file_truncated", got=error) from None
    tensors = {}
    for name, view in views.items():
        member = members.get(f"{root}data/{view.storage.key}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            expected = f"member {view.storage.key}"
            raise bad_file(path, "a tensor without bytes", code="file_damaged", key=name, expected=expected)
        tensors[name] = _locate(path, file, size, member, name, view)
    return Header(path, tensors)


def _small_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_PICKLE_BYTES or member.compress_type != zipfile.ZIP_STORED:
        got = f"{member.file_size} bytes"
        raise bad_file(path, "the pickle is too large or compressed", code="file_damaged", got=got)
    return archive.read(member)


def _unpickle(path: Path, text: bytes) -> dict[str, View]:
    """The tensors of the state dict in a pickle, which may be wrapped once."""
    try:
        state = TensorUnpickler(io.BytesIO(text)).load()
    except pickle.UnpicklingError as error:
        raise bad_file(
            path, "the pickle does more than hold tensors", code="file_unsafe", key="data.pkl", got=str(error)[:120],
            expected="tensors only",
        ) from None  # fmt: skip
    except Exception as error:  # noqa: BLE001  a hostile pickle can raise anything
        got = f"{type(error).__name__}: {error}"[:120]
        raise bad_file(path, "the pickle is damaged", code="file_damaged", key="data.pkl", got=got) from None
    if isinstance(state, dict):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
        views = {key: value for key, value in inner.items() if isinstance(key, str) and isinstance(value, View)}
        if views:
            return views
    got, expected = type(state).__name__, "a state dict"
    raise bad_file(path, "no tensors in this file", code="file_foreign", got=got, expected=expected)


def _locate(path: Path, file: BinaryIO, size: int, member: zipfile.ZipInfo, name: str, view: View) -> TensorInfo:
    """Where the bytes of a view of a member lie in the file; the view must be inside the member, and that in the file.

    The lengths in a member's local header may differ from the directory's: torch pads its data to 64 bytes.
    """
    numbers = (view.offset, *view.shape, *view.stride)
    if not all(map(_is_count, numbers)) or len(view.shape) != len(view.stride):
        raise bad_file(path, "a tensor of impossible shape", code="file_damaged", key=name, got=str(numbers)[:120])
    itemsize = DTYPE_BYTES[view.dtype]
    elements = 1 + sum((length - 1) * step for length, step in zip(view.shape, view.stride, strict=True))
    elements = elements if math.prod(view.shape) else 0
    if (view.offset + elements) * itemsize > member.file_size:
        raise bad_file(
            path, "a tensor larger than its bytes", code="file_truncated", key=name, got=f"{member.file_size} bytes",
            expected=f"{(view.offset + elements) * itemsize} bytes",
        )  # fmt: skip
    file.seek(member.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES or not header.startswith(b"PK\x03\x04"):
        raise bad_file(path, "the archive is damaged", code="file_damaged", key=name)
    start = member.header_offset + LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", header[26:30]))
    if start + member.file_size > size:
        raise bad_file(path, "the file is cut short", code="file_truncated", key=name)
    contiguous, step = True, 1
    for length, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        contiguous &= length == 1 or stride == step
        step *= length
    place = start + view.offset * itemsize
    return TensorInfo(path, view.dtype, view.shape, place, elements * itemsize, None if contiguous else view.stride)


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 60
