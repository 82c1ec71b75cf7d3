"""What a click does, without Gradio: acts on the studio, and ways to fill the form. All of it ends in milliseconds."""

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from turbodiff.spec.errors import RequestError, TurbodiffError
from turbodiff.spec.models import ModelSpec, find_model
from webui import form
from webui.desk import Desk, Shot
from webui.view import jobs, rounds
from webui.wording import Words

Looking = Mapping[str, str]
Answer = tuple[Looking, str]  # what the browser looks at next, and a sentence to show or ""

KNOBS = {"boundary", "sampler", "topk", "steps"}
MAX_BATCH = 100
STARS = 5


def submit(desk: Desk, values: Mapping[str, Any], anyway: bool = False) -> list[int]:
    """Queue what the form holds, `count` times with seeds of their own; `anyway` lets the planner lower nothing."""
    fields = form.request_fields(values)
    if fields.get("image"):
        fields["image"] = desk.keep_picture(Path(str(fields["image"])))
    jobs_made = []
    for number in range(max(1, min(8, int(values.get("count") or 1)))):
        jobs_made.append(_queue(desk, {**fields, **_seed(fields, number)}, anyway))
    return jobs_made


def _seed(fields: Mapping[str, Any], number: int) -> dict[str, Any]:
    seed = str(fields.get("seed", "")).strip()
    return {"seed": int(seed) + number} if number and seed.isdecimal() else {}


def submit_batch(desk: Desk, values: Mapping[str, Any], lines: str) -> list[int]:
    """Queue one job per line that is not empty and not a comment.

    Raises:
        RequestError: no line, or more than a hundred.
    """
    prompts = [line.strip() for line in lines.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not prompts or len(prompts) > MAX_BATCH:
        raise RequestError(
            "a batch has 1 to 100 lines",
            code="batch_lines",
            field="batch",
            got=len(prompts),
            expected=f"1..{MAX_BATCH}",
        )
    fields = form.request_fields(values)
    if fields.get("image"):
        fields["image"] = desk.keep_picture(Path(str(fields["image"])))
    return [_queue(desk, {**fields, "prompt": prompt}) for prompt in prompts]


def _queue(desk: Desk, fields: Mapping[str, Any], anyway: bool = False) -> int:
    return desk.studio.submit({**fields, "nonce": secrets.token_hex(16)}, anyway=anyway)


def act(desk: Desk, name: str, argument: str, looking: Looking, words: Words) -> Answer:
    """Do what a button of a panel says.

    Raises:
        TurbodiffError: it cannot be done, in the person's words.
    """
    if name in LOOKS:
        return LOOKS[name](looking, argument), ""
    if name in JOB_ACTS:
        return JOB_ACTS[name](desk, _number(argument), looking), ""
    if name in OTHER_ACTS:
        return OTHER_ACTS[name](desk, argument, looking, words)
    raise RequestError("unknown action", code="unknown_action", field="act", got=name[:40])


def _number(argument: str) -> int:
    if not argument.isdecimal() or len(argument) > 15:
        raise RequestError("no such job", code="job_unknown", field="job", got=argument[:40])
    return int(argument)


LOOKS: dict[str, Callable[[Looking, str], Looking]] = {
    "choose": lambda looking, clip: {**looking, "at": clip},
    "show": lambda looking, job: {**looking, "at": f"job:{job}"},
    "compare": lambda looking, clip: {**looking, "left": "" if looking.get("left") == clip else clip},
}


def _cancel(desk: Desk, job: int, looking: Looking) -> Looking:
    desk.studio.cancel(job)
    return looking


def _stop_and_decode(desk: Desk, job: int, looking: Looking) -> Looking:
    desk.studio.store.stop_and_decode(job)
    return looking


def _retry(desk: Desk, job: int, looking: Looking) -> Looking:
    return {**looking, "at": f"job:{desk.studio.store.retry(job)}"}


def _duplicate(desk: Desk, job: int, looking: Looking) -> Looking:
    desk.studio.store.duplicate(job)
    return looking


def _retry_smaller(desk: Desk, job: int, looking: Looking) -> Looking:
    request = desk.studio.job(job).request
    change = jobs.smaller(request)
    spec = find_model(str(change.get("model") or request["model"]))
    values = form.fitted_to(spec, {**form.from_request(request), **change, "pinned": []})
    return {**looking, "at": f"job:{_queue(desk, form.request_fields(values))}"}


def _move(where: Any) -> Callable[[Desk, int, Looking], Looking]:
    def move(desk: Desk, job: int, looking: Looking) -> Looking:
        desk.studio.store.move(job, where)
        return looking

    return move


JOB_ACTS: dict[str, Callable[[Desk, int, Looking], Looking]] = {
    "cancel": _cancel,
    "stop_and_decode": _stop_and_decode,
    "retry": _retry,
    "retry_smaller": _retry_smaller,
    "duplicate": _duplicate,
    "top": _move("first"),
    "up": _move("up"),
    "down": _move("down"),
}


def _pause(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    del argument, words
    desk.studio.store.pause()
    return looking, ""


def _resume(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    del argument, words
    desk.studio.store.resume()
    return looking, ""


def _restart(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    del argument
    desk.restart()
    return looking, words("bar.restarting")


def _end_leftover(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    gone = desk.studio.end_leftover(_number(argument))
    return looking, words("bar.leftover_gone") if gone else words("bar.leftover_stays")


def _knob(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    """The same seed with only the fields of a symptom changed."""
    del words
    asked = json.loads(argument)
    changed = {name: value for name, value in asked["fields"].items() if name in KNOBS}
    return {**looking, "at": f"job:{_queue(desk, {**wish(clip_of(desk, str(asked['clip']))), **changed})}"}, ""


def _neighbour(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    del words
    request = wish(clip_of(desk, argument))
    return {**looking, "at": f"job:{_queue(desk, {**request, 'seed': int(request.get('seed') or 0) + 1})}"}, ""


def _rate(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    clip, _, count = argument.partition(" ")
    stars = min(STARS, max(1, _number(count)))
    desk.studio.rate(desk.row_of(clip), rating="★" * stars + "☆" * (STARS - stars))
    desk.clips_changed()
    return looking, words("clip.saved")


def _note(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    clip, _, sentence = argument.partition(" ")
    desk.studio.rate(desk.row_of(clip), note=sentence.strip())
    desk.clips_changed()
    return looking, words("clip.saved")


def _rescan(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    del argument, words
    desk.rescan()
    return looking, ""


def _download(desk: Desk, argument: str, looking: Looking, words: Words) -> Answer:
    del words
    desk.studio.start_download(argument)
    return looking, ""


OTHER_ACTS: dict[str, Callable[[Desk, str, Looking, Words], Answer]] = {
    "pause": _pause,
    "resume": _resume,
    "restart": _restart,
    "end_leftover": _end_leftover,
    "knob": _knob,
    "neighbour": _neighbour,
    "rate": _rate,
    "note": _note,
    "rescan": _rescan,
    "download": _download,
}


def clip_of(desk: Desk, name: str) -> Shot:
    """The clip of that id.

    Raises:
        RequestError: there is none.
    """
    found = desk.clip(name)
    if found is None:
        raise RequestError("no such clip", code="clip_unknown", field="clip", got=name[:80])
    return found


def wish(clip: Shot) -> dict[str, Any]:
    """A clip's request as it was wished: what the planner settled from "auto" is "auto" again."""
    request = {name: value for name, value in clip.request.items() if name != "nonce"}
    for change in (clip.plan or {}).get("changes", ()):
        if change.get("from_value") == "auto" and change.get("field") in request:
            request[change["field"]] = "auto"
    if request.get("resolution") != "custom":
        request.pop("width", None), request.pop("height", None)
    return request


# --- the form --------------------------------------------------------------------------------------------------------


def fill(desk: Desk, name: str, argument: str, values: Mapping[str, Any], looking: Looking) -> dict[str, Any] | None:
    """The form's new values for a button that fills it, or None to leave it as it is."""
    if name == "example":
        return {**values, "prompt": argument}
    if name == "fill":
        changed = {**values, **{key: value for key, value in json.loads(argument).items() if key in FILLABLE}}
        return form.fitted_to(find_model(str(changed["model"])), changed)
    if name == "round":
        return _round(desk, argument, values, looking)
    if name in ("reuse", "edit"):
        return filled_from(wish(clip_of(desk, argument)), values)
    if name == "use_seed":
        return _from_row(desk, _number(argument), values)
    return None


FILLABLE = set(form.FIELDS) - {"image", "prompt", "negative_prompt"}


def filled_from(request: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values from a stored request; a picture is asked for again, its path means nothing elsewhere."""
    kept = form.from_request(request)
    spec = find_model(str(kept["model"]))
    return {**values, **form.defaults(spec), **kept, "image": None}


def _round(desk: Desk, argument: str, values: Mapping[str, Any], looking: Looking) -> dict[str, Any] | None:
    """A round fills the form; coming from a clip ("polish CLIP") its prompt and seed are kept."""
    name, _, clip = argument.partition(" ")
    found = next((entry for entry in desk.studio.rounds() if entry.name == name), None)
    if found is None:
        return None
    held = filled_from(wish(clip_of(desk, clip)), values) if clip else dict(values)
    if "seed" in found.keeps and not str(held.get("seed") or ""):
        seen = desk.clip(looking.get("at", "")) if not looking.get("at", "").startswith("job:") else None
        held["seed"] = str(seen.seed) if seen else ""
    changed = rounds.fields_of(found, held)
    return form.fitted_to(find_model(str(changed["model"])), changed)


def _from_row(desk: Desk, row: int, values: Mapping[str, Any]) -> dict[str, Any] | None:
    found = next((seed for seed in desk.studio.seeds(limit=10_000) if seed.id == row), None)
    if found is None:
        return None
    if found.recipe.get("request"):
        return filled_from(found.recipe["request"], values)
    spec = model_or(found.row.model, find_model(str(values["model"])))
    asked = {"prompt": found.row.prompt, "seed": found.row.seed, "resolution": found.row.resolution}
    return form.fitted_to(spec, {**values, **form.defaults(spec), **asked})


def from_video(desk: Desk, video: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values from a video of ours.

    Raises:
        FileError: not a video of turbodiff.
    """
    return filled_from(desk.studio.settings_of(video)["request"], values)


def model_or(name: str, otherwise: ModelSpec) -> ModelSpec:
    """The model of that name, else another: a browser's draft may name a model of another version."""
    try:
        return find_model(name)
    except TurbodiffError:
        return otherwise
