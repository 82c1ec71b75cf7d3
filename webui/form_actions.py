"""Ways to fill the form, without Gradio: examples, alternatives, rounds, locks, LoRAs, old requests, a clip's frame."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import ModelSpec, find_model
from webui import form, initial_form
from webui.actions import UiState, clip_of, number_of, unpacked, wish
from webui.snapshot import StudioReader
from webui.view import jobs, rounds

Values = Mapping[str, Any]
Fill = Callable[[StudioReader, str, Values, UiState], dict[str, Any] | None]

FILLABLE = set(form.FIELDS) - {"image", "prompt", "negative_prompt", "loras"}
MAX_ARGUMENT_CHARS = 20_000


def fill(reader: StudioReader, name: str, argument: str, values: Values, ui_state: UiState) -> dict[str, Any] | None:
    """The form's new values for a button that fills it, or None to leave it as it is.

    Raises:
        TurbodiffError: it cannot be done, in the person's words.
    """
    found = FILLS.get(name)
    return found(reader, argument[:MAX_ARGUMENT_CHARS], values, ui_state) if found else None


def _example(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any]:
    del reader, ui_state
    return {**values, "prompt": argument}


def _fields(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any]:
    """An alternative, the advisor's proposal: some fields at once."""
    del reader, ui_state
    given = form.sound({key: value for key, value in unpacked(argument).items() if key in FILLABLE})
    changed = {**values, **given}
    return form.fitted_to(find_model(str(changed["model"])), changed)


def _pin(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any]:
    """Lock one field as it was asked."""
    del reader, ui_state
    return {**values, "pinned": [name for name in form.PINS if name == argument or name in (values["pinned"] or ())]}


def _smaller(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any]:
    """The guide's emergency setting for what the form holds."""
    del reader, argument, ui_state
    changed = {**values, **jobs.smaller(values), "pinned": []}
    return form.fitted_to(find_model(str(changed["model"])), changed)


def _lora(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any]:
    """One LoRA put on or off, or its strength or expert changed."""
    del reader, ui_state
    change = unpacked(argument)
    if not isinstance(change.get("strength", 1.0), int | float) or not isinstance(change.get("expert", ""), str):
        return dict(values)
    return {**values, "loras": form.with_lora(values.get("loras"), str(change.get("name", "")), change)}


def _reuse(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any]:
    del ui_state
    return filled_from(reader, wish(clip_of(reader, argument)), values)


def _animate(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any]:
    """Picture to video from a frame of a clip: "CLIP SECONDS", the last frame where no second is given."""
    del ui_state
    name, _, at = argument.partition(" ")
    clip = clip_of(reader, name)
    fresh = initial_form.of_kind(reader, "i2v")
    picture = reader.frame(clip, at)
    prompt = {"prompt": str(clip.request.get("prompt", ""))}
    return form.fitted_to(find_model(str(fresh["model"])), {**values, **fresh, **prompt, "image": str(picture)})


def filled_from(reader: StudioReader, request: Values, values: Values) -> dict[str, Any]:
    """The form's values from a stored request; a picture that was not given to this page is asked for again."""
    kept = form.from_request(request)
    spec = find_model(str(kept["model"]))
    return {**values, **form.defaults(spec), **kept, "image": reader.picture_again(str(request.get("image") or ""))}


def _round(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any] | None:
    """A round fills the form; coming from a clip ("polish CLIP") its prompt and seed are kept."""
    name, _, clip = argument.partition(" ")
    held = filled_from(reader, wish(clip_of(reader, clip)), values) if clip else dict(values)
    spec = find_model(str(held["model"]))
    found = next((entry for entry in reader.studio.rounds(spec.bundled) if entry.name == name), None)
    if found is None:
        return None
    if "seed" in found.keeps and not str(held.get("seed") or ""):
        seen = reader.clip(ui_state.get("at", "")) if not ui_state.get("at", "").startswith("job:") else None
        held["seed"] = str(seen.seed) if seen else ""
    changed = rounds.fields_of(found, held)
    return form.fitted_to(find_model(str(changed["model"])), changed)


def _from_row(reader: StudioReader, argument: str, values: Values, ui_state: UiState) -> dict[str, Any] | None:
    del ui_state
    row = number_of(argument)
    found = next((seed for seed in reader.studio.seeds(limit=10_000) if seed.id == row), None)
    if found is None:
        return None
    if found.recipe is not None:
        return filled_from(reader, found.recipe.request.model_dump(mode="json"), values)
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


def from_video(reader: StudioReader, video: Path, values: Values) -> dict[str, Any]:
    """The form's values from a video of ours.

    Raises:
        FileError: not a video of turbodiff.
    """
    return filled_from(reader, reader.studio.sidecar_of(video).request.model_dump(mode="json"), values)


def model_or(name: str, otherwise: ModelSpec) -> ModelSpec:
    """The model of that name, else another: a browser's draft may name a model of another version."""
    try:
        return find_model(name)
    except TurbodiffError:
        return otherwise
