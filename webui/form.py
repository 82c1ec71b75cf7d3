"""The form as plain data: from what its fields hold to a request's fields, and back."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from turbodiff.spec.clips import clip_id
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import ModelSpec, all_models, find_model
from turbodiff.spec.request import FROM_WEIGHTS, Segment
from turbodiff.spec.shapes import frame_counts, nearest_frame_counts
from turbodiff.spec.text import is_blank, whole

SECONDS = re.compile(r"\d{1,4}(\.\d*)?")
LARGEST = 1e9  # no number of a form is anywhere near
Number = Annotated[int, Field(ge=-LARGEST, le=LARGEST)] | Annotated[float, Field(ge=-LARGEST, le=LARGEST)] | None
Pin = Literal["model", "resolution", "num_frames", "quant_linear", "text_dtype"]  # fields that a person can lock
PINS: tuple[Pin, ...] = get_args(Pin)


@with_config(ConfigDict(strict=True, extra="ignore"))
class FormValues(TypedDict, total=False):
    """What the form holds, named as the fields of a Request; an empty field is None, "" or []."""

    kind: str | None
    prompt: str | None
    image: str | None  # where the upload lies
    end_image: str | None
    fit: str | None
    adaptive_resolution: bool | None
    model: str | None
    resolution: str | None
    aspect: str | None
    num_frames: Number
    pinned: list[Pin] | None
    seed: str | None
    steps: Number
    sampler: str | None
    weights_are: str | None
    attention: str | None
    topk: Number
    quant_linear: str | None
    text_dtype: str | None
    exchange: str | None  # what cards that share the clip send each other
    encoder: str | None  # of the mp4
    boundary: Number
    sigma_max: Number
    shift: Number
    guidance: Number  # empty, as shift: the weights' own
    guidance_low: Number
    negative_prompt: str | None
    fps: Number
    smooth_fps: Number
    interpolator: str | None  # a file of the folder interpolators
    upscale: Number
    upscaler: str | None  # a file of the folder upscalers
    size: str | None
    loras: str | None  # JSON, see `loras`
    count: Number  # how many clips, with seeds of their own; not part of a request
    continues: str | None  # id of the clip that this one goes on from
    gpu: str | None  # UUID of the card that the clip is for, "": any
    storyboard: str | None  # JSON, see `rows`; not part of a request
    edits: str | None  # number of the waiting job that this changes; not part of a request
    cards: str | None  # how many make the clip together, "" or "auto": as many as help while nobody else waits
    card: str | None  # GiB of a pretended card that the meter shows, as digits; not part of a request


NOT_ASKED = ("count", "storyboard", "edits", "card")
FIELDS = tuple(name for name in FormValues.__annotations__ if name not in NOT_ASKED)
CARDS = ("6", "8", "12", "16", "24", "32", "48", "80")  # GiB of usual cards
COMMON_FRAMES = (5, 9, 17, 33, 49, 81, 117, 161)
SHORT = 17  # shorter clips are for models that make no longer ones
PICTURES = ("image", "end_image")
I2V_ONLY = ("image", "end_image", "continues", "fit", "adaptive_resolution")
MAX_LORAS = 16  # a file with a strength of its own for each expert is two
_ADAPTER: TypeAdapter[FormValues] = TypeAdapter(FormValues)


def all_choices() -> tuple[list[str], list[str], list[int]]:
    """Every resolution, aspect and frame count of every model: the form holds them all and shows those of the chosen
    model, because a choice that is taken away while an event is under way would make Gradio refuse the event."""
    models = all_models()
    resolutions = list(dict.fromkeys(name for spec in models for name in spec.limits.resolutions))
    aspects = list(dict.fromkeys(name for spec in reversed(models) for name in spec.limits.aspects))
    return resolutions, aspects, frame_counts(max(spec.limits.max_frames for spec in models))


def offered_frames(spec: ModelSpec) -> list[int]:
    """Frame counts that the form offers for a model."""
    legal = frame_counts(spec.limits.max_frames)
    return [count for count in COMMON_FRAMES if count in legal and (count >= SHORT or legal[-1] <= SHORT)]


def defaults(spec: ModelSpec) -> FormValues:
    """What the form holds when a model is chosen and nothing else is said."""
    names = ("resolution", "aspect", "num_frames", "steps", "sampler", "sigma_max", "boundary", "topk", "fps")
    chosen = {name: getattr(spec.defaults, name) for name in names}
    empty = {"guidance": None, "guidance_low": None, "shift": None, "negative_prompt": ""}
    of_weights = {"weights_are": "auto", **empty}
    return cast(FormValues, {"kind": spec.kind, "model": spec.name, **chosen, **of_weights})


def sanitize(values: Mapping[str, object]) -> FormValues:
    """The values that a form of ours can hold; what has another type is left out, half a surrogate pair is "?"."""
    values = {name: whole(value) if isinstance(value, str) else value for name, value in values.items()}
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        bad = {str(part["loc"][0]) for part in error.errors(include_url=False, include_input=False)}
        return _ADAPTER.validate_python({name: value for name, value in values.items() if name not in bad})


def request_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values as fields for `make_request`: nothing that the chosen kind has no use for.

    LoRAs stay names here; `StudioReader.asked` turns them into files of this machine.
    """
    fields = {name: values[name] for name in FIELDS if values.get(name) not in (None, "", [])}
    if chosen := loras(fields.pop("loras", "")):
        fields["loras"] = chosen
    if values.get("kind") != "i2v":
        for name in I2V_ONLY:
            fields.pop(name, None)
    if values.get("sampler", "auto") != "auto":  # an empty number follows the weights also then
        left = [name for name in ("guidance", "guidance_low", "shift") if name in values and name not in fields]
        fields |= dict.fromkeys(left, "auto")
    for name in ("num_frames", "steps"):
        if isinstance(fields.get(name), float) and fields[name].is_integer():
            fields[name] = int(fields[name])
    return fields


def loras(text: object) -> list[dict[str, Any]]:
    """The chosen LoRAs of the form's hidden field, JSON [{"name", "strength", "expert"}]; [] for nonsense."""
    try:
        rows = json.loads(str(text or "[]"))
        chosen = [
            {"name": str(row["name"]), "strength": float(row["strength"]), "expert": str(row["expert"])} for row in rows
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return [row for row in chosen if abs(float(str(row["strength"]))) <= LARGEST][:MAX_LORAS]


def rows(text: object) -> list[tuple[str, str, str]]:
    """The storyboard of the form's hidden field, JSON [[prompt, seconds, seed]] as typed; [] for nonsense."""
    try:
        return [(str(row[0]), str(row[1]).strip(), str(row[2]).strip()) for row in json.loads(str(text or "[]"))]
    except (ValueError, TypeError, LookupError, RecursionError):
        return []


def segments(values: Mapping[str, Any]) -> list[Segment]:
    """The rows that say something; one without a length is as long as the form's own clip, a strange length is 0."""
    found, long = [], float(values.get("num_frames") or 1) / float(values.get("fps") or 16)
    for prompt, seconds, seed in rows(values.get("storyboard")):
        told = seconds.replace(",", ".")
        said = float(told) if SECONDS.fullmatch(told) else 0.0
        if not is_blank(prompt):
            found.append(Segment(prompt, said if told else long, seed))
    return found


def strengths(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Strength in the high- and in the low-noise expert (or in the one network there is, the first) by name."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        high, low = found.get(row["name"], (0.0, 0.0))
        is_high, is_low = row["expert"] != "low", row["expert"] != "high"
        found[row["name"]] = (row["strength"] if is_high else high, row["strength"] if is_low else low)
    return found


def with_lora(text: object, name: str, change: Mapping[str, Any]) -> str:
    """The hidden field after a change of one LoRA: {"on": bool}, {"strength", "high" or "low": number} or {"expert"}.

    What has one strength in both experts is one row for both.
    """
    held = strengths(loras(text))
    high, low = held.pop(name, (1.0, 1.0))
    if change.get("on") is not False:
        both = change.get("strength")
        high, low = (high, low) if both is None else (both, both)
        high, low = change.get("high", high), change.get("low", low)
        if change.get("expert") in ("high", "low"):
            high, low = (high, 0.0) if change["expert"] == "high" else (0.0, low)
        elif change.get("expert") == "both":
            high = low = high or low
        held[name] = (high, low)
    rows = []
    for named, (high, low) in sorted(held.items()):
        parts = [("both", high)] if high == low else [("high", high), ("low", low)]
        rows += [{"name": named, "strength": n, "expert": who} for who, n in parts if n or who == "both"]
    return json.dumps(rows, ensure_ascii=False) if rows else ""


def fitted_to(spec: ModelSpec, values: Mapping[str, Any]) -> FormValues:
    """The same values with those that this model cannot take replaced by its defaults."""
    own = defaults(spec)
    fitted = cast(FormValues, {**values, "model": spec.name, "kind": spec.kind, "sigma_max": own["sigma_max"]})
    if fitted.get("resolution") not in (*spec.limits.resolutions, "custom"):  # from another family of models
        fitted.update({"resolution": own["resolution"], "aspect": own["aspect"]})
        fitted.update({"num_frames": own["num_frames"], "topk": own["topk"]})
    if fitted.get("aspect") not in spec.limits.aspects:
        fitted["aspect"] = own["aspect"]
    frames = int(fitted.get("num_frames") or own["num_frames"] or 1)
    fitted["num_frames"] = min(nearest_frame_counts(frames)[0], spec.limits.max_frames)
    return fitted


def is_settled(values: Mapping[str, Any]) -> bool:
    """Whether kind, sizes and frames are ones of the chosen model: while a change of model or kind is under way they
    still are those of the model before."""
    fitted = fitted_to(model_called(values.get("model")), values)
    return all(fitted.get(name) == values.get(name) for name in ("kind", "resolution", "aspect", "num_frames"))


def from_request(fields: Mapping[str, Any]) -> FormValues:
    """A stored request's fields as form values; what the form does not show or cannot hold is dropped, pictures
    included if gone."""
    follows = {name for name in FROM_WEIGHTS if fields.get(name) == "auto" or name in (fields.get("auto") or ())}
    values = {name: fields[name] for name in FIELDS if fields.get(name) is not None and name not in follows}
    values["pinned"] = [name for name in PINS if name in (fields.get("pinned") or ())]
    chosen = [
        {"name": PurePath(str(row["path"])).name, "strength": row["strength"], "expert": row["expert"]}
        for row in fields.get("loras") or ()
        if isinstance(row, Mapping)
    ]
    values["loras"] = json.dumps(chosen, ensure_ascii=False) if chosen else ""
    values["continues"] = clip_id(PurePath(str(fields.get("continues") or "")).stem)
    values["cards"] = str(fields.get("cards") or "auto")
    values["seed"] = "" if fields.get("seed") is None else str(fields["seed"])
    if fields.get("resolution") == "custom":
        values["size"] = f"{fields.get('width')}x{fields.get('height')}"
        values.pop("resolution"), values.pop("aspect", None)
    return sanitize(values)


def model_called(name: object, otherwise: ModelSpec | None = None) -> ModelSpec:
    """The model of a form value; another, the first of all if none is given, where the value names none."""
    try:
        return find_model(str(name))
    except TurbodiffError:
        return otherwise or all_models()[0]
