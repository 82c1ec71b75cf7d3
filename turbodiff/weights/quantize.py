"""Writes TurboDiffusion's -quant layout (INT8 tiles of 128 x 128) from a checkpoint in any layout, a band at a time.

Memory stays near one row of tiles whatever the model: tensors are read from the file in bands of 128 rows, and the
target is a safetensors file whose header is known before the first byte is written.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from turbodiff.spec.errors import FileError, OutputError
from turbodiff.spec.files import atomic_write
from turbodiff.spec.numbers import gib
from turbodiff.weights import keymaps
from turbodiff.weights.detect import Checkpoint, expected_names, open_checkpoint
from turbodiff.weights.headers import DTYPE_BYTES, bad_file
from turbodiff.weights.load import NORMS, TILE, TORCH_DTYPES, bands

SMALLEST_AMAX = 1e-8  # TurboDiffusion: an all-zero tile gets the scale 1e-8 / 128

Progress = Callable[[int, int], None]


class Entry(NamedTuple):
    """One tensor of the target; `source` is the parameter it is made from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes in the target."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def quantize(source: Path | str, target: Path | str, *, progress: Progress | None = None) -> Path:
    """Write the -quant layout of a DiT to `target` (.safetensors); `progress(bytes done, bytes of all)`.

    Float32 parameters outside the tiles become bfloat16, as in the published files; weights of norms stay float32.

    Raises:
        FileError: not a DiT, already quantised, incomplete, or `target` cannot be written. Nothing is left behind.
    """
    target = Path(target)
    checkpoint = open_checkpoint(source, "dit")
    entries = _plan_entries(checkpoint)
    nbytes = sum(entry.nbytes for entry in entries)
    if target.suffix != ".safetensors":
        raise _cannot_write(target, "its name does not end in .safetensors")
    if target.exists():
        raise _cannot_write(target, "it exists already")
    if not target.parent.is_dir():
        raise _cannot_write(target, "its folder does not exist")
    if (free := shutil.disk_usage(target.parent).free) < nbytes:
        raise _cannot_write(target, f"{gib(free)} free", expected=gib(nbytes))
    try:
        with atomic_write(target, durable=True) as part, part.open("wb") as file:
            for done in _write(checkpoint, entries, file):
                if progress:
                    progress(done, nbytes)
    except OSError as error:
        raise _cannot_write(target, error.strerror) from None
    return target


def _plan_entries(checkpoint: Checkpoint) -> list[Entry]:
    """The tensors of the target in the order of the source file.

    Raises:
        FileError: already quantised, or a block lacks one of its linears.
    """
    path, sources = checkpoint.header.path, checkpoint.sources
    if checkpoint.quant:
        raise bad_file(path, "this checkpoint is quantised already", code="already_quantised", got=checkpoint.layout)
    if checkpoint.unknown:
        raise bad_file(path, "a tensor without a place", code="key_unexpected", key=checkpoint.unknown[0])
    if lacking := sorted(expected_names(checkpoint) - set(sources)):
        raise bad_file(path, "a tensor is missing", code="key_missing", key=lacking[0], expected=lacking[0])
    entries = []
    for name in sorted(sources, key=lambda name: (checkpoint.info(name).file, checkpoint.info(name).offset)):
        info = checkpoint.info(name)
        shape = (info.shape[0], math.prod(info.shape[1:])) if len(info.shape) == 5 else info.shape
        if name.startswith("blocks.") and name.split(".", 2)[2].removesuffix(".weight") in keymaps.DIT_LINEARS:
            module = name.removesuffix("weight")
            grid = tuple(-(-size // TILE) for size in shape)
            entries += [Entry(f"{module}int8_weight", "I8", shape, name), Entry(f"{module}scale", "F32", grid, name)]
        elif any(part in name for part in NORMS) or (name.endswith("modulation") and info.dtype == "F32"):
            entries.append(Entry(name, "F32", shape, name))
        else:
            entries.append(Entry(name, info.dtype if info.dtype in {"F16", "BF16"} else "BF16", shape, name))
    return entries


def quantize_band(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Up to 128 rows [n, K] -> int8 [n, K] and scale float32 [ceil(K / 128)].

    TurboDiffusion's quantiser: scale = max|tile| / 128; int8 = x * (128 / max|tile|), half to even, saturated.
    """
    count, columns = rows.shape
    tiles = F.pad(rows.float(), (0, -columns % TILE)).view(count, -1, TILE)
    amax = tiles.abs().amax(dim=(0, 2)).clamp_min(SMALLEST_AMAX)
    rounded = (tiles * (TILE / amax)[:, None]).round_().clamp_(-128, 127).to(torch.int8)
    return rounded.flatten(1)[:, :columns].contiguous(), amax / TILE


def _write(checkpoint: Checkpoint, entries: list[Entry], file: BinaryIO) -> Iterator[int]:
    """Write the header, then tensor by tensor; yield the bytes of the tensors written so far."""
    header, position = {}, 0
    for entry in entries:
        ends = [position, position + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": ends}
        position = ends[1]
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    done, scales = 0, b""
    for entry in entries:
        if entry.name.endswith(".scale"):  # follows its int8_weight
            file.write(scales)
        else:
            scales = b""
            for band in bands(checkpoint, entry.source):
                if entry.dtype == "I8":
                    band, scale = quantize_band(band)
                    scales += _bytes(scale)
                file.write(_bytes(band.to(TORCH_DTYPES[entry.dtype])))
        done += entry.nbytes
        yield done


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _cannot_write(target: Path, got: str | None, expected: str = "") -> FileError:
    return OutputError(
        "the quantised file cannot be written", code="output_unwritable", field=str(target), got=got, expected=expected,
        try_instead="another target, such as model-quant.safetensors",
    )  # fmt: skip
