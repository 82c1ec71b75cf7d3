"""LoRAs on a network: merged into plain weights, a side branch beside INT8 ones.

The network itself is never changed: its copy shares every parameter that no LoRA touches, so taking a LoRA off is using
the network again, bit for bit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbodiff.models.linear import Int8Linear
from turbodiff.runtime import offload
from turbodiff.spec.errors import RequestError
from turbodiff.spec.events import Notice
from turbodiff.spec.experts import Expert
from turbodiff.spec.request import Lora, Request
from turbodiff.weights.lora import Pair, listed, read_lora


class LoraModel(NamedTuple):
    """A network with LoRAs on, and what a person should know: names in a file that have no place in the network."""

    network: nn.Module
    notes: tuple[Notice, ...]


def loras_for(request: Request, expert: Expert) -> list[Lora]:
    """The LoRAs of a request that apply to this expert; strength 0 is none.

    Raises:
        RequestError: one is meant for an expert that the model does not have.
    """
    for lora in request.loras:
        if lora.expert != "both" and not request.spec.two_experts:
            raise RequestError(
                f"{request.spec.display_name} has one network",
                code="lora_expert",
                field="lora",
                got=lora.expert,
                expected="no expert",
                try_instead=f"--lora {lora.path}:{lora.strength:g}",
            )
    return [lora for lora in request.loras if lora.strength and lora.expert in ("both", expert)]


@torch.no_grad()
def apply_loras(dit: nn.Module, loras: Sequence[Lora], expert: Expert) -> LoraModel:
    """A copy of the network in host memory with the LoRAs on.

    A plain weight becomes `weight + sum of scale * up @ down`, added in float32, in the dtype of the weight.

    Raises:
        FileError: a file is no LoRA of this network.
    """
    linears = {name: layer for name, layer in dit.named_modules() if isinstance(layer, nn.Linear | Int8Linear)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in linears.items()}
    parameters = dict(dit.named_parameters())
    pairs: dict[str, list[Pair]] = {}
    differences: dict[str, Tensor] = {}
    notes = []
    for lora in loras:
        read = read_lora(lora.path, shapes, expert, {name: tuple(value.shape) for name, value in parameters.items()})
        for name, pair in read.pairs.items():
            pairs.setdefault(name, []).append(pair._replace(scale=pair.scale * lora.strength))
        for name, value in read.differences.items():
            differences[name] = differences.get(name, torch.zeros(())) + value.float() * lora.strength
        if read.unknown:
            notes.append(_left_out("lora_names_unused", lora, read.unknown))
    changed = offload.share_parameters(dit)
    for name, difference in differences.items():
        value = offload.host_data(parameters[name])
        _replace_parameter(changed, name, (value.float() + difference).to(value.dtype))
    for name, of_linear in pairs.items():
        if not isinstance(linears[name], Int8Linear):
            weight = offload.host_data(changed.get_parameter(f"{name}.weight"))
            total = weight.float().clone()
            for pair in of_linear:
                total.addmm_(pair.up.float(), pair.down.float(), alpha=pair.scale)
            _replace_parameter(changed, f"{name}.weight", total.to(weight.dtype))
    _add_low_rank(changed, pairs, linears)
    return LoraModel(changed, tuple(notes))


def _left_out(key: str, lora: Lora, names: Sequence[str]) -> Notice:
    """What of a file was not used, with the first few names."""
    file, told = Path(lora.path).name, listed(names)
    text = f"{file}: {len(names)} names not used: {told}"
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
