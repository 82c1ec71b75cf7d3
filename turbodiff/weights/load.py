"""Bytes on disk become the parameters of a module that was built on the meta device: mapped, checked, assigned.

The file is mapped, not read: a parameter that keeps its dtype costs no memory until it is used. torch.load is never
called, in any version of torch: pickles go through pth.py, which can only make tensors, and the bytes are mapped from
the offsets that it found. Names are strict both ways.
"""

import contextlib
import ctypes
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from turbodiff.spec.errors import FileError
from turbodiff.spec.numbers import gib
from turbodiff.weights import pickles
from turbodiff.weights.detect import Checkpoint, Part, open_checkpoint, read_header
from turbodiff.weights.fit import LINEAR_BRANCH, misfit
from turbodiff.weights.forms import GGUF_COMMAND, tile_of
from turbodiff.weights.headers import GGUF_PREFIX, TensorInfo, bad_file

if TYPE_CHECKING:
    from turbodiff.weights.converted import ConvertedCopy

TORCH_DTYPES: Mapping[str, torch.dtype] = {ours: getattr(torch, theirs) for theirs, ours in pickles.DTYPES.items()}
NORMS = (
    ".norm_q.",
    ".norm_k.",
    ".norm_k_img.",
    ".norm3.",
)  # the fast norms of TurboDiffusion take their weights in float32
NO_BRANCH = "no linear branch in this file (not distilled for SLA): its projections are zero, a no-op"
UNUSED_BRANCH = "the linear branch of this file is not used"
ALIGNMENT_BYTES = 64  # what torch allocates to; CPU kernels sum in another order on tensors that start elsewhere
TRIM_BYTES = 4 << 20  # of numbers made, after which freed memory goes back to the system
BAND_BYTES = 1 << 19  # of a file that are read at a time where numbers change on the way
MAP_NORESERVE = 0x4000  # of Linux on x86 and ARM; Python 3.11 does not name it
TILE = 128  # rows of an INT8 tile
COPIED_BYTES = 2 << 20  # misaligned tensors up to this size are copied, so that a small model is the same in any layout


class Loaded(NamedTuple):
    """A module with its parameters, what they were read from, and what a person may want to know about it."""

    module: nn.Module
    checkpoint: Checkpoint
    notes: tuple[str, ...]


def load_into(
    module: nn.Module, source: Checkpoint | Path | str, *, dtype: torch.dtype, component: Part | None = None,
    become: Mapping[str, Callable[[nn.Module], nn.Module]] = MappingProxyType({}),
    told: Callable[[int], object] = int, copy: "ConvertedCopy | None" = None,
) -> Loaded:  # fmt: skip
    """Give `module`, built on the meta device, the parameters of a checkpoint; frozen, in evaluation mode.

    Names of the module are those of keymaps.py. INT8 weights stay INT8, their scales and the weights of norms become
    float32, the DiT's modulation keeps its dtype, everything else becomes `dtype`. The projections of SLA's linear
    branch may be missing (plain Wan has none: zeros switch the branch off, as before its training) or unwanted (dense
    attention ignores them).

    What keeps its dtype is the file itself, mapped. What changes is read and changed a band at a time, so that host
    memory holds what was made so far and one tensor more, whatever the file is in; with a `copy` one layer of it.

    Args:
        become: layers, by name, that are turned into others as soon as their parameters are there (into INT8 ones).
        told: hears of each layer how many bytes of the file it was.
        copy: holds what changes on the disk; from a whole one nothing is made again.

    Raises:
        FileError: damaged, foreign, or of another size than the module; names the first key at fault. Or the disk has
            no room for a copy.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, component)
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if error := misfit(checkpoint, wanted):
        raise error
    branch = {name for name in (*wanted, *checkpoint.sources) if LINEAR_BRANCH in name}
    notes = [NO_BRANCH] if branch - set(checkpoint.sources) else []
    notes += [UNUSED_BRANCH] if branch - set(wanted) else []
    make, made_bytes, below = _Maker(checkpoint, wanted, dtype), 0, dict[str, list[str]]()
    for name in wanted:
        below.setdefault(name.rpartition(".")[0], []).append(name)
    for path, names in below.items():
        layer, kept = module.get_submodule(path), {} if copy is None else copy.layer(path)
        if not kept:
            state = make.state(names, mapped=path not in become)
            made_bytes += sum(value.nbytes for value in state.values() if value.untyped_storage().resizable())
            layer.load_state_dict({name.rpartition(".")[2]: x for name, x in state.items()}, strict=False, assign=True)
            state.clear()
        told(sum(checkpoint.info(name).nbytes for name in names if name in checkpoint.sources))
        if path in become:
            parent, _, child = path.rpartition(".")
            layer = become[path](layer)
            setattr(module.get_submodule(parent), child, layer)
        if copy is not None:
            copy.settle(path, layer, kept)
            make.share(names, partial(copy.layer, path))
        if made_bytes >= TRIM_BYTES:
            made_bytes = _return_freed_memory()
    if copy is not None:
        copy.finish(module)
    assert not any(value.is_meta for value in (*module.parameters(), *module.buffers())), "not everything was loaded"
    return Loaded(module.requires_grad_(False).eval(), checkpoint, tuple(notes))


class _Maker:
    """Makes or maps the parameters of a checkpoint; two that are one stored tensor share it."""

    def __init__(self, checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._checkpoint, self._wanted, self._dtype, self._maps = checkpoint, wanted, dtype, FileMaps()
        uses = Counter(source.stored for name, source in checkpoint.sources.items() if name in wanted)
        self._shared: dict[str, Tensor | None] = {stored: None for stored, count in uses.items() if count > 1}

    def state(self, names: Sequence[str], *, mapped: bool) -> dict[str, Tensor]:
        """The parameters of a layer; `mapped`: may be the file itself."""
        state = dict[str, Tensor]()
        for name in names:
            if name not in self._checkpoint.sources:
                state[name] = torch.zeros(self._wanted[name], dtype=self._dtype)
                continue
            stored = self._checkpoint.sources[name].stored
            value = self._shared.get(stored)
            if value is None:
                value = _value(self._checkpoint, name, self._maps if mapped else None, self._dtype)
                _refuse_zeros(self._checkpoint, name, value)
            if stored in self._shared:
                self._shared[stored] = value
            state[name] = value.reshape(self._wanted[name])
        return state

    def share(self, names: Sequence[str], layer: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let what comes later share the tensors of a layer that lie in a copy."""
        for name in (name for name in names if name in self._checkpoint.sources):
            if (stored := self._checkpoint.sources[name].stored) in self._shared:
                kept = layer().get(name.rpartition(".")[2])
                self._shared[stored] = self._shared[stored] if kept is None else kept


def _refuse_zeros(checkpoint: Checkpoint, name: str, value: Tensor) -> None:
    """A downloader that allocates the whole file first leaves zeros where nothing arrived; their clip is grey."""
    if value.ndim == 2 and LINEAR_BRANCH not in name and not value[-1:].any() and not value.any():
        what = "a weight is zero throughout: the file did not arrive whole"
        raise bad_file(checkpoint.header.path, what, code="file_zeros", key=name, got="zeros", expected="numbers")


def _return_freed_memory() -> int:
    """Give what was freed back to the system, also between pieces that stay (malloc_trim(3)); 0, the count begins anew.

    glibc keeps freed pieces of up to 32 MiB: between the layers that stay they would add up to the size of the result.
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    return 0


def _value(checkpoint: Checkpoint, name: str, maps: "FileMaps | None", dtype: torch.dtype) -> Tensor:
    """One of our parameters in the dtype that it has in memory: mapped where the file holds it so and `maps` is given,
    else made band by band."""
    info, is_dit = checkpoint.info(name), checkpoint.component == "dit"
    stored = TORCH_DTYPES.get(info.dtype)
    target = dtype
    if name.endswith(".int8_weight"):
        target = torch.int8
    elif name.endswith(".scale") or (is_dit and any(part in name for part in NORMS)):
        target = torch.float32
    elif is_dit and name.endswith("modulation") and stored is not None and stored.itemsize >= dtype.itemsize:
        target = stored
    if maps is not None and stored == target and not checkpoint.sources[name].scale:
        return maps.tensor(info)
    value, first = torch.empty(info.shape, dtype=target), 0
    rows = value if value.ndim else value.view(1)
    for band in bands(checkpoint, name, BAND_BYTES):
        rows[first : first + len(band)] = band.view(-1, *info.shape[1:])
        first += len(band)
    return value


def bands(checkpoint: Checkpoint, name: str, n_bytes: int = 0) -> Iterator[Tensor]:
    """The parameter in bands [n, K] of n = 128 rows, or of as many times 128 as `n_bytes` of the file hold, in the
    dtype of the file, or float32 where it was scaled or in blocks of GGUF.

    Bands of a contiguous tensor are read, not mapped: mapped pages count as memory of the process.
    """
    source = checkpoint.sources[name]
    info = checkpoint.header.tensors[source.stored]
    scale = _read(checkpoint.header.tensors[source.scale]) if source.scale else None
    whole = _read(info) if info.stride else None
    rows = info.shape[0] if info.shape else 1
    row_bytes = info.nbytes // max(rows, 1)
    step = TILE * max(1, n_bytes // max(1, row_bytes * TILE))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        place, nbytes = info.offset + first * row_bytes, (last - first) * row_bytes
        some = info._replace(shape=(last - first, *info.shape[1:]), offset=place, nbytes=nbytes)
        band = _read(some) if whole is None else whole[first:last]
        if scale is not None:
            band = scaled(band, scale_rows(scale, info.shape, first, last), source.times)
        yield band.reshape(last - first, -1)


def tensors_of(path: Path, most_bytes: int) -> dict[str, Tensor]:
    """Every tensor of a file of any network, under its names; nothing in the file is run.

    Raises:
        FileError: damaged, no file of tensors, or one of more than `most_bytes` of them.
    """
    found = read_header(path).tensors
    if (nbytes := sum(info.nbytes for info in found.values())) > most_bytes:
        raise bad_file(
            path, "its tensors are larger than those of any such network", code="network_large", got=gib(nbytes),
            expected=f"at most {gib(most_bytes)}",
        )  # fmt: skip
    return {name: _read(info) for name, info in found.items()}


def _read(info: TensorInfo) -> Tensor:
    data = bytearray(info.nbytes)
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        done, view = 0, memoryview(data)
        while done < info.nbytes:  # one call reads 2 GiB at most
            if not (count := file.readinto(view[done:])):
                raise bad_file(info.file, "the file became shorter while it was read", code="file_truncated")
            done += count
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    if info.dtype not in TORCH_DTYPES:
        return dequantized(raw, info)
    value = raw.view(TORCH_DTYPES[info.dtype])
    return value.view(info.shape) if info.stride is None else value.as_strided(info.shape, info.stride)


def scaled(value: Tensor, scale: Tensor, times: float = 1.0) -> Tensor:
    """float32 `value` times its scale: one for the tensor, for a row, for a column or for a tile (weights/forms.py)."""
    rows, columns = tile_of(tuple(value.shape), tuple(scale.shape)) or (1, 1)
    scale = scale.float() * times if times != 1 else scale.float()
    if scale.numel() == 1 or value.ndim != 2:
        return value.float() * scale.reshape(-1, *[1] * (value.ndim - 1))
    grid = scale.reshape(-(-value.shape[0] // rows), -1)
    grid = grid.repeat_interleave(rows, 0)[: value.shape[0]] if rows > 1 else grid
    grid = grid.repeat_interleave(columns, 1)[:, : value.shape[1]] if grid.shape[1] > 1 and columns > 1 else grid
    return value.float() * grid


def scale_rows(scale: Tensor, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    """The scales of the rows first..last of a weight [o, i] of that shape: one for all, or [last - first, c]."""
    if scale.numel() == 1:
        return scale
    rows, _ = tile_of(shape, tuple(scale.shape)) or (1, 1)
    return scale.reshape(-(-shape[0] // rows), -1)[torch.arange(first, last) // rows]


def dequantized(data: Tensor, info: TensorInfo) -> Tensor:
    """The numbers of a GGUF tensor, float32, shaped as its header says; data uint8 [nbytes].

    Raises:
        FileError: the library `gguf` is not installed.
    """
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise FileError(
            "GGUF weights need the gguf package", code="gguf_missing", expected=GGUF_COMMAND, try_instead=GGUF_COMMAND
        ) from None
    rows = data.numpy().reshape(info.shape[0] if info.shape else 1, -1)  # whole blocks, whatever the further axes
    kind = GGMLQuantizationType[info.dtype.removeprefix(GGUF_PREFIX)]
    return torch.from_numpy(dequantize(rows, kind)).reshape(info.shape)


class FileMaps:
    """Files mapped copy-on-write, each once; a tensor keeps its file mapped."""

    def __init__(self) -> None:
        self._maps: dict[Path, torch.UntypedStorage] = {}

    def tensor(self, info: TensorInfo) -> Tensor:
        """The tensor at `info`, a view of the file; copied only where it starts in a bad place."""
        dtype = TORCH_DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        part = self._part(info)
        if info.offset % dtype.itemsize or (info.offset % ALIGNMENT_BYTES and info.nbytes <= COPIED_BYTES):
            part = torch.empty(0, dtype=torch.uint8).set_(part).clone().untyped_storage()
        stride = info.stride or torch.empty(info.shape, device="meta").stride()
        return torch.empty(0, dtype=dtype).set_(part, 0, info.shape, stride)

    def _part(self, info: TensorInfo) -> torch.UntypedStorage:
        if info.file not in self._maps:
            self._maps[info.file] = map_file(info.file)
        part: torch.UntypedStorage = self._maps[info.file][info.offset : info.offset + info.nbytes]
        return part


def map_file(path: Path) -> torch.UntypedStorage:
    """A file that is not empty, mapped copy-on-write: pages that nobody writes to are the page cache's.

    Without MAP_NORESERVE, as torch's own `from_file` does it, Linux refuses to map more than RAM and swap together
    (Linux admin-guide, overcommit-accounting): a 28.6 GB network on a computer with 16 GiB.
    """
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
