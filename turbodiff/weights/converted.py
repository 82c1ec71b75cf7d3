"""A copy of a network's layers as they run, in one file: written while they are made, mapped from then on."""

import contextlib
import json
import math
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from turbodiff.spec.errors import FileError
from turbodiff.spec.files import atomic_write, sync
from turbodiff.weights import copies
from turbodiff.weights.copies import Copy
from turbodiff.weights.load import ALIGNMENT_BYTES, map_file

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8)}
Place = tuple[str, tuple[int, ...], int]  # dtype, shape, offset


class ConvertedCopy:
    """The layers of one checkpoint that were made and not mapped; a context manager around loading it.

    What is there already is handed out (`layer`), anything else is taken in (`settle`) and leaves memory until
    `finish` maps it. Only layers whose tensors are memory of their own are kept.

    Args:
        root: the folder of downloads.
        need_bytes: the most that the copy takes.
    """

    def __init__(self, copy: Copy, root: Path, need_bytes: int) -> None:
        self._copy, self._root, self._need_bytes = copy, root, need_bytes
        self._part = copy.path
        self._layers: dict[str, dict[str, Place]] = {}
        self._map: torch.UntypedStorage | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ConvertedCopy":
        if self._is_whole():
            return self
        try:
            self._part, self._file = copies.open_part(self._copy)
            if self._is_whole():  # another process made it while we waited
                self.__exit__()
            else:
                copies.make_room(self._root, self._copy, self._need_bytes)
        except OSError as error:
            self.__exit__()
            raise copies.refused(self._copy, error, self._need_bytes) from None
        except FileError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            if copies.is_at(self._file, self._part):  # not when it has its name: the next one is another process's
                self._part.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _is_whole(self) -> bool:
        """Whether the copy is there, which is then mapped."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._layers = _places(copies.read_index(self._copy.index_path), self._copy.path.stat().st_size)
            self._map = map_file(self._copy.path)
            self._copy.path.touch()
        if self._map is None:
            self._layers = {}
        return self._map is not None

    def layer(self, path: str) -> dict[str, Tensor]:
        """The tensors of a layer, mapped; {} where it is not there."""
        places = self._layers.get(path, {})
        data = map_file(self._part) if self._map is None and places else self._map
        return {leaf: _view(data, place) for leaf, place in places.items()} if data is not None else {}

    def settle(self, path: str, layer: nn.Module, kept: dict[str, Tensor]) -> None:
        """Give a layer what is `kept` of it; else write it where its tensors are memory of their own, and leave meta
        tensors in it.

        Raises:
            FileError: the disk is full, or refuses; or what is kept has other sizes.
        """
        own = {**layer._parameters, **layer._buffers}
        if kept:
            sizes = {leaf: tensor.shape for leaf, tensor in own.items() if tensor is not None}
            if any(sizes.get(leaf) != tensor.shape for leaf, tensor in kept.items()):
                raise copies.damaged(self._copy, path)
            put(layer, kept)
            return
        tensors = {leaf: tensor for leaf, tensor in own.items() if tensor is not None}
        if self._file is None or not any(tensor.untyped_storage().resizable() for tensor in tensors.values()):
            return
        places = self._layers[path] = {}
        try:
            for leaf, tensor in tensors.items():
                offset = self._file.seek(-(-self._file.tell() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
                self._file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
                places[leaf] = (str(tensor.dtype), tuple(tensor.shape), offset)
            self._file.flush()
        except OSError as error:
            raise copies.refused(self._copy, error, self._need_bytes) from None
        put(layer, {leaf: tensor.detach().to("meta") for leaf, tensor in tensors.items()})

    def finish(self, module: nn.Module) -> None:
        """Give every layer that was kept its tensors, mapped, and the copy its name, which makes it one.

        Raises:
            FileError: the disk is full, or refuses.
        """
        if self._file is None or not self._layers:
            return
        told = {"source": str(self._copy.source), "layers": self._layers}
        try:
            sync(self._part)  # a network disk may say only now that it is full
            with atomic_write(self._copy.index_path, durable=True) as index:
                index.write_text(json.dumps(told), "utf-8")
            self._part.replace(self._copy.path)
            self._map = map_file(self._copy.path)
        except OSError as error:
            raise copies.refused(self._copy, error, self._need_bytes) from None
        for path in self._layers:
            put(module.get_submodule(path), self.layer(path))


def put(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a layer these parameters and buffers."""
    for leaf, tensor in tensors.items():
        if leaf in layer._parameters:
            layer._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            layer._buffers[leaf] = tensor


def _view(data: torch.UntypedStorage, place: Place) -> Tensor:
    dtype, shape, offset = DTYPES[place[0]], place[1], place[2]
    part = data[offset : offset + math.prod(shape) * dtype.itemsize]
    return torch.empty(0, dtype=dtype).set_(part, 0, shape, torch.empty(shape, device="meta").stride())


def _places(told: dict[str, object], size: int) -> dict[str, dict[str, Place]]:
    """Where the tensors of an index lie.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none, or not about a file of this size.
    """
    layers: dict[str, dict[str, Place]] = {}
    for path, leaves in dict(told["layers"]).items():  # type: ignore[call-overload]
        for leaf, (dtype, shape, offset) in leaves.items():
            sizes = tuple(map(int, shape))
            if not 0 <= offset <= size - math.prod(sizes) * DTYPES[dtype].itemsize or min(sizes, default=0) < 0:
                raise ValueError(path)
            layers.setdefault(path, {})[leaf] = (dtype, sizes, offset)
    if not layers:
        raise ValueError("no layers")
    return layers
