"""What a request leaves to the weights, filled in for one candidate: which sampler, how many steps, and why.

The weights are those that the loader will take: the file of each network, the LoRAs on it, and a person's word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from turbodiff.spec.experts import Expert
from turbodiff.spec.models import FoundFile, Inventory, ModelSpec
from turbodiff.spec.schedules import (
    GUIDED_SAMPLERS,
    MAX_STEPS,
    MOST_STEPS,
    PLAIN,
    TURBO_STEPS,
    Training,
    by_word,
    objections,
    schedule_for,
    steps_of_share,
    together,
)  # fmt: skip
from turbodiff.spec.shapes import RESOLUTIONS

if TYPE_CHECKING:
    from turbodiff.plan.candidates import Candidate
    from turbodiff.spec.plan import JsonScalar
    from turbodiff.spec.request import Lora, Request

PUBLISHED = Training("rcm", evidence="published")  # the files that `models pull` fetches
SPARSE = ("sla", "sagesla")


def dit_files(
    spec: ModelSpec, inventory: Inventory, expert: Expert | None = None
) -> tuple[FoundFile | None, FoundFile | None]:
    """(INT8, plain) file of a network, by default a model's first; None where there is none."""
    component = (expert or spec.experts[0]).component
    return inventory.of(spec.name, component, True), inventory.of(spec.name, component, False)


def network_file(candidate: Candidate, inventory: Inventory, expert: Expert | None = None) -> FoundFile | None:
    """The file that an expert's weights (by default the first's) are made from, None where none is here: INT8 where
    that is asked for, of networks distilled once per resolution the nearest by area. The loader asks it, too."""
    spec = candidate.spec
    resolution = nearest_resolution(spec.limits.trained_resolutions, candidate.width * candidate.height)
    component = (expert or spec.experts[0]).component
    of_kind = inventory.of(spec.name, component, candidate.int8, resolution)
    return of_kind or inventory.of(spec.name, component, None, resolution)


@lru_cache(1024)  # a plan asks for every candidate
def nearest_resolution(names: tuple[str, ...], area: int) -> str:
    """Of named resolutions the one whose 16:9 frame is nearest to `area` pixels, by ratio; "" where none has one."""
    areas = {name: math.prod(RESOLUTIONS[name]["16:9"]) for name in names if "16:9" in RESOLUTIONS[name]}
    return min(areas, key=lambda name: abs(math.log(area / areas[name])), default="")


class Network(NamedTuple):
    """How the file of a network was trained, and the LoRAs on it that distil, in order."""

    weights: Training
    loras: tuple[tuple[Lora, Training], ...]


def _networks(request: Request, candidate: Candidate, inventory: Inventory) -> Iterator[Network]:
    spec = candidate.spec
    for expert in spec.experts:
        file = network_file(candidate, inventory, expert)
        published = PUBLISHED if spec.turbo else PLAIN
        applied = [lora for lora in request.loras if lora.strength > 0 and lora.expert in ("both", expert)]
        told = ((lora, _lora_training(lora, inventory, spec.dit.dim)) for lora in applied)
        yield Network((file and file.training) or published, tuple(one for one in told if one[1].trained_for != "base"))


def expert_trainings(request: Request, candidate: Candidate, inventory: Inventory) -> tuple[Training, ...]:
    """How each network of a candidate was trained, LoRAs and a person's word included."""
    return tuple(
        together(network.weights, request.weights_are, tuple(training for _, training in network.loras))
        for network in _networks(request, candidate, inventory)
    )


def _lora_training(lora: Lora, inventory: Inventory, dim: int) -> Training:
    """How a LoRA makes a network of width `dim` be sampled: one that was made for another width is left out of it."""
    of_width = (found for found in inventory.loras if found.path == lora.path and found.dim in (0, dim))
    return next((found.training for found in of_width), PLAIN)


def training_of(trainings: tuple[Training, ...]) -> Training:
    """What two networks are run as together: as plain ones where one of them is, which the other survives better."""
    return next((training for training in trainings if training.trained_for == "base"), trainings[0])


def scheduled(request: Request, candidate: Candidate, inventory: Inventory) -> Request:
    """The request with what it leaves to the weights of a candidate filled in."""
    if request.sampler != "auto" and not request.auto:
        return request
    training, spec = training_of(expert_trainings(request, candidate, inventory)), candidate.spec
    pixels = candidate.width * candidate.height
    schedule = schedule_for(training, spec.base, spec.defaults.boundary, pixels, request.sampler)
    steps = request.steps
    if "steps" not in request.auto and request.sampler == "auto":
        wanted = steps if "steps" in request.pinned else steps_of_share(steps, schedule.steps)
        steps = min(wanted, MOST_STEPS.get(schedule.sampler, MAX_STEPS))
    return request.scheduled(schedule, steps)


def schedule_reasons(
    wish: Request, settled: Request, candidate: Candidate, inventory: Inventory
) -> Iterator[tuple[str, dict[str, JsonScalar]]]:
    """Why this sampler, and what cannot work with these weights, as (key of a reason, its numbers)."""
    trainings = expert_trainings(wish, candidate, inventory)
    training = training_of(trainings)
    facts: dict[str, JsonScalar] = {
        "sampler": settled.sampler, "steps": settled.steps, "shift": settled.shift, "guidance": settled.guidance,
    }  # fmt: skip
    if wish.sampler == "auto":
        key = {"rcm": "schedule_rcm", "base": "schedule_base", "step-distilled": "schedule_step_distilled"}
        numbers: dict[str, JsonScalar] = {"evidence": training.evidence or "nothing"}
        numbers |= {"sampler": settled.sampler, "steps": settled.steps}
        if training.trained_for == "base":
            numbers |= {"guidance": settled.guidance, "shift": settled.shift}
        if training.trained_for == "step-distilled":
            numbers |= {"family": training.recipe.title if training.family else "unnamed", "shift": settled.shift}
        yield key[training.trained_for], numbers
    said = wish.sampler == "auto" and "steps" not in wish.auto | wish.pinned
    if said and wish.steps <= TURBO_STEPS < settled.steps:
        yield "steps_of_share", {"asked": wish.steps, "steps": settled.steps}
    if settled.negative_prompt and "negative_prompt" in wish.auto:
        yield "negative_prompt_of_wan", {}
    if len({found.trained_for for found in trainings}) > 1:
        high, low = trainings
        yield "experts_trained_apart", {"high": high.trained_for, "low": low.trained_for}
    for objection in objections(training, settled.sampler, settled.steps, settled.guidance):
        yield objection, facts
    if settled.sampler not in GUIDED_SAMPLERS and (settled.guidance > 1 or settled.negative_prompt.strip()):
        yield "guidance_unread", {"sampler": settled.sampler, "guidance": settled.guidance}
    for apart, told in dict(_distilled_apart(wish, candidate, inventory, training)).items():
        yield apart, {**told, "sampler": settled.sampler, "steps": settled.steps, "guidance": settled.guidance}
    file = network_file(candidate, inventory)
    if settled.attention in SPARSE and file is not None and not file.sla:
        yield "not_distilled_for_sla", {"attention": settled.attention}


def _distilled_apart(
    wish: Request, candidate: Candidate, inventory: Inventory, taken: Training
) -> Iterator[tuple[str, dict[str, JsonScalar]]]:
    """What distils beside what sets the schedule: a LoRA on weights that are distilled, or a second LoRA."""
    for weights, loras in _networks(wish, candidate, inventory):
        own, first = by_word(weights, wish.weights_are), together(weights, wish.weights_are, tuple(t for _, t in loras))
        names = [f"{training.title} ({Path(lora.path).stem[:60]})" for lora, training in loras]
        if first != taken:
            continue  # the two experts run as the other one: said as experts_trained_apart
        if loras and own.trained_for != "base" and first.evidence != "lora":
            yield "distilled_twice", {"weights": own.title, "loras": ", ".join(names)}
        elif len(loras) > 1:
            yield "loras_distil_apart", {"first": names[0], "others": ", ".join(names[1:])}
