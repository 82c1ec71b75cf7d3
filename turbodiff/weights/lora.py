"""LoRA files, whoever wrote them, as low-rank pairs for the linears of a Wan DiT under our names.

Names understood: PEFT and diffusers (`transformer.<module>.lora_A.weight`; `transformer_2.` is the low-noise expert),
ComfyUI (`diffusion_model.<module>.lora_down.weight`), kohya (`lora_unet_<module with underscores>`), each with the
module names of the original Wan or of diffusers. A pair adds `alpha / rank * up @ down` to its weight; a file without
alpha means alpha = rank (arXiv 2106.09685). Beside pairs, ComfyUI's extractions hold whole differences: `.diff` of a
weight (norms, mostly) and `.diff_b` of a bias.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from turbodiff.spec.errors import FileError
from turbodiff.weights import keymaps
from turbodiff.weights.detect import read_header
from turbodiff.weights.headers import Header
from turbodiff.weights.load import TORCH_DTYPES, FileMaps

LOW_EXPERT = "transformer_2."
PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", LOW_EXPERT)
KOHYA = "lora_unet_"
# endings of a pair's halves and of its scale; ".default" is PEFT's name of an adapter
HALVES = {
    ".lora_A.weight": "down", ".lora_A.default.weight": "down", ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".lora_B.weight": "up", ".lora_B.default.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up",
    ".alpha": "alpha",
}  # fmt: skip
DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias"}
SHOWN_NAMES = 5

Shapes = Mapping[str, tuple[int, ...]]
NO_SHAPES: Shapes = MappingProxyType({})


class Pair(NamedTuple):
    """One linear's change, `scale * up @ down`: down [rank, in], up [out, rank] as stored."""

    down: Tensor
    up: Tensor
    scale: float


class Lora(NamedTuple):
    """Pairs by our module name, differences by our parameter name in its shape, and the stored names that have no
    place in this network."""

    pairs: Mapping[str, Pair]
    unknown: tuple[str, ...]
    differences: Mapping[str, Tensor] = MappingProxyType({})


def read_lora(path: Path | str, shapes: Shapes, expert: str = "single", parameters: Shapes = NO_SHAPES) -> Lora:
    """The changes in a file for a network whose linears have these (out, in) shapes.

    `parameters`: shapes of those that a whole difference may be added to, by name; what is stored INT8 is not one.

    Raises:
        FileError: not a LoRA of this network, a half is missing, or a shape is wrong; names the keys at fault.
    """
    header = read_header(path)
    two_experts = any(LOW_EXPERT in name for name in header.tensors)
    mine = [name for name in header.tensors if not two_experts or (LOW_EXPERT in name) == (expert == "low")]
    places = _places(shapes)
    owners = _places(name.removesuffix(".weight").removesuffix(".bias") for name in parameters)
    halves: dict[str, dict[str, str]] = {}  # module: {"down": stored name, "up": ..., "alpha": ...}
    changed: dict[str, str] = {}  # parameter: stored name of its difference
    unknown = []
    for stored in mine:
        ending = next((ending for ending in (*DIFFERENCES, *HALVES) if stored.endswith(ending)), "")
        bare = stored.removesuffix(ending).removeprefix(KOHYA)
        for prefix in PREFIXES:
            bare = bare.removeprefix(prefix)
        owner = owners.get(bare, "") if ending in DIFFERENCES else ""
        whole = [name for name in (owner + DIFFERENCES.get(ending, ""), owner) if name in parameters]
        if whole:
            changed[whole[0]] = stored
        elif ending in HALVES and bare in places:
            halves.setdefault(places[bare], {})[HALVES[ending]] = stored
        else:
            unknown.append(stored)
    if not halves and not changed:
        raise _bad(header, "no name in this file belongs to this network", "lora_foreign", list(header.tensors))
    maps = FileMaps()
    pairs = {module: _pair(header, maps, module, names, shapes[module]) for module, names in halves.items()}
    differences = {}
    for name, stored in changed.items():
        value, shape = _read(header, maps, stored), parameters[name]
        if value.numel() != math.prod(shape):
            got = f"{list(value.shape)} for {list(shape)}"
            raise _bad(header, f"a difference has another shape: {got}", "lora_shape", [stored])
        differences[name] = value.reshape(shape)
    return Lora(pairs, tuple(unknown), differences)


def _places(modules: Iterable[str]) -> dict[str, str]:
    """Every name a module goes by -> ours."""
    known = set(modules)
    theirs = {name: ours for name, ours in keymaps.names_from("dit", "diffusers").items() if ours in known}
    names = {ours: ours for ours in known} | theirs
    return names | {name.replace(".", "_"): ours for name, ours in names.items()}


def _pair(header: Header, maps: FileMaps, module: str, names: Mapping[str, str], shape: tuple[int, ...]) -> Pair:
    if not {"down", "up"} <= set(names):
        raise _bad(header, "half of a low-rank pair is missing", "lora_half", list(names.values()))
    down, up = (_read(header, maps, names[half]) for half in ("down", "up"))
    rank = len(down) if down.ndim else 0
    if down.numel() != rank * shape[1] or up.numel() != shape[0] * rank or rank == 0:
        got = f"{list(down.shape)} and {list(up.shape)}"
        raise _bad(header, f"{module} has another shape: got {got} for {list(shape)}", "lora_shape", [names["down"]])
    alpha = _read(header, maps, names["alpha"]).item() if "alpha" in names else rank
    return Pair(down.reshape(rank, -1), up.reshape(-1, rank), alpha / rank)


def _read(header: Header, maps: FileMaps, name: str) -> Tensor:
    info = header.tensors[name]
    if info.dtype not in TORCH_DTYPES or not TORCH_DTYPES[info.dtype].is_floating_point:
        raise _bad(header, f"numbers of another kind: {info.dtype}", "lora_dtype", [name])
    return maps.tensor(info)


def listed(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(name[:120] for name in names[:SHOWN_NAMES]) + more


def _bad(header: Header, what: str, code: str, names: list[str]) -> FileError:
    return FileError(
        what,
        code=code,
        field=f"lora {header.path}",
        got=listed(names),
        expected="low-rank pairs for this Wan model (PEFT, diffusers, ComfyUI or kohya names)",
        try_instead="a LoRA made for the model, or another --model",
    )
