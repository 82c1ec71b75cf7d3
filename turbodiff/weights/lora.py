"""LoRA files, whoever wrote them, as changes of the layers of a Wan DiT under our names.

Whose names: lora_names.py. How strong: lora_strength.py. The formulas: lora_change.py. A layer's change is computed
right or not at all: one whose shape is not that of the network, or that holds something unknown, is left out whole and
named; a file that needs another formula, holds NaN, or lacks half of a pair is refused.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from turbodiff.weights import lora_names, lora_strength
from turbodiff.weights.headers import Header
from turbodiff.weights.load import TORCH_DTYPES, FileMaps
from turbodiff.weights.lora_change import Change, Difference, Dora, Hadamard, Kronecker, Pair, Whole
from turbodiff.weights.lora_fit import (
    NO_SHAPES,
    ON_PARAMETERS,
    Shapes,
    bad_lora,
    lora_header,
    not_understood,
    places_of,
    sorted_layers,
    target,
)

MAX_ALPHA_BYTES = 1 << 20
MAX_RANK = 8192  # published LoRAs have up to 512; a rank above the width of the layer says nothing more


class Lora(NamedTuple):
    """Changes by the name of our layer or parameter, and what was left out: names without a place in this network,
    and layers whose shape is another (each with both shapes); the config whose strength it has and that may be
    another's ("" for none).
    """

    changes: Mapping[str, tuple[Change, ...]]
    unknown: tuple[str, ...]
    misfits: tuple[str, ...] = ()
    shared_config: str = ""


def read_lora(path: Path | str, shapes: Shapes, expert: str = "single", parameters: Shapes = NO_SHAPES) -> Lora:
    """The changes in a file for a network whose linears have these (out, in) shapes.

    `parameters`: shapes of those beside the linears' weights that a difference may be added to, by name. A change of a
    linear's weight is under the linear's name, any other under the parameter's.

    Raises:
        FileError: not a LoRA of this network, damaged, or of a kind that is not computed; names the keys at fault.
    """
    header = lora_header(path)
    found, told = sorted_layers(header, places_of(shapes, parameters), expert)
    file = _File(header, FileMaps(), told)
    changes: dict[str, list[Change]] = {}
    unknown, misfits, trained = list(found.unknown), list[str](), False
    for layer, parts in found.layers.items():
        unused = not_understood(header.path, layer, parts, shapes, parameters)
        unknown += unused
        if len(unused) == len(parts):
            continue
        try:
            made = [*_of_linear(file, layer, parts, shapes), *_of_parameters(file, layer, parts, shapes, parameters)]
        except _Misfit as misfit:
            misfits.append(str(misfit))
            continue
        trained = trained or set(parts) != {"whole"}
        for name, change in made:
            changes.setdefault(name, []).append(change)
    if not changes or not trained:
        if misfits:
            raise bad_lora(header.path, "no layer has the shape of this model's", "lora_shape", misfits)
        raise bad_lora(header.path, "no change of this network in this file", "lora_foreign", list(header.tensors))
    changed = {name: tuple(of_name) for name, of_name in changes.items()}
    return Lora(changed, tuple(unknown), tuple(misfits), told.shared)


class _Misfit(Exception):
    """The shapes of a layer's parts are not those of the layer; the argument names a part and both shapes."""


class _File(NamedTuple):
    """A LoRA file being read."""

    header: Header
    maps: FileMaps
    told: lora_strength.Told

    def read(self, stored: str) -> Tensor:
        """A tensor of floating-point numbers, all of them finite."""
        info = self.header.tensors[stored]
        if info.dtype not in TORCH_DTYPES or not TORCH_DTYPES[info.dtype].is_floating_point:
            got = [f"{stored} {info.dtype}"]
            raise bad_lora(self.header.path, "numbers of another kind", "lora_dtype", got)
        value = self.maps.tensor(info)
        if not bool(torch.isfinite(value.float() if value.dtype.itemsize == 1 else value).all()):
            raise bad_lora(self.header.path, "NaN or infinite numbers in this LoRA", "lora_nan", [stored])
        return value

    def flat(self, stored: str) -> tuple[int, int]:
        """The shape of a tensor as a matrix: its first axis, and the product of the others."""
        shape = self.header.tensors[stored].shape
        return (shape[0], math.prod(shape[1:])) if shape else (1, 1)

    def matrix(self, stored: str) -> Tensor:
        """A tensor as a matrix, see `flat`."""
        return self.read(stored).reshape(self.flat(stored))

    def expect(self, stored: str, fits: bool, expected: Sequence[int | str]) -> None:
        """Leave a layer out where a part of it has another shape.

        Raises:
            _Misfit: `fits` is false.
        """
        if not fits:
            wanted = ", ".join(map(str, expected))
            raise _Misfit(f"{stored} {list(self.header.tensors[stored].shape)} for [{wanted}]")

    def scale(self, parts: Mapping[str, str], of: str, rank: int | None) -> float:
        """alpha / rank of the layer whose part is `of`; alpha is one number of any dtype, or a vector of the same.

        rank None: the parts do not tell it, as in a LoKr of whole factors, whose own alpha says nothing (LyCORIS).
        """
        if "alpha" not in parts:
            layer = lora_names.read_name(of).owner
            return self.told.of(layer).scale(layer, rank)
        if rank is None:
            return 1.0
        stored = parts["alpha"]
        info = self.header.tensors[stored]
        numbers = info.dtype in TORCH_DTYPES and 0 < info.nbytes <= MAX_ALPHA_BYTES
        values = self.maps.tensor(info).double().flatten() if numbers else None
        if values is None or not bool((values == values[0]).all() | values.isnan().any()):
            got = [f"{stored} {info.dtype} {list(info.shape)}"]
            raise bad_lora(self.header.path, "the strength (alpha) of this LoRA cannot be read", "lora_alpha", got)
        if not bool(values.isfinite().all()):
            raise bad_lora(self.header.path, "NaN or infinite numbers in this LoRA", "lora_nan", [stored])
        return float(values[0]) / max(rank, 1)


def _of_parameters(
    file: _File, layer: str, parts: Mapping[str, str], shapes: Shapes, parameters: Shapes
) -> Iterator[tuple[str, Change]]:
    """Whole differences and values of a layer."""
    for part in ("whole", *ON_PARAMETERS):
        name = target(layer, part, shapes, parameters) if part in parts else None
        if name is not None:
            shape = shapes[name] if name in shapes else parameters[name]
            file.expect(parts[part], math.prod(file.flat(parts[part])) == math.prod(shape), shape)
            value = file.read(parts[part])
            yield name, Whole(value) if part == "whole" else Difference(value)


def _of_linear(file: _File, layer: str, parts: Mapping[str, str], shapes: Shapes) -> Iterator[tuple[str, Change]]:
    """The low-rank change of a layer, if it has one."""
    shape = shapes.get(layer, ())
    change: Change | None = None
    if "down" in parts:
        rank = file.flat(parts["up"])[1]
        change = _pair(file, parts["down"], parts["up"], shape, file.scale(parts, parts["up"], rank), parts.get("mid"))
    elif "hada_w1_a" in parts:
        first, second = (
            _pair(
                file, parts[f"hada_w{i}_b"], parts[f"hada_w{i}_a"], shape, 1.0, parts.get(f"hada_t{i}"),
                flipped="hada_t1" in parts,
            )
            for i in "12"
        )  # fmt: skip
        rank = file.flat(parts["hada_w1_b"])[0]
        change = Hadamard(first, second, file.scale(parts, parts["hada_w1_a"], rank))
    elif "lokr_w1" in parts or "lokr_w1_a" in parts:
        change = _lokr(file, parts, shape)
    if change is not None and "magnitude" in parts:
        # lengths of rows, [out], [out, 1] or (PEFT, of a convolution) [1, out, 1, 1, 1]; or of columns, [1, in]
        stored = parts["magnitude"]
        axes = file.header.tensors[stored].shape
        rows = math.prod(axes) == shape[0] and (len(axes) != 2 or axes[1] == 1)
        columns = not rows and axes == (1, shape[1])
        file.expect(stored, rows or columns, shape[:1])
        change = Dora(change, file.read(stored).flatten(), columns)
    if change is not None:
        yield layer, change
    if "up.bias" in parts:  # PEFT's lora_bias, scaled like the rest
        file.expect(parts["up.bias"], math.prod(file.flat(parts["up.bias"])) == shape[0], shape[:1])
        scale = file.scale(parts, parts["up"], file.flat(parts["up"])[1])
        yield f"{layer}.bias", Difference(file.read(parts["up.bias"]).float() * scale)


def _pair(
    file: _File, down: str, up: str, shape: tuple[int, ...], scale: float, core: str | None = None, *,
    flipped: bool = False,
) -> Pair:  # fmt: skip
    """Two halves, and a core between them, as a pair; `flipped`: the upper half is stored as [rank, out] (CP)."""
    rank, inner = file.flat(up)[0 if flipped else 1], file.flat(down)[0]
    file.expect(up, file.flat(up)[1 if flipped else 0] == shape[0] and 0 < rank <= MAX_RANK, (shape[0], "rank"))
    if core is None:
        file.expect(down, file.flat(down) == (rank, shape[1]), (rank, shape[1]))
        lower = file.matrix(down)
    else:
        of_core = file.header.tensors[core].shape
        file.expect(core, of_core[:2] == (rank, inner) and inner <= MAX_RANK, (rank, inner))
        file.expect(down, file.flat(down)[1] * math.prod(of_core[2:]) == shape[1], (inner, shape[1]))
        lower = torch.einsum("rik,in->rnk", file.read(core).float().reshape(rank, inner, -1), file.matrix(down).float())
        lower = lower.flatten(1)
    upper = file.matrix(up)
    return Pair(lower, upper.T if flipped else upper, scale)


def _lokr(file: _File, parts: Mapping[str, str], shape: tuple[int, ...]) -> Kronecker:
    """The rank is that of the second factor, or else of the first; two whole factors have none."""
    sizes, rank = dict[str, tuple[int, int]](), None
    for w in ("lokr_w1", "lokr_w2"):
        if w in parts:
            sizes[w] = file.flat(parts[w])
            continue
        (out, rank), (_, width) = file.flat(parts[f"{w}_a"]), file.flat(parts[f"{w}_b"])
        if w == "lokr_w2" and "lokr_t2" in parts:
            (rank, out), core = file.flat(parts[f"{w}_a"]), file.header.tensors[parts["lokr_t2"]].shape
            width *= math.prod(core[2:])
        sizes[w] = (out, width)
    first, second = sizes["lokr_w1"], sizes["lokr_w2"]
    at_fault = parts.get("lokr_w2") or parts["lokr_w2_a"]
    file.expect(at_fault, (first[0] * second[0], first[1] * second[1]) == shape, (shape[0] // max(1, first[0]), "..."))
    factors = [
        file.matrix(parts[w]) if w in parts else _pair(
            file, parts[f"{w}_b"], parts[f"{w}_a"], sizes[w], 1.0, parts.get("lokr_t2") if w == "lokr_w2" else None,
            flipped=w == "lokr_w2" and "lokr_t2" in parts,
        )
        for w in ("lokr_w1", "lokr_w2")
    ]  # fmt: skip
    return Kronecker(factors[0], factors[1], file.scale(parts, parts.get("lokr_w1") or parts["lokr_w1_a"], rank))
