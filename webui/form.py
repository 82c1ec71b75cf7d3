"""The form as plain data: from what its fields hold to a request's fields, and back."""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import ModelSpec, all_models, find_model
from turbodiff.spec.shapes import frame_counts, nearest_frame_counts

PINS = ("model", "resolution", "num_frames", "quant_linear")
FIELDS = (
    "kind",
    "prompt",
    "image",
    "fit",
    "adaptive_resolution",
    "model",
    "resolution",
    "aspect",
    "num_frames",
    "pinned",
    "seed",
    "steps",
    "sampler",
    "attention",
    "topk",
    "quant_linear",
    "boundary",
    "sigma_max",
    "shift",
    "guidance",
    "negative_prompt",
    "fps",
    "size",
    "loras",
)
COMMON_FRAMES = (5, 9, 17, 33, 49, 81, 117, 161)
SHORT = 17  # shorter clips are for models that make no longer ones
I2V_ONLY = ("image", "fit", "adaptive_resolution")
NUMBERS = frozenset({"num_frames", "steps", "topk", "boundary", "sigma_max", "shift", "guidance", "fps", "count"})
LARGEST = 1e9  # no number of a form is anywhere near
MAX_LORAS = 8


def all_resolutions() -> list[str]:
    """Every resolution of every model: the form holds them all and shows those of the chosen model, because a choice
    that is taken away while an event is under way would make Gradio refuse the event."""
    return list(dict.fromkeys(name for spec in all_models() for name in spec.limits.resolutions))


def all_aspects() -> list[str]:
    """Every aspect of every model."""
    return list(dict.fromkeys(name for spec in reversed(all_models()) for name in spec.limits.aspects))


def all_frames() -> list[int]:
    """Every frame count of every model."""
    return frame_counts(max(spec.limits.max_frames for spec in all_models()))


def models_of(kind: str) -> list[ModelSpec]:
    """Models that make this kind of clip."""
    return [spec for spec in all_models() if spec.kind == kind]


def offered_frames(spec: ModelSpec) -> list[int]:
    """Frame counts that the form offers for a model."""
    legal = frame_counts(spec.limits.max_frames)
    return [count for count in COMMON_FRAMES if count in legal and (count >= SHORT or legal[-1] <= SHORT)]


def defaults(spec: ModelSpec) -> dict[str, Any]:
    """What the form holds when a model is chosen and nothing else is said."""
    facts = spec.defaults
    return {
        "kind": spec.kind,
        "model": spec.name,
        "resolution": facts.resolution,
        "aspect": facts.aspect,
        "num_frames": facts.num_frames,
        "steps": facts.steps,
        "sampler": facts.sampler,
        "sigma_max": facts.sigma_max,
        "boundary": facts.boundary,
        "topk": facts.topk,
        "fps": facts.fps,
    }


def sound(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a form of ours can hold; what has another type is left out."""
    return {name: value for name, value in values.items() if value is None or _is_sound(name, value)}


def _is_sound(name: str, value: Any) -> bool:
    if name in NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if name == "pinned":
        return isinstance(value, list) and set(map(str, value)) <= set(PINS)
    return isinstance(value, bool) if name == "adaptive_resolution" else isinstance(value, str)


def request_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values as fields for `make_request`: nothing that the chosen kind has no use for.

    LoRAs stay names here; `StudioReader.asked` turns them into files of this machine.
    """
    fields = {name: values[name] for name in FIELDS if name in values and values[name] not in (None, "", [])}
    if chosen := loras(fields.pop("loras", "")):
        fields["loras"] = chosen
    if values.get("kind") != "i2v":
        for name in I2V_ONLY:
            fields.pop(name, None)
    if "num_frames" in fields:
        fields["num_frames"] = _whole(fields["num_frames"])
    if "steps" in fields:
        fields["steps"] = _whole(fields["steps"])
    return fields


def loras(text: Any) -> list[dict[str, Any]]:
    """The chosen LoRAs of the form's hidden field, JSON [{"name", "strength", "expert"}]; [] for nonsense."""
    try:
        rows = json.loads(str(text or "[]"))
        chosen = [
            {"name": str(row["name"]), "strength": float(row["strength"]), "expert": str(row["expert"])} for row in rows
        ]
    except (ValueError, TypeError, KeyError):
        return []
    return [row for row in chosen if abs(float(str(row["strength"]))) <= LARGEST][:MAX_LORAS]


def with_lora(text: Any, name: str, change: Mapping[str, Any]) -> str:
    """The hidden field after a change of one LoRA: {"on": bool}, {"strength": number} or {"expert": name}."""
    rows = [row for row in loras(text) if row["name"] != name]
    held = next((row for row in loras(text) if row["name"] == name), {"name": name, "strength": 1.0, "expert": "both"})
    if change.get("on") is not False:
        rows.append({**held, **{key: value for key, value in change.items() if key in ("strength", "expert")}})
    return json.dumps(sorted(rows, key=lambda row: str(row["name"])), ensure_ascii=False) if rows else ""


def fitted_to(spec: ModelSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with those that this model cannot take replaced by its defaults."""
    fitted = {**values, "model": spec.name, "kind": spec.kind}
    own = defaults(spec)
    if fitted.get("resolution") not in (*spec.limits.resolutions, "custom"):  # from another family of models
        fitted |= {name: own[name] for name in ("resolution", "aspect", "num_frames", "topk")}
    if fitted.get("aspect") not in spec.limits.aspects:
        fitted["aspect"] = own["aspect"]
    frames = int(fitted.get("num_frames") or own["num_frames"])
    fitted["num_frames"] = min(nearest_frame_counts(frames)[0], spec.limits.max_frames)
    fitted["sigma_max"] = own["sigma_max"]
    return fitted


def from_request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A stored request's fields as form values; what the form does not show is dropped, pictures included if gone."""
    values = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
    values["pinned"] = [name for name in PINS if name in fields.get("pinned", ())]
    worn = [
        {"name": PurePath(str(row["path"])).name, "strength": row["strength"], "expert": row["expert"]}
        for row in fields.get("loras") or ()
    ]
    values["loras"] = json.dumps(worn, ensure_ascii=False) if worn else ""
    values["seed"] = "" if fields.get("seed") is None else str(fields["seed"])
    if fields.get("resolution") == "custom":
        values["size"] = f"{fields.get('width')}x{fields.get('height')}"
        values.pop("resolution"), values.pop("aspect", None)
    return values


def model_called(name: Any) -> ModelSpec:
    """The model of a form value, the first of all where the value means none."""
    try:
        return find_model(str(name))
    except TurbodiffError:
        return all_models()[0]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
