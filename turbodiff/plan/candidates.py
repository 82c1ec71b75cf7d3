"""What a request may become: the wish first, then everything below it, in the order of sacrifice.

Least dear first: INT8, frames down to 49, resolution, model; then frames down to 33 in the same order; then the rest.
Pins never move, nothing is ever raised.
"""

from collections.abc import Iterator
from typing import NamedTuple

from turbodiff.plan.hardware import Machine
from turbodiff.plan.schedule import dit_files, network_file
from turbodiff.spec.models import FoundFile, Inventory, ModelSpec, all_models
from turbodiff.spec.plan import JsonScalar
from turbodiff.spec.request import Request
from turbodiff.spec.shapes import RESOLUTIONS, VideoShape, adaptive_size, table_size

FRAME_LADDER = (161, 121, 81, 65, 49, 33, 17, 13, 9, 5, 1)
WORTHWHILE_FRAMES = (
    49,
    33,
)  # 3 and 2 seconds at 16 fps; below, a lower size or a smaller model is the lesser loss
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

    @property
    def visible(self) -> tuple[str, int, int, int]:
        """What a person sees of it."""
        return self.spec.name, self.width, self.height, self.num_frames

    def fields(self) -> dict[str, JsonScalar]:
        """As fields of a Request."""
        same = {name: getattr(self, name) for name in ("resolution", "aspect", "width", "height", "num_frames")}
        return {"model": self.spec.name, **same, "quant_linear": "on" if self.int8 else "off"}


def candidates(
    request: Request, machine: Machine, inventory: Inventory, total_bytes: int | None, pinned: frozenset[str]
) -> Iterator[Candidate]:
    """Every choice at or below the wish that the pins and the weights on disk allow, best first.

    total_bytes: memory of the card, None on a CPU. With INT8 and without come side by side, plain weights first: for
    "auto" the faster one is taken (offload_search.faster), for an explicit "off" INT8 is only there to make it fit.
    """
    wish = request.spec
    models = [wish]
    if "model" not in pinned:
        smaller = [spec for spec in smaller_models(wish) if has_weights(spec, machine, inventory)]
        models += [spec for spec in smaller if loras_fit(request, spec, inventory)]
    switches: dict[str, tuple[bool, ...]] = {}
    for spec in models:
        off = spec.bundled or total_bytes is None or ("quant_linear" in pinned and request.quant_linear == "off")
        only_on_disk = only_int8(spec, inventory) and not machine.pretended
        if request.quant_linear == "on" or only_on_disk:
            switches[spec.name] = (True,)
        elif off:
            switches[spec.name] = (False,)
        else:
            switches[spec.name] = (False, True)
    for shortage in range(len(WORTHWHILE_FRAMES) + 1):
        for spec in models:
            ladder = [min(request.num_frames, spec.limits.max_frames)]
            ladder += [frames for frames in FRAME_LADDER if frames < ladder[0]]
            frame_counts = [request.num_frames] if "num_frames" in pinned else ladder
            for size in _sizes(request, spec, pinned):
                for frames in frame_counts:
                    if sum([frames < worthwhile for worthwhile in WORTHWHILE_FRAMES]) == shortage:
                        for int8 in switches[spec.name]:
                            yield Candidate(spec, *size, frames, int8)


def as_wished(request: Request, int8: bool) -> Candidate:
    """The wish itself; where INT8 is "auto", `int8` is taken."""
    int8 = int8 if request.quant_linear == "auto" else request.quant_linear == "on"
    return Candidate(
        request.spec, request.resolution, request.aspect, request.width, request.height, request.num_frames, int8
    )


def has_weights(spec: ModelSpec, machine: Machine, inventory: Inventory) -> bool:
    """Whether the networks of a model are on disk; with a pretended machine every model counts as present."""
    return machine.pretended or spec.bundled or inventory.has_networks(spec)


def loras_fit(request: Request, spec: ModelSpec, inventory: Inventory) -> bool:
    """Whether the networks of a model take every LoRA of a request, as far as their headers are known."""
    applied = [lora for lora in request.loras if lora.strength]
    fits = [fit for lora in applied for fit in inventory.lora_fits(lora.path, lora.expert, spec.name)]
    return all(fit.why is None for fit in fits)


def smaller_models(spec: ModelSpec) -> list[ModelSpec]:
    """Models of the same kind with a smaller network, largest first; never the bundled demo."""
    sizes = [(other.network_size, other) for other in all_models() if other.kind == spec.kind and not other.bundled]
    smaller = [(size, other) for size, other in sizes if size < spec.network_size and not spec.bundled]
    return [other for _, other in sorted(smaller, key=lambda pair: pair[0], reverse=True)]


def network_files(request: Request, inventory: Inventory) -> tuple[FoundFile, ...]:
    """The file of each network of a request as a plan leaves it, which the loader opens; () where one is missing."""
    choice, found = as_wished(request, False), list[FoundFile]()
    for expert in choice.spec.experts:
        if file := network_file(choice, inventory, expert):
            found.append(file)
    return tuple(found) if len(found) == len(choice.spec.experts) else ()


def only_int8(spec: ModelSpec, inventory: Inventory) -> bool:
    """Whether the disk holds this model's INT8 file and not the plain one."""
    int8, plain = dit_files(spec, inventory)
    return int8 is not None and plain is None


def _sizes(request: Request, spec: ModelSpec, pinned: frozenset[str]) -> list[tuple[str, str, int, int]]:
    """(resolution, aspect, width, height): the wish and every named resolution well below it, same aspect."""
    wish = (request.resolution, request.aspect, request.width, request.height)
    if SIZE_PINS & pinned:
        return [wish]
    known = RESOLUTIONS.get(request.resolution, {})
    named = known.get(request.aspect) == wish[2:]
    areas: dict[str, int] = {}
    for name in spec.limits.resolutions:
        width, height = RESOLUTIONS[name].get("9:16", (128, 128))
        areas[name] = width * height
    lower = []
    for name in sorted(areas, key=areas.__getitem__, reverse=True):
        if areas[name] >= 0.9 * request.width * request.height:
            continue
        if named:
            lower.append((name, request.aspect, *table_size(name, request.aspect)))
        else:
            size = adaptive_size(request.width, request.height, areas[name])
            lower.append((name if known else "custom", request.aspect, *size))
    return [wish, *lower]
