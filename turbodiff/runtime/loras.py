"""LoRAs on a network: merged into plain weights, a side branch of low rank beside INT8 ones.

The network itself is never changed: its copy shares every parameter that no LoRA touches, so taking a LoRA off is using
the network again, bit for bit.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbodiff_kernels.quant import TILE, dequantize_tiles, quantize_tiles, quantize_tokens

from turbodiff.models.linear import Int8Linear
from turbodiff.runtime import offload
from turbodiff.spec.events import Notice
from turbodiff.spec.experts import Expert
from turbodiff.spec.request import Lora, Request
from turbodiff.weights.lora import read_lora
from turbodiff.weights.lora_change import Change, Pair
from turbodiff.weights.lora_fit import bad_lora, check_experts, listed

LEFT_OUT = {
    "lora_names_unused": "names not used", "lora_layers_misfit": "layers of another shape",
    "lora_config_shared": "config beside several files, whose strength is used",
}  # fmt: skip


class LoraModel(NamedTuple):
    """A network with LoRAs on, and what a person should know: names in a file that have no place in the network."""

    network: nn.Module
    notes: tuple[Notice, ...]


def loras_for(request: Request, expert: Expert) -> list[Lora]:
    """The LoRAs of a request that apply to this expert; strength 0 is none.

    Raises:
        RequestError: one is meant for an expert that the model does not have.
    """
    check_experts(request.spec, request.loras)
    return [lora for lora in request.loras if lora.strength and lora.expert in ("both", expert)]


@torch.no_grad()
def apply_loras(dit: nn.Module, loras: Sequence[Lora], expert: Expert) -> LoraModel:
    """A copy of the network in host memory with the LoRAs on.

    A plain weight becomes `weight + sum of strength * change`, added in float32, in the dtype of the weight; the order
    of the LoRAs makes no difference, not in one bit. Beside INT8 weights low ranks stay branches in the dtype of the
    bias; other changes are merged into them and rounded to the same steps (`_rounded_again`).

    Raises:
        FileError: a file is no LoRA of this network, or what it makes of a weight is not finite.
    """
    linears = {name: layer for name, layer in dit.named_modules() if isinstance(layer, nn.Linear | Int8Linear)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in linears.items()}
    parameters = dict(dit.named_parameters())
    weights = {f"{name}.weight" for name in shapes}
    others = {name: tuple(value.shape) for name, value in parameters.items() if name not in weights}
    wanted: dict[str, list[tuple[Change, float, Lora]]] = {}
    notes = []
    for lora in sorted(loras, key=lambda lora: (lora.path, lora.strength)):
        read = read_lora(lora.path, shapes, expert, others)
        for name, changes in read.changes.items():
            wanted.setdefault(name, []).extend((change, lora.strength, lora) for change in changes)
        if read.unknown:
            notes.append(_left_out("lora_names_unused", lora, read.unknown))
        if read.misfits:
            notes.append(_left_out("lora_layers_misfit", lora, read.misfits))
        if read.shared_config:
            notes.append(_left_out("lora_config_shared", lora, [read.shared_config]))
    changed = offload.share_parameters(dit)
    pairs: dict[str, list[Pair]] = {}
    for name, of_name in wanted.items():
        layer = linears.get(name)
        if isinstance(layer, Int8Linear):
            low_rank = [(change, strength) for change, strength, _ in of_name if isinstance(change, Pair)]
            pairs[name] = [change._replace(scale=change.scale * strength) for change, strength in low_rank]
            of_name = [entry for entry in of_name if not isinstance(entry[0], Pair)]
            if of_name:
                _rounded_again(changed.get_submodule(name), name, of_name)
        else:
            parameter = name if layer is None else f"{name}.weight"
            value = offload.host_data(parameters[parameter])
            _replace_parameter(changed, parameter, _sum(value, of_name, name))
    _add_low_rank(changed, pairs, linears)
    return LoraModel(changed, tuple(notes))


def _sum(base: Tensor, changes: Sequence[tuple[Change, float, Lora]], name: str) -> Tensor:
    """`base + sum of strength * change`, added in float32, in the dtype of `base`.

    Raises:
        FileError: it is not finite; names the LoRA that makes it so.
    """
    total = base.float().clone()
    for change, strength, lora in changes:
        if isinstance(change, Pair):
            total.addmm_(change.up.float(), change.down.float(), alpha=change.scale * strength)
        else:
            total.add_(change.of(base.float()), alpha=strength)
        if not bool(torch.isfinite(total.to(base.dtype)).all()):
            raise bad_lora(Path(lora.path), "what this LoRA makes of a weight is not finite", "lora_nan", [name])
    return total.to(base.dtype)


def _rounded_again(layer: nn.Module, name: str, changes: Sequence[tuple[Change, float, Lora]]) -> None:
    """Merge changes that are no low rank into an INT8 weight, in its mode.

    A change below half a step would vanish by rounding to the nearest, everywhere and at once; half a step of noise
    before it, the same for the same layer, keeps it on average. A number is off by one step of its tile or row at most,
    the largest of a tile by one and a half (it saturates at 127).
    """
    assert isinstance(layer, Int8Linear)
    stored, scale = offload.host_data(layer.int8_weight), offload.host_data(layer.scale)
    if layer.tiled:
        base = dequantize_tiles(stored, scale)
        step = scale.repeat_interleave(TILE, 0)[: layer.out_features]
        step = step.repeat_interleave(TILE, 1)[:, : layer.in_features]
    else:
        step = scale[:, None]
        base = stored * step
    noise = torch.rand(base.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    merged = _sum(base.float(), changes, name).add_(noise.sub_(0.5).mul_(step))
    layer.int8_weight, layer.scale = quantize_tiles(merged) if layer.tiled else quantize_tokens(merged)


def _left_out(key: str, lora: Lora, names: Sequence[str]) -> Notice:
    """What of a file was not used, or may be another's, with the first few names."""
    file, told = Path(lora.path).name, listed(names)
    text = f"{file}: {len(names)} {LEFT_OUT[key]}: {told}"
    return Notice(key=key, text=text, numbers={"file": file, "n": len(names), "names": told})


def _replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def _add_low_rank(network: nn.Module, pairs: dict[str, list[Pair]], linears: dict[str, nn.Linear | Int8Linear]) -> None:
    """Give INT8 linears a low-rank branch where some block has pairs for them, the ranks of all pairs together.

    Blocks are streamed through one slot and must look alike: a linear with a branch has one in every block, padded with
    zeros to the largest rank.
    """
    halves, ranks = {}, dict[str, int]()
    for name, layer in linears.items():
        if isinstance(layer, Int8Linear):
            changes = [(pair.down.float(), pair.up.float() * pair.scale) for pair in pairs.get(name, ())]
            down = torch.cat([torch.zeros(0, layer.in_features), *(down for down, _ in changes)])
            up = torch.cat([torch.zeros(layer.out_features, 0), *(up for _, up in changes)], dim=1)
            place = name.split(".", 2)[-1] if name.startswith("blocks.") else name  # "blocks.7.ffn.0" -> "ffn.0"
            halves[name] = (place, down, up)
            ranks[place] = max(ranks.get(place, 0), len(down))
    for name, (place, down, up) in halves.items():
        target, missing = network.get_submodule(name), ranks[place] - len(down)
        if ranks[place] and isinstance(target, Int8Linear):
            target.add_low_rank(F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing)))
