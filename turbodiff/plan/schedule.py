"""What a request leaves to the weights, filled in for one candidate: which sampler, how many steps, and why.

The weights are those that the loader will take: the file of each network, the LoRAs on it, and a person's word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from turbodiff.spec.experts import Expert
from turbodiff.spec.models import FoundFile, Inventory, ModelSpec
from turbodiff.spec.schedules import (
    MAX_STEPS,
    MOST_STEPS,
    PLAIN,
    TURBO_STEPS,
    Training,
    objections,
    schedule_for,
    steps_of_share,
    together,
)  # fmt: skip

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


def network_file(spec: ModelSpec, int8: bool, inventory: Inventory, expert: Expert | None = None) -> FoundFile | None:
    """The file that an expert's weights (by default the first's) are made from, None where none is here."""
    expert = expert or spec.experts[0]
    int8_file, plain = dit_files(spec, inventory, expert)
    return (int8_file if int8 else plain) or inventory.of(spec.name, expert.component)


def expert_trainings(request: Request, candidate: Candidate, inventory: Inventory) -> tuple[Training, ...]:
    """How each network of a candidate was trained, LoRAs and a person's word included."""
    spec, found = candidate.spec, []
    for expert in spec.experts:
        file = network_file(spec, candidate.int8, inventory, expert)
        published = PUBLISHED if spec.turbo else PLAIN
        weights = (file and file.training) or published
        applied = (lora for lora in request.loras if lora.strength > 0 and lora.expert in ("both", expert))
        loras = tuple(_lora_training(lora, inventory, spec.dit.dim) for lora in applied)
        found.append(together(weights, request.weights_are, loras))
    return tuple(found)


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
    loras = [_lora_training(lora, inventory, candidate.spec.dit.dim) for lora in wish.loras if lora.strength > 0]
    if training.trained_for == "rcm" and wish.weights_are == "auto":
        for lora in loras:
            if lora.trained_for == "step-distilled":
                yield "distilled_twice", {"family": lora.recipe.title if lora.family else "unnamed"}
    file = network_file(candidate.spec, candidate.int8, inventory)
    if settled.attention in SPARSE and file is not None and not file.sla:
        yield "not_distilled_for_sla", {"attention": settled.attention}
