"""What a click does, without Gradio: each action asks the studio and ends in milliseconds."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from turbodiff.spec.clips import rating_parts
from turbodiff.spec.encodings import UnknownEncodingError, decode
from turbodiff.spec.errors import RequestError
from turbodiff.spec.grids import grid_requests
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.models import find_model
from turbodiff.spec.request import FROM_WEIGHTS
from turbodiff.spec.text import is_blank
from turbodiff.studio import Downloads, Studio, storyboard_requests
from webui import form
from webui.app import RUN_LOG, STARTUP_LOG
from webui.form import FormValues
from webui.panels import first_aid, meter
from webui.proxies import ASKING
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import ClipView, StudioReader

UiState = Mapping[str, str]  # what one browser looks at, see page.INITIAL_UI_STATE
Answer = tuple[UiState, str]  # what the browser looks at next, and a sentence or markup to show or ""

KNOBS = {"boundary", "sampler", "topk", "steps"}  # what a symptom's button may change
MAX_CLIPS = 8  # of one click on Generate
MAX_BATCH = 100
MAX_BATCH_BYTES = 256 * 1024
STARS = 5

# buttons that need nothing but the studio, and those that need the number of a job
STUDIO_ACTIONS: Mapping[str, Callable[[Studio], object]] = {
    "pause": lambda studio: studio.pause(),
    "resume": lambda studio: studio.resume(),
    "selftest": Studio.start_selftest,
}
NAMED_ACTIONS: Mapping[str, Callable[[Studio, str], object]] = {  # with a name, or a card and its state
    "delete_preset": lambda studio, name: studio.recipes.delete(name),
    "card_state": lambda studio, said: studio.cards.switch(*said.rpartition(" ")[::2], studio.machine()),
}
JOB_ACTIONS: Mapping[str, Callable[[Studio, int], object]] = {
    "cancel": Studio.cancel,
    "stop_and_decode": Studio.stop_and_decode,
    "duplicate": Studio.duplicate,
    "any_card": lambda studio, job: studio.cards.release(job),
}
MODEL_ACTIONS: Mapping[str, Callable[..., object]] = {  # of a model, "download" with a variant
    "download": Downloads.start,
    "pause_download": partial(Downloads.stop, how="pause"),
    "cancel_download": partial(Downloads.stop, how="cancel"),
    "move": Downloads.start_move,
}
STARTING_ACTIONS = {"retry", "retry_smaller", "knob", "neighbour"}  # they queue a job and show it


def generate(reader: StudioReader, values: FormValues, ui_state: UiState, words: Words, anyway: bool = False) -> Answer:
    """Queue what the form holds, `count` times with seeds of their own; `anyway` lets the planner lower nothing.

    With the policy "ask", what would be lowered is asked about first: a second click on the same form agrees.

    Raises:
        TurbodiffError: not a legal request, or nothing fits.
    """
    editing = _edited(reader, values)
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
    if reader.studio.policy == "ask" and not anyway and ui_state.get("agreed") != digest:
        asked = {**reader.asked(values), **({"after": editing.request.after} if editing else {})}
        lowered = meter.diffs(reader.estimate(asked).changes, words, lossy_only=True)
        if lowered:
            return {**ui_state, "agreed": digest}, meter.draw_question(lowered, words)
    fields = reader.asked(values, keep=True)
    if editing is not None:
        if reader.studio.waiting.replace(editing, fields, anyway):
            return {**ui_state, "agreed": "", "edited": "1"}, words("run.edited", job=editing.id)
        fields = {**fields, **({"after": editing.request.after} if editing.request.after else {})}
    seed = str(fields.get("seed", "")).strip()
    many = []
    for number in range(max(1, min(MAX_CLIPS, int(values.get("count") or 1)))):
        own = {"seed": int(seed) + number} if number and seed.isdecimal() else {}
        many.append({**fields, **own})
    rows = form.segments(values)
    if rows:
        many = storyboard_requests(many[0], rows, reader.estimate(many[0], reader.studio.policy))
    made = _queue_all(reader, many, anyway)
    reader.studio.recipes.remember([str(fields.get("prompt", "")), *(row.prompt for row in rows)])
    said = words("storyboard.done", n=len(made)) if rows else ""
    ui_state = {**ui_state, "at": f"job:{made[-1] if rows else made[0]}", "agreed": ""}
    if values.get("edits"):
        ui_state, said = {**ui_state, "edited": "1"}, words("run.edit_late", job=str(values["edits"]), new=made[0])
    return ui_state, said


def _edited(reader: StudioReader, values: FormValues) -> QueuedJob | None:
    """The job that the form changes; None for none, or for one that is not there."""
    with suppress(RequestError):
        return reader.studio.job(number_of(str(values.get("edits") or "")))
    return None


def generate_batch(reader: StudioReader, values: FormValues, lines: str, ui_state: UiState, words: Words) -> Answer:
    """Queue one job per line that shows something and is no comment.

    Raises:
        RequestError: no line, or more than a hundred.
    """
    prompts = [line.strip() for line in lines.splitlines() if not is_blank(line) and not line.lstrip().startswith("#")]
    if not prompts or len(prompts) > MAX_BATCH:
        raise RequestError(
            "a batch has 1 to 100 lines",
            code="batch_lines",
            field="batch",
            got=len(prompts),
            expected=f"1..{MAX_BATCH}",
        )
    fields = reader.asked(values, keep=True)
    made = _queue_all(reader, [{**fields, "prompt": prompt} for prompt in prompts])
    reader.studio.recipes.remember(prompts)
    return {**ui_state, "at": ""}, words("create.batch_done", n=len(made))


def generate_grid(
    reader: StudioReader, values: FormValues, axes: Sequence[object], ui_state: UiState, words: Words
) -> Answer:
    """Queue one job for each pair of values of two fields, all or none.

    Args:
        axes: a field, its values as text, another field, its values.

    Raises:
        TurbodiffError: no such grid, or one of its clips cannot be made.
    """
    down, across = ((str(axes[place] or ""), str(axes[place + 1] or "")) for place in (0, 2))
    made = _queue_all(reader, grid_requests(reader.asked(values, keep=True), down, across))
    return {**ui_state, "at": f"job:{made[0]}"}, words("grid.queued", n=len(made))


def batch_text(path: Path) -> str:
    """The prompts of a text file, one per line, in any encoding that can be told (spec/encodings.py).

    Raises:
        RequestError: too long for a batch, or not text.
    """
    data, got = path.read_bytes()[: MAX_BATCH_BYTES + 1], path.name[:80]
    try:
        text = decode(data)[0].removeprefix("\ufeff") if len(data) <= MAX_BATCH_BYTES else ""
    except UnknownEncodingError as error:
        text, got = "", f"{got} ({error.got})"
    if not text.strip():
        raise RequestError("not a list of prompts", code="batch_file", field="batch", got=got)
    return text


def save_presets(reader: StudioReader, many: Mapping[str, Mapping[str, object]]) -> None:
    """Keep all fields of forms under their names, all or none, but the picture and the pretended card.

    Raises:
        TurbodiffError: not a name, or the disk refused.
    """
    kept = {
        name: {field: value for field, value in values.items() if field not in (*form.PICTURES, "card")}
        for name, values in many.items()
    }
    reader.studio.recipes.save(cast(Mapping[str, Mapping[str, JsonValue]], kept))


def import_presets(reader: StudioReader, path: Path) -> int:
    """Take over the presets of an exported file, all or none, what no form holds left out; returns how many.

    Raises:
        TurbodiffError: no presets in it, or one cannot be kept.
    """
    try:
        found = json.loads(path.read_bytes()[: MAX_BATCH_BYTES * 16])
    except (ValueError, RecursionError):
        found = None
    listed = found.items() if isinstance(found, dict) else ()
    many = {str(name): fields for name, fields in listed if isinstance(fields, dict)}
    if not many:
        raise RequestError("no presets in this file", code="preset_file", field="preset", got=path.name[:80])
    save_presets(reader, {name: form.sanitize(fields) for name, fields in many.items()})
    return len(many)


def _queue(reader: StudioReader, fields: Mapping[str, object]) -> int:
    return _queue_all(reader, [fields])[0]


def _queue_all(reader: StudioReader, many: Sequence[Mapping[str, object]], anyway: bool = False) -> list[int]:
    """Queue all or none."""
    named = [{"nonce": secrets.token_hex(16), **fields} for fields in many]
    return reader.studio.submit_all(named, anyway, client=ASKING.get())


def act(reader: StudioReader, name: str, argument: str, ui_state: UiState, words: Words) -> Answer:
    """Do what a button of a panel says.

    Raises:
        TurbodiffError: it cannot be done, in the person's words.
    """
    studio, sentence = reader.studio, ""
    if name in NAMED_ACTIONS:
        NAMED_ACTIONS[name](studio, argument)
    elif name in STUDIO_ACTIONS:
        STUDIO_ACTIONS[name](studio)
    elif name in MODEL_ACTIONS:
        model, *variant = argument.split(" ", 1)
        MODEL_ACTIONS[name](studio.downloads, find_model(model), *variant)
    elif name in JOB_ACTIONS:
        JOB_ACTIONS[name](studio, number_of(argument))
        sentence = words("run.stopped", job=argument) if name == "cancel" else ""
    elif name in STARTING_ACTIONS:
        ui_state = {**ui_state, "at": f"job:{_start_job(reader, name, argument)}"}
    else:
        match name:
            case "choose" | "show":
                job = argument if name == "show" else argument.removeprefix("job:")
                is_job = name == "show" or argument.startswith("job:")
                ui_state = {**ui_state, "at": f"job:{number_of(job)}" if is_job else argument}
            case "log" if argument in (STARTUP_LOG, RUN_LOG):
                ui_state = {**ui_state, "log": argument}
            case "rescan":
                reader.rescan()
            case "restart":
                reader.restart()
                sentence = words("bar.restarting")
            case "end_leftover":
                gone = studio.end_leftover(number_of(argument))
                sentence = words("bar.leftover_gone" if gone else "bar.leftover_stays")
            case "delete_model":
                sentence = words("system.deleted", n=len(studio.storage.delete(find_model(argument))))
                reader.rescan()
            case "policy" | "mirror":
                (studio.set_policy if name == "policy" else studio.downloads.set_mirror)(argument)
                sentence = words("settings.saved")
            case "rate" | "praise" | "note":  # "CLIP STARS WORDS", "CLIP WORDS", "CLIP SENTENCE"
                clip, _, rest = argument.partition(" ")
                given = reader.clip_called(clip).sidecar.rating
                number, _, said = rest.partition(" ")
                count = min(STARS, max(1, number_of(number))) if name == "rate" else 0
                new_stars, said = rating_parts(said if count else rest)
                stars = "★" * count + "☆" * (STARS - count) if count else new_stars or rating_parts(given)[0]
                told = {"note": rest} if name == "note" else {"rating": f"{stars} {said}"}
                reader.rate(clip, {cell: text.strip() for cell, text in told.items()})
                reader.changed(clips=True)
                sentence = words("clip.saved")
            case _:
                raise RequestError("unknown action", code="unknown_action", field="act", got=name[:40])
    return ui_state, sentence


def _start_job(reader: StudioReader, name: str, argument: str) -> int:
    """Queue what one of `STARTING_ACTIONS` means: a job once more, or a clip with a few fields changed."""
    if name == "retry":
        return reader.studio.retry(number_of(argument))
    if name == "retry_smaller":
        job = reader.studio.job(number_of(argument))
        stored, ran = job.request, job.planned_request
        request, change = stored.model_dump(mode="json"), first_aid.smaller(stored.model, stored.num_frames)
        chained = stored.continued or any(other.request.after == job.nonce for other in reader.snapshot().jobs)
        if chained:  # its clip becomes a part of another: the size stays
            change = {name: value for name, value in change.items() if name not in ("model", "resolution")}
        spec = find_model(str(change.get("model") or stored.model))
        values = form.fitted_to(spec, {**form.from_request(request), **change, "pinned": []})
        less = form.request_fields(values)
        if chained:
            less = {name: value for name, value in less.items() if name not in ("resolution", "aspect")}
            less |= {"size": f"{ran.width}x{ran.height}", "fps": ran.fps}
        # with their paths, which the form drops
        kept = {name: request[name] for name in ("loras", "continues", "after") if request.get(name)}
        return reader.studio.retry(job.id, {**less, **kept})
    if name == "neighbour":
        request = wished_again(reader, argument)
        return _queue(reader, {**request, "seed": int(request.get("seed") or 0) + 1})
    asked = object_of(argument)
    fields = asked.get("fields")
    knobs = {knob: value for knob, value in fields.items() if knob in KNOBS} if isinstance(fields, dict) else {}
    request = wished_again(reader, str(asked.get("clip")))
    return _queue(reader, {**request, **form.sanitize(knobs)})


def number_of(argument: str) -> int:
    """The number that a button carries: a job, a pid, a row.

    Raises:
        RequestError: no button of ours carries that.
    """
    if not argument.isdecimal() or len(argument) > 15:
        raise RequestError("no such job", code="job_unknown", field="job", got=argument[:40])
    return int(argument)


def object_of(argument: str) -> dict[str, object]:
    """The JSON object that a button carries.

    Raises:
        RequestError: no button of ours carries that.
    """
    try:
        found = json.loads(argument)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RequestError("unknown action", code="unknown_action", field="act", got=argument[:40])
    return found


def wished_again(reader: StudioReader, name: str) -> dict[str, Any]:
    """What was wished of the clip of that id, to be queued as it is.

    Raises:
        RequestError: there is no such clip, or it names a file that nobody chose here.
    """
    clip = reader.clip_called(name)
    reader.studio.check_files(clip.request)
    return wished_request(clip)


def wished_request(clip: ClipView) -> dict[str, Any]:
    """A clip's request as it was wished: what the planner settled from "auto", or from the weights, is "auto" again."""
    request = clip.request.model_dump(mode="json", exclude={"nonce", "after", "grid"})
    left = [change.field for change in clip.changes if change.from_value == "auto"]
    if "sampler" in left:
        left += [change.field for change in clip.changes if change.field in FROM_WEIGHTS and not change.lossy]
    request |= dict.fromkeys(left, "auto")
    if clip.request.resolution != "custom":
        request.pop("width", None), request.pop("height", None)
    return request
