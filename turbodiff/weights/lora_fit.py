"""Whether a LoRA file fits the networks of a model, from its header alone: how many layers, what is left out, what
refuses it. No torch. What it says no to, weights/lora.py refuses after reading, by the same functions.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.models import FoundLora, Inventory, LoraFit, ModelSpec, PassedOver, all_models
from turbodiff.spec.request import Lora
from turbodiff.weights import lora_names, lora_strength
from turbodiff.weights.detect import read_header
from turbodiff.weights.distillation import lora_training
from turbodiff.weights.fit import network_shapes
from turbodiff.weights.headers import Header
from turbodiff.weights.lora_facts import lora_facts

SHOWN_NAMES = 5
AGAIN = "the file itself, downloaded once more from where it was published"
# Parts that only one kind of change has, and those of them that it must have; LoKr has four ways
KINDS: Mapping[str, frozenset[str]] = {
    "pair": frozenset(("down", "up", "mid", "up.bias")),
    "loha": frozenset(part for part in lora_names.PARTS.values() if part.startswith("hada_")),
    "lokr": frozenset(part for part in lora_names.PARTS.values() if part.startswith("lokr_")),
}
MUST = {"pair": frozenset(("down", "up")), "loha": frozenset(part for part in KINDS["loha"] if "_w" in part)}
ON_PARAMETERS = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}  # whole differences

Shapes = Mapping[str, tuple[int, ...]]
NO_SHAPES: Shapes = MappingProxyType({})


class Network(NamedTuple):
    """Shapes (out, in) of a network's linears and of its other parameters, by name, and every name they go by."""

    shapes: Shapes
    parameters: Shapes
    places: lora_names.Places


def lora_header(path: Path | str) -> Header:
    """The header of a LoRA file.

    Raises:
        FileError: damaged or foreign; no model's download brings it back.
    """
    try:
        return read_header(path)
    except FileError as error:
        raise FileError(
            error.what, code=error.code, field=f"lora {path}", got=error.got, expected=error.expected,
            try_instead=AGAIN,
        ) from None  # fmt: skip


def places_of(shapes: Shapes, parameters: Shapes) -> lora_names.Places:
    """Where the tensors of a LoRA may belong."""
    owners = (name.removesuffix(".weight").removesuffix(".bias") for name in parameters)
    modulated = (name.removesuffix(".modulation") for name in parameters if name.endswith(".modulation"))
    weights = (f"{layer}.weight" for layer in shapes)
    return lora_names.Places((*shapes, *parameters, *owners, *modulated, *weights))


def sorted_layers(
    header: Header, places: lora_names.Places, expert: str
) -> tuple[lora_names.Found, lora_strength.Told]:
    """The parts of each layer that a LoRA changes in a network, and how strong it was trained to be.

    Raises:
        FileError: as lora_strength.strengths.
    """
    found = lora_names.sort_names(header.tensors, places, expert)
    ranks: dict[str, int | None] = {}  # of the layers whose alpha is no tensor
    for parts in found.layers.values():
        for part in () if "alpha" in parts else ("down", "hada_w1_b", "lokr_w1", "lokr_w1_a"):
            if part in parts:
                shape = header.tensors[parts[part]].shape
                ranks[lora_names.read_name(parts[part]).owner] = None if "lokr" in part or not shape else shape[0]
    return found, lora_strength.strengths(header.path, header.metadata, header.tensors, ranks)


def lora_fits(path: Path, *specs: ModelSpec) -> tuple[LoraFit, ...]:
    """What every network of some models takes of a LoRA."""
    networks = [(spec, LoraFit(model=spec.name, expert=expert.value)) for spec in specs for expert in spec.experts]
    try:
        header = lora_header(path)
    except FileError as error:
        return tuple(_refused(fit, path, error) for _, fit in networks)
    return tuple(_fit(header, spec, fit) for spec, fit in networks)


def found_lora(path: Path, n_bytes: int) -> FoundLora:
    """What a plan must know of a LoRA file."""
    facts = lora_facts(path)
    about = {"dense": facts.dense, "dim": facts.dim, "block_bytes": facts.block_bytes}
    return FoundLora(path=str(path), bytes=n_bytes, training=lora_training(path), **about)


@lru_cache(256)  # a keystroke asks about 14 times
def fitted_lora(path: str, size: int, _mtime_ns: int, _configs: str) -> FoundLora:
    """What a plan must know of a LoRA that a request asks for; read again when the file changes."""
    return found_lora(Path(path), size).model_copy(update={"fits": lora_fits(Path(path), *all_models())})


def check_experts(spec: ModelSpec, loras: Iterable[Lora]) -> None:
    """Raises RequestError: a LoRA is meant for an expert that the model does not have."""
    for lora in loras:
        if lora.expert != "both" and not spec.two_experts:
            raise RequestError(
                f"{spec.display_name} has one network", code="lora_expert", field="lora", got=lora.expert,
                expected="no expert", try_instead=f"--lora {lora.path}:{lora.strength:g}",
            )  # fmt: skip


def check_loras(spec: ModelSpec, loras: Iterable[Lora], found: Inventory) -> None:
    """Refuse before the start a LoRA of which a network that it is for takes nothing; `found` as `with_loras` makes it.

    Raises:
        FileError: names the file, why, and what to do.
        RequestError: as check_experts.
    """
    loras = tuple(loras)
    check_experts(spec, loras)
    for lora in loras:
        fits = found.lora_fits(lora.path, lora.expert, spec.name) if lora.strength else ()
        why = fits[0].why if fits else None
        if why is not None:
            other = "a LoRA made for the model, or another --model"
            takes = [f"--lora {lora.path}:{lora.strength:g}:{fit.expert}" for fit in fits if fit.why is None]
            raise FileError(
                why.what, code=why.code, field=f"lora {lora.path}", got=why.got, expected=why.expected,
                try_instead=takes[0] if takes else other if why.code.startswith("lora_") else AGAIN,
            )  # fmt: skip


def _refused(fit: LoraFit, path: Path, error: FileError) -> LoraFit:
    told = {"code": error.code, "what": error.what, "got": error.got, "expected": error.expected}
    return fit.model_copy(update={"why": PassedOver(path=str(path), **told)})


def _fit(header: Header, spec: ModelSpec, fit: LoraFit) -> LoraFit:
    path, network = header.path, _network(spec)
    try:
        found, _ = sorted_layers(header, network.places, fit.expert)
        unknown, misfits, layers, trained = list(found.unknown), list[str](), 0, False
        for layer, parts in found.layers.items():
            unused = not_understood(path, layer, parts, network.shapes, network.parameters)
            unknown += unused
            if len(unused) == len(parts):
                continue
            if misfit := _misfit(header, layer, parts, network):
                misfits.append(misfit)
                continue
            for part, stored in parts.items():
                if part != "alpha" and not header.tensors[stored].dtype.startswith(("F", "BF")):
                    got = [f"{stored} {header.tensors[stored].dtype}"]
                    raise bad_lora(path, "numbers of another kind", "lora_dtype", got)
            layers, trained = layers + 1, trained or set(parts) != {"whole"}
        if not trained and misfits:
            raise bad_lora(path, "no layer has the shape of this model's", "lora_shape", misfits)
        if not trained:
            raise bad_lora(path, "no change of this network in this file", "lora_foreign", list(header.tensors))
        return fit.model_copy(update={"layers": layers, "left_out": listed([*misfits, *unknown])})
    except FileError as error:
        return _refused(fit, path, error)


@lru_cache(maxsize=32)
def _network(spec: ModelSpec) -> Network:
    known = network_shapes(spec, "dit", False, True)
    shapes = {name[: -len(".weight")]: of for name, of in known.items() if name.endswith(".weight") and len(of) == 2}
    parameters = {name: of for name, of in known.items() if name.removesuffix(".weight") not in shapes}
    return Network(shapes, parameters, places_of(shapes, parameters))


def _misfit(header: Header, layer: str, parts: Mapping[str, str], network: Network) -> str:
    """The part of a layer's change whose shape is not the layer's, with both shapes; "" where it fits or only the
    numbers tell (CP decompositions)."""

    def flat(part: str) -> tuple[int, int]:
        shape = header.tensors[parts[part]].shape
        return (shape[0], math.prod(shape[1:])) if shape else (1, 1)

    def factor(whole: str) -> tuple[int, int]:
        return flat(whole) if whole in parts else (flat(f"{whole}_a")[0], flat(f"{whole}_b")[1])

    shape = network.shapes.get(layer, ())
    checks: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []  # part, its shape, that of the layer
    if "down" in parts:
        checks.append(("up", flat("up")[:1], shape[:1]))
        checks += [("down", flat("down"), (flat("up")[1], shape[1]))] if "mid" not in parts else []
    elif "hada_w1_a" in parts and "hada_t1" not in parts:
        checks += [(f"hada_w{i}_a", (*flat(f"hada_w{i}_a")[:1], flat(f"hada_w{i}_b")[1]), shape) for i in "12"]
    elif {"lokr_w1", "lokr_w1_a"} & set(parts) and "lokr_t2" not in parts:
        first, second = factor("lokr_w1"), factor("lokr_w2")
        at = next(part for part in ("lokr_w2", "lokr_w2_a") if part in parts)
        checks.append((at, (first[0] * second[0], first[1] * second[1]), shape))
    for part in ("whole", *ON_PARAMETERS):
        name = target(layer, part, network.shapes, network.parameters) if part in parts else None
        if name is not None:
            wanted = network.shapes.get(name) or network.parameters[name]
            checks.append((part, (math.prod(flat(part)),), (math.prod(wanted),)))
    for part, has, wants in checks:
        if has != wants:
            return f"{parts[part]} {list(header.tensors[parts[part]].shape)} for {list(wants)}"
    return ""


def not_understood(path: Path, layer: str, parts: Mapping[str, str], shapes: Shapes, parameters: Shapes) -> list[str]:
    """Stored names of a layer that are left out: all of them where one is not understood, for half a change is none.

    Raises:
        FileError: a kind of change that is not computed, or half of one is missing.
    """
    if refused := sorted(lora_names.REFUSED.intersection(parts)):
        got = [f"{refused[0]}: {parts[refused[0]]}"]
        raise bad_lora(path, "a kind of LoRA that is not computed", "lora_algorithm", got)
    kinds = [kind for kind, all_parts in KINDS.items() if all_parts.intersection(parts)]
    known = {"whole", *ON_PARAMETERS}.union(*(KINDS[kind] for kind in kinds))
    known |= {"alpha", "magnitude"} if kinds else set()
    if not kinds and set(parts) <= known:
        return [name for part, name in parts.items() if target(layer, part, shapes, parameters) is None]
    if len(kinds) != 1 or not set(parts) <= known or layer not in shapes:
        return list(parts.values())
    missing = set(MUST.get(kinds[0], ())) - set(parts)
    if kinds[0] == "lokr":
        missing = {w for w in ("lokr_w1", "lokr_w2") if w not in parts and not {f"{w}_a", f"{w}_b"} <= set(parts)}
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        missing = {"hada_t1", "hada_t2"} - set(parts)
    if missing:
        what = f"half of a change is missing: {' '.join(sorted(missing))}"
        raise bad_lora(path, what, "lora_half", list(parts.values()))
    return []


def target(layer: str, part: str, shapes: Shapes, parameters: Shapes) -> str | None:
    """The linear or the parameter that a whole difference or value is for."""
    name = layer.removesuffix(".weight") if part == "whole" else layer
    if part in ("whole", "diff") and name in shapes:
        return name
    names = (layer + ON_PARAMETERS.get(part, ""), layer)
    return next((name for name in names if name in parameters), None)


def listed(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(name[:120] for name in names[:SHOWN_NAMES]) + more


def bad_lora(path: Path, what: str, code: str, names: Sequence[str]) -> FileError:
    """The error of a LoRA file, with the names at fault."""
    return FileError(
        what,
        code=code,
        field=f"lora {path}",
        got=f"{path.name}: {listed(names)}",
        expected="LoRA, DoRA, LoHa, LoKr or differences for this Wan model",
        try_instead="a LoRA made for the model, or another --model",
    )
