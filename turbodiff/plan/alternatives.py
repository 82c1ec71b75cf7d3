"""Other ways to run a request, two or three, each with what it takes; some want a download first."""

from collections.abc import Iterator
from typing import Any

from turbodiff.plan.candidates import Candidate, candidates, has_weights, smaller_models
from turbodiff.plan.explain import choice_of
from turbodiff.plan.offload_search import CandidateCost
from turbodiff.plan.plan_context import PlanContext, placement_of
from turbodiff.plan.weight_sizes import missing_bytes
from turbodiff.spec.plan import Alternative, Change
from turbodiff.spec.request import Request

MOST = 3
SHOWN_FIELDS = ("model", "resolution", "width", "height", "num_frames", "quant_linear", "steps")
FAST_STEPS = 2


def alternatives(
    wish: Request, setting: PlanContext, chosen: Candidate, placement: CandidateCost, pinned: frozenset[str]
) -> tuple[Alternative, ...]:
    """At most three that fit and differ from the plan in what a person sees, the nearest to the wish first."""
    out: list[Alternative] = []
    seen = {_visible(chosen)}
    for choice in _trades(wish, setting, chosen, pinned):
        if _visible(choice) in seen or len(out) == MOST:
            continue
        tried = placement_of(wish, choice, setting)
        if tried.fits:
            seen.add(_visible(choice))
            out.append(_alternative(wish, setting, choice, tried))
    if len(out) < MOST and wish.steps > FAST_STEPS and wish.sampler != "unipc" and "steps" not in pinned:
        out.append(_fewer_steps(wish, setting, chosen))
    return tuple(out)


def _visible(choice: Candidate) -> tuple[Any, ...]:
    return choice.spec.name, choice.width, choice.height, choice.num_frames


def _trades(wish: Request, setting: PlanContext, chosen: Candidate, pinned: frozenset[str]) -> Iterator[Candidate]:
    """The wish itself (slow, where it fits), then the first choice below it that keeps each quality in turn."""
    asked = choice_of(wish, chosen, setting)
    below = candidates(wish, setting.machine, setting.inventory, setting.total_bytes, pinned)
    yield asked
    smaller = (c for c in below if _area(c) < _area(asked) and c.num_frames == asked.num_frames)
    shorter = (c for c in below if c.num_frames < asked.num_frames and _area(c) == _area(asked))
    for kept in (smaller, shorter):
        yield from _first_fitting(wish, setting, (c for c in kept if c.spec.name == asked.spec.name))
    yield from _first_fitting(wish, setting, (c for c in below if c.spec.name != asked.spec.name))
    for spec in smaller_models(wish.spec):
        if "model" not in pinned and not has_weights(spec, setting.machine, setting.inventory):
            yield chosen._replace(spec=spec)


def _first_fitting(wish: Request, setting: PlanContext, choices: Iterator[Candidate]) -> Iterator[Candidate]:
    for choice in choices:
        if placement_of(wish, choice, setting).fits:
            yield choice
            return


def _area(choice: Candidate) -> int:
    return choice.width * choice.height


def _alternative(wish: Request, setting: PlanContext, choice: Candidate, placement: CandidateCost) -> Alternative:
    download = 0
    if not has_weights(choice.spec, setting.machine, setting.inventory):
        download = missing_bytes(choice.spec, setting.inventory, choice.int8)
    return Alternative(
        changes=_changes(wish, choice.fields()),
        peak_bytes=placement.peak,
        seconds=round(placement.seconds, 1),
        fits=placement.fits,
        download_bytes=download,
    )


def _fewer_steps(wish: Request, setting: PlanContext, chosen: Candidate) -> Alternative:
    """Fewer steps: for speed, never for memory."""
    quick = wish.model_copy(update={"steps": FAST_STEPS})
    return Alternative(
        changes=_changes(wish, {**chosen.fields(), "steps": FAST_STEPS}),
        peak_bytes=(tried := placement_of(quick, chosen, setting)).peak,
        seconds=round(tried.seconds, 1),
        fits=tried.fits,
    )


def _changes(wish: Request, fields: dict[str, Any]) -> tuple[Change, ...]:
    pairs = ((field, getattr(wish, field), fields.get(field)) for field in SHOWN_FIELDS if field in fields)
    return tuple(
        Change(field=field, from_value=before, to_value=after, lossy=before != "auto")
        for field, before, after in pairs
        if before != after
    )
