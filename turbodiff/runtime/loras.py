"""A network that wears LoRAs: merged into plain weights, a side branch beside INT8 ones.

The network itself is never changed: its twin shares every parameter that no LoRA touches, so taking a LoRA off is using
the network again, bit for bit.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbodiff.models.linear import Int8Linear
from turbodiff.runtime import offload
from turbodiff.spec.errors import RequestError
from turbodiff.spec.request import Lora, Request
from turbodiff.weights.lora import Pair, listed, read_lora


class LoraModel(NamedTuple):
    """The twin, and what a person should know: names in a file that have no place in the network."""

    network: nn.Module
    notes: tuple[str, ...]


def loras_for(request: Request, expert: str) -> list[Lora]:
    """The LoRAs of a request that this expert wears; strength 0 is none.

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


def lora_key(loras: Iterable[Lora]) -> str:
    """Which files, as they are at this moment, at which strengths; "" for none."""
    return " ".join(f"{lora.path}@{lora.strength:g}@{_mtime(Path(lora.path))}" for lora in loras)


def wear(dit: nn.Module, loras: Sequence[Lora], expert: str) -> LoraModel:
    """A twin of the network in host memory with the LoRAs on.

    Raises:
        FileError: a file is no LoRA of this network.
    """
    linears = {name: layer for name, layer in dit.named_modules() if isinstance(layer, nn.Linear | Int8Linear)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in linears.items()}
    parameters = dict(dit.named_parameters())
    changes: dict[str, list[Pair]] = {}
    differences: dict[str, Tensor] = {}
    notes = []
    for lora in loras:
        read = read_lora(lora.path, shapes, expert, {name: tuple(value.shape) for name, value in parameters.items()})
        for name, pair in read.pairs.items():
            changes.setdefault(name, []).append(pair._replace(scale=pair.scale * lora.strength))
        for name, value in read.differences.items():
            differences[name] = differences.get(name, 0) + value.float() * lora.strength
        if read.unknown:
            notes.append(f"{Path(lora.path).name}: {len(read.unknown)} names not used: {listed(read.unknown)}")
    twin = offload.twin(dit)
    for name, difference in differences.items():
        _set(twin, name, _plus(offload.host_data(parameters[name]), difference))
    branches = {name: joined(pairs) for name, pairs in changes.items() if isinstance(linears[name], Int8Linear)}
    for name, (down, up) in _same_in_every_block(branches, linears).items():
        twin.get_submodule(name).add_low_rank(down, up)
    for name in changes.keys() - branches.keys():
        layer = twin.get_submodule(name)
        layer.weight = nn.Parameter(merged(offload.host_data(layer.weight), changes[name]), requires_grad=False)
    return LoraModel(twin, tuple(notes))


def _plus(parameter: Tensor, difference: Tensor) -> nn.Parameter:
    return nn.Parameter((parameter.float() + difference).to(parameter.dtype), requires_grad=False)


@torch.no_grad()
def merged(weight: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """`weight + sum of scale * up @ down`, added in float32, in the dtype of the weight."""
    total = weight.float().clone()
    for pair in pairs:
        total.addmm_(pair.up.float(), pair.down.float(), alpha=pair.scale)
    return total.to(weight.dtype)


@torch.no_grad()
def joined(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Several pairs as one of the sum of their ranks, down [R, in] and up [out, R] with the scales in it, float32."""
    down = torch.cat([pair.down.float() for pair in pairs])
    return down, torch.cat([pair.up.float() * pair.scale for pair in pairs], dim=1)


def _same_in_every_block(
    branches: dict[str, tuple[Tensor, Tensor]], linears: dict[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Blocks that are streamed through one slot must look alike: what one wears all wear, padded with zeros."""
    ranks: dict[str, int] = {}
    for name, (down, _) in branches.items():
        ranks[_place(name)] = max(ranks.get(_place(name), 0), len(down))
    same = {}
    for name, layer in linears.items():
        if _place(name) not in ranks or not isinstance(layer, Int8Linear):
            continue
        down, up = branches.get(name) or (torch.zeros(0, layer.in_features), torch.zeros(layer.out_features, 0))
        missing = ranks[_place(name)] - len(down)
        same[name] = (F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing)))
    return same


def _place(name: str) -> str:
    """ "blocks.7.ffn.0" -> "ffn.0": the same linear of any block."""
    return name.split(".", 2)[-1] if name.startswith("blocks.") else name


def _set(module: nn.Module, name: str, layer: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
