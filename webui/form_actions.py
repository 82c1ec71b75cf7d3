"""Ways to fill the form, without Gradio: examples, alternatives, rounds, locks, LoRAs, old requests, a clip's frame."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import ModelSpec, find_model
from webui import form, initial_form
from webui.actions import Looking, clip_of, number_of, unpacked, wish
from webui.snapshot import Desk
from webui.view import jobs, rounds

Values = Mapping[str, Any]
Fill = Callable[[Desk, str, Values, Looking], dict[str, Any] | None]

FILLABLE = set(form.FIELDS) - {"image", "prompt", "negative_prompt", "loras"}
MAX_ARGUMENT_CHARS = 20_000


def fill(desk: Desk, name: str, argument: str, values: Values, looking: Looking) -> dict[str, Any] | None:
    """The form's new values for a button that fills it, or None to leave it as it is.

    Raises:
        TurbodiffError: it cannot be done, in the person's words.
    """
    found = FILLS.get(name)
    return found(desk, argument[:MAX_ARGUMENT_CHARS], values, looking) if found else None


def _example(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any]:
    del desk, looking
    return {**values, "prompt": argument}


def _fields(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any]:
    """An alternative, the advisor's proposal: some fields at once."""
    del desk, looking
    given = form.sound({key: value for key, value in unpacked(argument).items() if key in FILLABLE})
    changed = {**values, **given}
    return form.fitted_to(find_model(str(changed["model"])), changed)


def _pin(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any]:
    """Lock one field as it was asked."""
    del desk, looking
    return {**values, "pinned": [name for name in form.PINS if name == argument or name in (values["pinned"] or ())]}


def _smaller(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any]:
    """The guide's emergency setting for what the form holds."""
    del desk, argument, looking
    changed = {**values, **jobs.smaller(values), "pinned": []}
    return form.fitted_to(find_model(str(changed["model"])), changed)


def _lora(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any]:
    """One LoRA put on or off, or its strength or expert changed."""
    del desk, looking
    change = unpacked(argument)
    if not isinstance(change.get("strength", 1.0), int | float) or not isinstance(change.get("expert", ""), str):
        return dict(values)
    return {**values, "loras": form.with_lora(values.get("loras"), str(change.get("name", "")), change)}


def _reuse(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any]:
    del looking
    return filled_from(desk, wish(clip_of(desk, argument)), values)


def _animate(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any]:
    """Picture to video from a frame of a clip: "CLIP SECONDS", the last frame where no second is given."""
    del looking
    name, _, at = argument.partition(" ")
    clip = clip_of(desk, name)
    fresh = initial_form.of_kind(desk, "i2v")
    picture = desk.frame(clip, at)
    prompt = {"prompt": str(clip.request.get("prompt", ""))}
    return form.fitted_to(find_model(str(fresh["model"])), {**values, **fresh, **prompt, "image": str(picture)})


def filled_from(desk: Desk, request: Values, values: Values) -> dict[str, Any]:
    """The form's values from a stored request; a picture that was not given to this page is asked for again."""
    kept = form.from_request(request)
    spec = find_model(str(kept["model"]))
    return {**values, **form.defaults(spec), **kept, "image": desk.picture_again(str(request.get("image") or ""))}


def _round(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any] | None:
    """A round fills the form; coming from a clip ("polish CLIP") its prompt and seed are kept."""
    name, _, clip = argument.partition(" ")
    held = filled_from(desk, wish(clip_of(desk, clip)), values) if clip else dict(values)
    spec = find_model(str(held["model"]))
    found = next((entry for entry in desk.studio.rounds(spec.bundled) if entry.name == name), None)
    if found is None:
        return None
    if "seed" in found.keeps and not str(held.get("seed") or ""):
        seen = desk.clip(looking.get("at", "")) if not looking.get("at", "").startswith("job:") else None
        held["seed"] = str(seen.seed) if seen else ""
    changed = rounds.fields_of(found, held)
    return form.fitted_to(find_model(str(changed["model"])), changed)


def _from_row(desk: Desk, argument: str, values: Values, looking: Looking) -> dict[str, Any] | None:
    del looking
    row = number_of(argument)
    found = next((seed for seed in desk.studio.seeds(limit=10_000) if seed.id == row), None)
    if found is None:
        return None
    if found.recipe.get("request"):
        return filled_from(desk, found.recipe["request"], values)
    spec = model_or(found.row.model, find_model(str(values["model"])))
    asked = {"prompt": found.row.prompt, "seed": found.row.seed, "resolution": found.row.resolution}
    return form.fitted_to(spec, {**values, **form.defaults(spec), **asked})


FILLS: dict[str, Fill] = {
    "example": _example,
    "fill": _fields,
    "pin": _pin,
    "smaller": _smaller,
    "lora": _lora,
    "round": _round,
    "reuse": _reuse,
    "edit": _reuse,
    "animate": _animate,
    "use_seed": _from_row,
}


def from_video(desk: Desk, video: Path, values: Values) -> dict[str, Any]:
    """The form's values from a video of ours.

    Raises:
        FileError: not a video of turbodiff.
    """
    return filled_from(desk, desk.studio.settings_of(video)["request"], values)


def model_or(name: str, otherwise: ModelSpec) -> ModelSpec:
    """The model of that name, else another: a browser's draft may name a model of another version."""
    try:
        return find_model(name)
    except TurbodiffError:
        return otherwise
