"""Ways to fill the form, without Gradio: what it starts with, and the buttons that change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from turbodiff.spec.errors import RequestError, TurbodiffError
from turbodiff.spec.models import all_models, find_model
from turbodiff.studio import continuing_model
from webui import form
from webui.actions import UiState, number_of, object_of, wished_request
from webui.form import FormValues
from webui.panels.first_aid import smaller
from webui.panels.form_help import round_fields

if TYPE_CHECKING:
    from webui.snapshot import StudioReader

FILLABLE = {*form.FIELDS, "edits"} - {
    *form.PICTURES,
    "prompt",
    "negative_prompt",
    "loras",
}  # what an alternative may change
MAX_ARGUMENT_CHARS = 20_000


def initial_values(reader: StudioReader, kind: str | None = None) -> FormValues:
    """Values of a fresh form for a kind of clip, by default the first model's.

    The tier's model if it is on this disk, else the first of that kind that is.
    """
    kind = kind or all_models()[0].kind
    here, tier = reader.here(), reader.tier()
    if tier is not None:
        fields = getattr(tier, kind).fields()
        spec = find_model(str(fields["model"]))
        if here.get(spec.name):
            return cast(FormValues, {**form.defaults(spec), **fields, "model": spec.name})
    of_kind = [spec for spec in all_models() if spec.kind == kind]
    return form.defaults(next((spec for spec in of_kind if here.get(spec.name)), of_kind[0]))


def kept_form(reader: StudioReader, names: Sequence[str], draft: object) -> FormValues:
    """The form of these fields as a browser left it; whatever else is in its draft is passed over."""
    kept: Mapping[str, object] = form.sanitize(draft) if isinstance(draft, dict) else {}
    passed = (*form.PICTURES, "card")
    held = {name: value for name, value in kept.items() if name in names and name not in passed}
    first = initial_values(reader)
    spec = form.model_called(held.get("model"), find_model(str(first["model"])))
    values = form.fitted_to(spec, {**(form.defaults(spec) if held else first), **held})
    return with_pictures(reader, values, kept)


def with_pictures(reader: StudioReader, values: FormValues, kept: Mapping[str, object]) -> FormValues:
    """The same values with the uploads that were kept; one that is no longer there is asked for again."""
    found: dict[str, str | None] = dict.fromkeys(form.PICTURES)
    for name in form.PICTURES:
        with suppress(TurbodiffError, ValueError):
            found[name] = str(reader.own(Path(str(kept.get(name) or ""))))
    return {**values, **found}  # type: ignore[typeddict-item]


def fill(reader: StudioReader, name: str, argument: str, values: FormValues, ui_state: UiState) -> FormValues | None:
    """The form's new values for a button that fills it, or None to leave it as it is.

    Raises:
        TurbodiffError: it cannot be done, in the person's words.
    """
    argument = argument[:MAX_ARGUMENT_CHARS]
    match name:
        case "example":
            return {**values, "prompt": argument}
        case "pin":  # lock one field as it was asked
            pinned = {argument, *(values["pinned"] or ())}
            return {**values, "pinned": [pin for pin in form.PINS if pin in pinned]}
        case "fill":  # an alternative, the advisor's proposal: some fields at once
            given = {field: value for field, value in object_of(argument).items() if field in FILLABLE}
            return _fitted({**values, **form.sanitize(given)})
        case "card":  # another card for the meter, "" for this machine
            return {**values, "card": argument if argument in form.CARDS else ""}
        case "smaller":  # the guide's emergency setting
            less = smaller(str(values["model"]), int(values.get("num_frames") or 49))
            return _fitted({**values, **less, "pinned": []})
        case "lora":  # one LoRA put on or off, or a strength changed
            change = object_of(argument)
            numbers = [change[key] for key in ("strength", "high", "low") if key in change]
            if not all(isinstance(number, int | float) for number in numbers):
                return values
            name = str(change.get("name", ""))
            if change.get("on") is True and find_model(str(values["model"])).two_experts:
                change = {"expert": reader.lora_facts(name)[0].expert, **change}  # its name or metadata proposes one
            return {**values, "loras": form.with_lora(values.get("loras"), name, change)}
        case "preset":
            kept = reader.studio.recipes.presets().get(argument, {})
            return _fitted({**values, **form.sanitize(kept), **{name: values.get(name) for name in form.PICTURES}})
        case "round":
            return _values_of_round(reader, argument, values, ui_state)
        case "reuse" | "edit":
            return from_request(reader, wished_request(reader.clip_called(argument)), values)
        case "animate" | "continue":
            return _values_from_clip(reader, name, argument, values)
        case "use_seed" | "edit_job":
            values_of = _values_of_seed if name == "use_seed" else _values_of_job
            return values_of(reader, number_of(argument), values)
    return None


def from_request(reader: StudioReader, request: Mapping[str, Any], values: FormValues) -> FormValues:
    """The form's values from a stored request; a picture that was not given to this page is asked for again."""
    kept = form.from_request(request)
    again = {name: reader.picture_again(str(request.get(name) or "")) for name in form.PICTURES}
    fresh = {**values, **form.defaults(find_model(str(kept["model"]))), **kept, **again}
    return cast(FormValues, fresh)


def _values_from_clip(reader: StudioReader, name: str, argument: str, values: FormValues) -> FormValues:
    """Picture to video from a frame of a clip ("animate", "CLIP SECONDS", the last where no second is given), or its
    next segment ("continue", "CLIP"), with the model that goes on where its own ends."""
    clip_name, _, at = argument.partition(" ")
    clip = reader.clip_called(clip_name)
    prompt = {"prompt": clip.request.prompt}
    if name == "animate":
        own = {
            **initial_values(reader, "i2v"),
            "image": str(reader.frame(clip, at)),
            "end_image": None,
            "continues": "",
        }
    else:
        spec = continuing_model(find_model(clip.request.model), reader.studio.inventory())
        own = {**form.defaults(spec), "seed": "", "image": None, "end_image": None, "continues": clip.id}
    return _fitted({**values, **own, **prompt})


def _fitted(values: Mapping[str, Any]) -> FormValues:
    return form.fitted_to(find_model(str(values["model"])), values)


def _values_of_round(reader: StudioReader, argument: str, values: FormValues, ui_state: UiState) -> FormValues | None:
    """A round fills the form; coming from a clip ("polish CLIP") its prompt and seed are kept."""
    name, _, clip = argument.partition(" ")
    held = from_request(reader, wished_request(reader.clip_called(clip)), values) if clip else values
    spec = find_model(str(held["model"]))
    found = next((entry for entry in reader.studio.rounds(spec.bundled) if entry.name == name), None)
    if found is None:
        return None
    if "seed" in found.keeps and not str(held.get("seed") or ""):
        at = ui_state.get("at", "")
        seen = reader.clip(at) if not at.startswith("job:") else None
        held = {**held, "seed": str(seen.request.seed) if seen else ""}
    return _fitted(round_fields(found, held))


def _values_of_seed(reader: StudioReader, row: int, values: FormValues) -> FormValues | None:
    """A row of the archive fills the form: with its clip's whole request, else with what the table says."""
    found = reader.studio.seed(row)
    if found is None:
        return None
    if found.recipe is not None:
        return from_request(reader, found.recipe.request.model_dump(mode="json"), values)
    spec = form.model_called(found.row.model, find_model(str(values["model"])))
    asked = {"prompt": found.row.prompt, "seed": found.row.seed, "resolution": found.row.resolution}
    return form.fitted_to(spec, {**values, **form.defaults(spec), **asked})


def _values_of_job(reader: StudioReader, number: int, values: FormValues) -> FormValues:
    """The settings of a waiting job, which stays in the queue as it is until they are saved."""
    job = reader.studio.job(number)
    if job.state != "queued":
        raise RequestError(f"job {number} does not wait", code="job_not_waiting", field="job", got=job.state)
    held = from_request(reader, job.request.model_dump(mode="json"), values)
    return {**held, "edits": str(number), "count": 1, "storyboard": ""}
