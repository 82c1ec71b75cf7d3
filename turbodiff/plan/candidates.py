"""What a request may become: the wish first, then everything below it, in the order of sacrifice.

Least dear first: INT8, frames down to 49, resolution, model, and only then the last frames. Pins never move, nothing is
ever raised.
"""

from typing import Any, NamedTuple

from turbodiff.plan.hardware import Machine, prefers_int8
from turbodiff.spec.inventory import Inventory
from turbodiff.spec.models import ModelSpec, all_models
from turbodiff.spec.request import Request
from turbodiff.spec.shapes import RESOLUTIONS, VideoShape, adaptive_size, table_size

FRAME_LADDER = (161, 121, 81, 65, 49, 33, 17, 13, 9, 5, 1)
WORTHWHILE_FRAMES = 49  # three seconds at 16 fps; below this a lower resolution or a smaller model is the lesser loss
SIZE_PINS = frozenset({"resolution", "size", "width", "height", "aspect"})


class Candidate(NamedTuple):
    """One candidate, as the fields that tell it from the wish."""

    spec: ModelSpec
    resolution: str
    aspect: str
    width: int
    height: int
    num_frames: int
    int8: bool

    @property
    def shape(self) -> VideoShape:
        """The clip in pixels."""
        return VideoShape(self.num_frames, self.height, self.width)

    def fields(self) -> dict[str, Any]:
        """As fields of a Request."""
        return {
            "model": self.spec.name,
            "resolution": self.resolution,
            "aspect": self.aspect,
            "width": self.width,
            "height": self.height,
            "num_frames": self.num_frames,
            "quant_linear": "on" if self.int8 else "off",
        }


def candidates(
    request: Request, machine: Machine, inventory: Inventory, total_bytes: int | None, pinned: frozenset[str]
) -> list[Candidate]:
    """Every choice at or below the wish that the pins and the weights on disk allow, best first."""
    ranked: list[tuple[tuple[Any, ...], Candidate]] = []
    for model_rank, spec in enumerate(_models(request, machine, inventory, pinned)):
        switches = _switches(request, spec, machine, inventory, total_bytes, pinned)
        for size_rank, size in enumerate(_sizes(request, spec, pinned)):
            for frames in _frames(request, spec, pinned):
                for int8 in switches:
                    few = frames < WORTHWHILE_FRAMES
                    ranked.append(((few, model_rank, size_rank, -frames, int8), Candidate(spec, *size, frames, int8)))
    return [choice for _, choice in sorted(ranked, key=lambda pair: pair[0])]


def has_weights(spec: ModelSpec, machine: Machine, inventory: Inventory) -> bool:
    """Whether the networks of a model are on disk; with a pretended machine every model counts as present."""
    parts = ("dit_high", "dit_low") if spec.two_experts else ("dit",)
    return machine.pretended or spec.bundled or all(inventory.of(spec.name, part) for part in parts)


def smaller_models(spec: ModelSpec) -> list[ModelSpec]:
    """Models of the same kind with a smaller network, largest first; never the bundled demo."""
    same = [other for other in all_models() if other.kind == spec.kind and not other.bundled and not spec.bundled]
    return sorted((other for other in same if _size(other) < _size(spec)), key=_size, reverse=True)


def only_int8(spec: ModelSpec, inventory: Inventory) -> bool:
    """Whether the disk holds this model's INT8 file and not the plain one."""
    part = "dit_high" if spec.two_experts else "dit"
    return inventory.of(spec.name, part, quant=True) is not None and inventory.of(spec.name, part, quant=False) is None


def _size(spec: ModelSpec) -> int:
    return spec.dit.dim**2 * spec.dit.num_layers * len(spec.experts)


def _models(request: Request, machine: Machine, inventory: Inventory, pinned: frozenset[str]) -> list[ModelSpec]:
    wish = request.spec
    if "model" in pinned:
        return [wish]
    return [wish, *(spec for spec in smaller_models(wish) if has_weights(spec, machine, inventory))]


def _sizes(request: Request, spec: ModelSpec, pinned: frozenset[str]) -> list[tuple[str, str, int, int]]:
    """(resolution, aspect, width, height): the wish and every named resolution well below it, same aspect."""
    wish = (request.resolution, request.aspect, request.width, request.height)
    if SIZE_PINS & pinned:
        return [wish]
    named = request.resolution in RESOLUTIONS and (request.width, request.height) == _table(request)
    lower = []
    for name in sorted(spec.limits.resolutions, key=_area, reverse=True):
        if _area(name) >= 0.9 * request.width * request.height:
            continue
        if named:
            lower.append((name, request.aspect, *table_size(name, request.aspect)))
        else:
            size = adaptive_size(request.width, request.height, _area(name))
            lower.append((name if request.resolution in RESOLUTIONS else "custom", request.aspect, *size))
    return [wish, *lower]


def _table(request: Request) -> tuple[int, int]:
    return RESOLUTIONS[request.resolution].get(request.aspect, (0, 0))


def _area(name: str) -> int:
    width, height = next(reversed(RESOLUTIONS[name].values())) if name != "128" else (128, 128)
    return width * height


def _frames(request: Request, spec: ModelSpec, pinned: frozenset[str]) -> list[int]:
    if "num_frames" in pinned:
        return [request.num_frames]
    wish = min(request.num_frames, spec.limits.max_frames)
    return [wish, *(frames for frames in FRAME_LADDER if frames < wish)]


def _switches(
    request: Request,
    spec: ModelSpec,
    machine: Machine,
    inventory: Inventory,
    total_bytes: int | None,
    pinned: frozenset[str],
) -> tuple[bool, ...]:
    """Whether INT8 is on, best first. "auto": on below 40 GB; above, and for an explicit "off", only to make it fit."""
    if request.quant_linear == "on":
        return (True,)
    if only_int8(spec, inventory) and not machine.pretended:
        return (True,)
    if spec.bundled or total_bytes is None or ("quant_linear" in pinned and request.quant_linear == "off"):
        return (False,)
    return (True,) if request.quant_linear == "auto" and prefers_int8(total_bytes) else (False, True)
