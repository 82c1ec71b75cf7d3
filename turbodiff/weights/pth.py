"""Reader of the header of a torch zip file (.pth, .pt, .bin): its pickle is interpreted without calling anything.

torch is not imported, no tensor is read; what the pickle may hold is said in pickles.py.
Format: torch.serialization writes `<root>/data.pkl` and one uncompressed member `<root>/data/<key>` per storage.
"""

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, BinaryIO, cast

from turbodiff.spec.errors import FileError
from turbodiff.weights.headers import DTYPE_BYTES, Header, TensorInfo, bad_file, too_much
from turbodiff.weights.limits import MAX_TENSORS
from turbodiff.weights.pickles import UnsafePickleError, View, read_pickle

MAX_PICKLE_BYTES = 16 << 20  # 1,600 tensors take 0.3 MB
MAX_READ_BYTES = 4 << 20  # of the archive at a time: its directory takes 100 bytes a tensor
LOCAL_HEADER_BYTES = 30  # zip: fixed part of a member's header; lengths of name and extra field at 26 and 28
ENCRYPTED = 1  # zip: flag of a member

# Names under which exports and training dumps keep the state dict, best first: averaged weights before raw ones
# (Self-Forcing and CausVid: `generator_ema`, `generator`; rCM: `net_ema`, `net`)
WRAPPERS = (
    "generator_ema", "net_ema", "model_ema", "ema_model", "ema", "ema_state_dict", "generator", "net", "state_dict",
    "model_state_dict", "model", "module", "student", "transformer", "dit", "params", "weights",
)  # fmt: skip
MAX_WRAPS = 3
StateDict = tuple[tuple[str, ...], Mapping[str, View]]  # the names of the dicts that lead to it, and its tensors


class _Bounded:
    """A file that gives at most MAX_READ_BYTES at a time: zipfile reads as much as the file says it has to."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.seekable, self.file = file.seek, file.tell, file.seekable, file

    def read(self, count: int = -1) -> bytes:
        part = self.file.read(min(count, MAX_READ_BYTES) if count >= 0 else MAX_READ_BYTES)
        if count > MAX_READ_BYTES or len(part) == MAX_READ_BYTES:
            raise OverflowError(f"a directory of {count} bytes")
        return part


def read(path: Path, file: BinaryIO, size: int) -> Header:
    """The header of a torch zip file of `size` bytes.

    Raises:
        FileError: cut short, damaged, compressed, encrypted, of the other byte order, or a pickle that names anything
            but tensors.
    """
    try:
        members, root, (inside, views) = _read_archive(path, file)
    except FileError:
        raise
    except OverflowError as error:
        raise too_much(path, str(error), f"{MAX_READ_BYTES} bytes") from None
    except zipfile.BadZipFile as error:
        raise bad_file(path, "the file is cut short", code="file_truncated", got=str(error)[:120]) from None
    except Exception as error:  # noqa: BLE001  zipfile raises many kinds on a forged archive
        got = f"{type(error).__name__}: {error}"[:120]
        raise bad_file(path, "the archive is damaged", code="file_damaged", got=got) from None
    if len(views) > MAX_TENSORS:
        raise too_much(path, f"{len(views)} tensors", f"{MAX_TENSORS}")
    tensors = {}
    for name, view in views.items():
        member = members.get(f"{root}data/{view.storage.key}")
        if member is None or member.compress_type != zipfile.ZIP_STORED or member.flag_bits & ENCRYPTED:
            expected = f"member {view.storage.key[:80]}"
            raise bad_file(path, "a tensor without bytes", code="file_damaged", key=name, expected=expected)
        tensors[name] = _locate(path, file, size, member, name, view)
    return Header(path, tensors, inside=inside)


def _read_archive(path: Path, file: BinaryIO) -> tuple[Mapping[str, zipfile.ZipInfo], str, StateDict]:
    """The members by name, the folder that all of torch's are in, and the state dict of the pickle."""
    with zipfile.ZipFile(cast(IO[bytes], _Bounded(file))) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles:
            raise bad_file(path, "a zip file, but not torch's", code="file_foreign", got="a zip archive")
        root = pickles[0].removesuffix("data.pkl")
        state = _unpickle(path, _small_member(path, archive, members[pickles[0]]))
        order = members.get(f"{root}byteorder")
        if order and _small_member(path, archive, order) != b"little":
            raise bad_file(path, "written on a big-endian machine", code="file_foreign")
    return members, root, state


def _small_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.flag_bits & ENCRYPTED:
        raise bad_file(path, "the archive is encrypted", code="file_foreign", got="an encrypted archive")
    if member.compress_type != zipfile.ZIP_STORED:
        raise bad_file(path, "the pickle is compressed", code="file_damaged", got=f"{member.file_size} bytes")
    if max(member.file_size, member.compress_size) > MAX_PICKLE_BYTES:
        raise too_much(path, f"a pickle of {member.file_size} bytes", f"{MAX_PICKLE_BYTES} bytes")
    return archive.read(member)


def _unpickle(path: Path, text: bytes) -> StateDict:
    """The state dict in a pickle, which may be wrapped in dicts."""
    try:
        state = read_pickle(text)
    except UnsafePickleError as error:
        raise bad_file(
            path, "the pickle does more than hold tensors", code="file_unsafe", key="data.pkl", got=str(error)[:120],
            expected="tensors only",
        ) from None  # fmt: skip
    except Exception as error:  # noqa: BLE001  a hostile pickle can raise anything
        got = f"{type(error).__name__}: {error}"[:120]
        raise bad_file(path, "the pickle is damaged", code="file_damaged", key="data.pkl", got=got) from None
    found = list(_state_dicts(state, ()))
    most = max((len(views) for _, views in found), default=0)
    found = [one for one in found if 2 * len(one[1]) >= most]  # not a counter or a seed beside the weights
    if found:
        order = {name: place for place, name in enumerate(WRAPPERS)}
        return min(found, key=lambda one: ([order.get(name, len(order)) for name in one[0]], -len(one[1])))
    got, expected = type(state).__name__, "a state dict"
    raise bad_file(path, "no tensors in this file", code="file_foreign", got=got, expected=expected)


def _state_dicts(value: object, names: tuple[str, ...], seen: set[int] | None = None) -> Iterator[StateDict]:
    """Every dict that holds tensors under names, each once, with the names that lead to it."""
    seen = set() if seen is None else seen
    if not isinstance(value, dict) or len(names) > MAX_WRAPS or id(value) in seen:
        return
    seen.add(id(value))
    views = {key: one for key, one in value.items() if isinstance(key, str) and isinstance(one, View)}
    if views:
        yield names, views
    for key, inner in value.items():
        if isinstance(key, str):
            yield from _state_dicts(inner, (*names, key), seen)


def _locate(path: Path, file: BinaryIO, size: int, member: zipfile.ZipInfo, name: str, view: View) -> TensorInfo:
    """Where the bytes of a view of a member lie in the file; the view must be inside the member, and that in the file.

    The lengths in a member's local header may differ from the directory's: torch pads its data to 64 bytes.
    """
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
