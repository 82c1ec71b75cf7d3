"""Bytes on disk become the parameters of a module that was built on the meta device: mapped, checked, assigned.

The file is mapped, not read: a parameter that keeps its dtype costs no memory until it is used. torch.load is never
called, in any version of torch: pickles go through pth.py, which can only make tensors, and the bytes are mapped from
the offsets that it found. Names are strict both ways.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from turbodiff.spec.errors import FileError
from turbodiff.weights import pickles
from turbodiff.weights.detect import Checkpoint, Part, open_checkpoint
from turbodiff.weights.fit import LINEAR_BRANCH, misfit
from turbodiff.weights.forms import tile_of
from turbodiff.weights.headers import GGUF_PREFIX, TensorInfo

TORCH_DTYPES: Mapping[str, torch.dtype] = {ours: getattr(torch, theirs) for theirs, ours in pickles.DTYPES.items()}
NORMS = (".norm_q.", ".norm_k.", ".norm3.")  # the fast norms of TurboDiffusion take their weights in float32
ALIGNMENT_BYTES = 64  # what torch allocates to; CPU kernels sum in another order on tensors that start elsewhere
COPIED_BYTES = 2 << 20  # misaligned tensors up to this size are copied, so that a small model is the same in any layout


class Loaded(NamedTuple):
    """A module with its parameters, what they were read from, and what a person may want to know about it."""

    module: nn.Module
    checkpoint: Checkpoint
    notes: tuple[str, ...]


def load_into(
    module: nn.Module, source: Checkpoint | Path | str, *, dtype: torch.dtype, component: Part | None = None
) -> Loaded:
    """Give `module`, built on the meta device, the parameters of a checkpoint; frozen, in evaluation mode.

    Names of the module are those of keymaps.py. INT8 weights stay INT8, their scales and the weights of norms become
    float32, the DiT's modulation keeps its dtype, everything else becomes `dtype`. The projections of SLA's linear
    branch may be missing (plain Wan has none: zeros switch the branch off, as before its training) or unwanted (dense
    attention ignores them).

    Raises:
        FileError: damaged, foreign, or of another size than the module; names the first key at fault.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, component)
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if error := misfit(checkpoint, wanted):
        raise error
    branch = {name for name in (*wanted, *checkpoint.sources) if LINEAR_BRANCH in name}
    notes = []
    if branch - set(checkpoint.sources):
        notes.append("no linear branch in this file (not distilled for SLA): its projections are zero, a no-op")
    if branch - set(wanted):
        notes.append("the linear branch of this file is not used")
    maps, is_dit = FileMaps(), checkpoint.component == "dit"
    read: dict[str, Tensor] = {}  # by stored name: two parameters of one stored tensor share it
    state = {}
    for name, shape in wanted.items():
        if name not in checkpoint.sources:
            state[name] = torch.zeros(shape, dtype=dtype)
            continue
        stored, scale, times = checkpoint.sources[name]
        if stored not in read:
            info, target = checkpoint.header.tensors[stored], dtype
            value = maps.tensor(info) if info.dtype in TORCH_DTYPES else dequantized(maps.bytes(info), info)
            if name.endswith(".int8_weight"):
                target = torch.int8
            elif name.endswith(".scale") or (is_dit and any(part in name for part in NORMS)):
                target = torch.float32
            elif is_dit and name.endswith("modulation") and value.dtype.itemsize >= dtype.itemsize:
                target = value.dtype
            value = scaled(value, maps.tensor(checkpoint.header.tensors[scale]), times) if scale else value
            read[stored] = value.to(target).reshape(shape)
        state[name] = read[stored]
    module.load_state_dict(state, strict=True, assign=True)
    assert not any(value.is_meta for value in (*module.parameters(), *module.buffers())), "not everything was loaded"
    return Loaded(module.requires_grad_(False).eval(), checkpoint, tuple(notes))


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
            "GGUF weights need the gguf package", code="gguf_missing", try_instead="pip install 'turbodiff[gguf]'"
        ) from None
    rows = data.numpy().reshape(math.prod(info.shape[:-1]), -1)
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

    def bytes(self, info: TensorInfo) -> Tensor:
        """The bytes at `info`, uint8 [nbytes]."""
        return torch.empty(0, dtype=torch.uint8).set_(self._part(info))

    def _part(self, info: TensorInfo) -> torch.UntypedStorage:
        if info.file not in self._maps:
            size = info.file.stat().st_size
            self._maps[info.file] = cast(
                torch.UntypedStorage, torch.UntypedStorage.from_file(str(info.file), False, size)
            )
        part: torch.UntypedStorage = self._maps[info.file][info.offset : info.offset + info.nbytes]
        return part
