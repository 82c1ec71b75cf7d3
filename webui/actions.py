"""What a click does, without Gradio: acts on the studio. All of it ends in milliseconds."""

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import find_model
from webui import form
from webui.snapshot import ClipView, StudioReader
from webui.view import jobs, meter
from webui.view.meter import Diff
from webui.wording import Words

UiState = Mapping[str, str]
Answer = tuple[UiState, str]  # what the browser looks at next, and a sentence to show or ""

KNOBS = {"boundary", "sampler", "topk", "steps"}
MAX_BATCH = 100
MAX_BATCH_BYTES = 256 * 1024
STARS = 5


def submit(reader: StudioReader, values: Mapping[str, Any], anyway: bool = False) -> list[int]:
    """Queue what the form holds, `count` times with seeds of their own; `anyway` lets the planner lower nothing."""
    fields = reader.asked(values, keep=True)
    jobs_made = []
    for number in range(max(1, min(8, int(values.get("count") or 1)))):
        jobs_made.append(_queue(reader, {**fields, **_seed(fields, number)}, anyway))
    return jobs_made


def _seed(fields: Mapping[str, Any], number: int) -> dict[str, Any]:
    seed = str(fields.get("seed", "")).strip()
    return {"seed": int(seed) + number} if number and seed.isdecimal() else {}


def submit_batch(reader: StudioReader, values: Mapping[str, Any], lines: str) -> list[int]:
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
    fields = reader.asked(values, keep=True)
    return [_queue(reader, {**fields, "prompt": prompt}) for prompt in prompts]


def to_ask(reader: StudioReader, values: Mapping[str, Any], words: Words) -> tuple[Diff, ...]:
    """The changes to ask about before a run: none, unless that is the policy and the picture would change.

    Raises:
        TurbodiffError: not a legal request, or nothing fits.
    """
    if reader.studio.policy != "ask":
        return ()
    return meter.lowered(reader.estimate(reader.asked(values)), words)


def batch_text(path: Path) -> str:
    """The prompts of a text file, one per line.

    Raises:
        RequestError: too long for a batch, or not text.
    """
    data = path.read_bytes()[: MAX_BATCH_BYTES + 1]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = ""
    if len(data) > MAX_BATCH_BYTES or not text.strip():
        raise RequestError("not a list of prompts", code="batch_file", field="batch", got=path.name[:80])
    return text


def _queue(reader: StudioReader, fields: Mapping[str, Any], anyway: bool = False) -> int:
    return reader.studio.submit({**fields, "nonce": secrets.token_hex(16)}, anyway=anyway)


def act(reader: StudioReader, name: str, argument: str, ui_state: UiState, words: Words) -> Answer:
    """Do what a button of a panel says.

    Raises:
        TurbodiffError: it cannot be done, in the person's words.
    """
    if name in LOOKS:
        return LOOKS[name](ui_state, argument), ""
    if name in JOB_ACTS:
        return JOB_ACTS[name](reader, number_of(argument), ui_state), ""
    if name in OTHER_ACTS:
        return OTHER_ACTS[name](reader, argument, ui_state, words)
    raise RequestError("unknown action", code="unknown_action", field="act", got=name[:40])


def number_of(argument: str) -> int:
    """The number that a button carries: a job, a pid, a row.

    Raises:
        RequestError: no button of ours carries that.
    """
    if not argument.isdecimal() or len(argument) > 15:
        raise RequestError("no such job", code="job_unknown", field="job", got=argument[:40])
    return int(argument)


def unpacked(argument: str) -> dict[str, Any]:
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


LOOKS: dict[str, Callable[[UiState, str], UiState]] = {
    "choose": lambda ui_state, clip: {**ui_state, "at": clip},
    "show": lambda ui_state, job: {**ui_state, "at": f"job:{job}"},
    "compare": lambda ui_state, clip: {**ui_state, "left": "" if ui_state.get("left") == clip else clip},
}


def _cancel(reader: StudioReader, job: int, ui_state: UiState) -> UiState:
    reader.studio.cancel(job)
    return ui_state


def _stop_and_decode(reader: StudioReader, job: int, ui_state: UiState) -> UiState:
    reader.studio.store.stop_and_decode(job)
    return ui_state


def _retry(reader: StudioReader, job: int, ui_state: UiState) -> UiState:
    return {**ui_state, "at": f"job:{reader.studio.store.retry(job)}"}


def _duplicate(reader: StudioReader, job: int, ui_state: UiState) -> UiState:
    reader.studio.store.duplicate(job)
    return ui_state


def _retry_smaller(reader: StudioReader, job: int, ui_state: UiState) -> UiState:
    request = reader.studio.job(job).request
    change = jobs.smaller(request)
    spec = find_model(str(change.get("model") or request["model"]))
    values = form.fitted_to(spec, {**form.from_request(request), **change, "pinned": []})
    worn = {"loras": request["loras"]} if request.get("loras") else {}
    return {**ui_state, "at": f"job:{_queue(reader, {**form.request_fields(values), **worn})}"}


def _move(where: Any) -> Callable[[StudioReader, int, UiState], UiState]:
    def move(reader: StudioReader, job: int, ui_state: UiState) -> UiState:
        reader.studio.store.move(job, where)
        return ui_state

    return move


JOB_ACTS: dict[str, Callable[[StudioReader, int, UiState], UiState]] = {
    "cancel": _cancel,
    "stop_and_decode": _stop_and_decode,
    "retry": _retry,
    "retry_smaller": _retry_smaller,
    "duplicate": _duplicate,
    "top": _move("first"),
    "up": _move("up"),
    "down": _move("down"),
}


def _pause(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    del argument, words
    reader.studio.store.pause()
    return ui_state, ""


def _resume(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    del argument, words
    reader.studio.store.resume()
    return ui_state, ""


def _restart(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    del argument
    reader.restart()
    return ui_state, words("bar.restarting")


def _end_leftover(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    gone = reader.studio.end_leftover(number_of(argument))
    return ui_state, words("bar.leftover_gone") if gone else words("bar.leftover_stays")


def _knob(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    """The same seed with only the fields of a symptom changed."""
    del words
    asked = unpacked(argument)
    fields = asked.get("fields")
    changed = form.sound(
        {name: value for name, value in fields.items() if name in KNOBS} if isinstance(fields, dict) else {}
    )
    return {**ui_state, "at": f"job:{_queue(reader, {**wish(clip_of(reader, str(asked.get('clip')))), **changed})}"}, ""


def _neighbour(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    del words
    request = wish(clip_of(reader, argument))
    return {**ui_state, "at": f"job:{_queue(reader, {**request, 'seed': int(request.get('seed') or 0) + 1})}"}, ""


def _rate(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    clip, _, count = argument.partition(" ")
    stars = min(STARS, max(1, number_of(count)))
    reader.studio.rate(reader.row_of(clip), rating="★" * stars + "☆" * (STARS - stars))
    reader.clips_changed()
    return ui_state, words("clip.saved")


def _note(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    clip, _, sentence = argument.partition(" ")
    reader.studio.rate(reader.row_of(clip), note=sentence.strip())
    reader.clips_changed()
    return ui_state, words("clip.saved")


def _rescan(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    del argument, words
    reader.rescan()
    return ui_state, ""


def _download(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    del words
    reader.studio.start_download(argument)
    return ui_state, ""


def _selftest(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    del argument, words
    reader.studio.start_selftest()
    return ui_state, ""


def _policy(reader: StudioReader, argument: str, ui_state: UiState, words: Words) -> Answer:
    reader.studio.set_policy(argument)
    return ui_state, words("settings.saved")


OTHER_ACTS: dict[str, Callable[[StudioReader, str, UiState, Words], Answer]] = {
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
    "selftest": _selftest,
    "policy": _policy,
}


def clip_of(reader: StudioReader, name: str) -> ClipView:
    """The clip of that id.

    Raises:
        RequestError: there is none.
    """
    found = reader.clip(name)
    if found is None:
        raise RequestError("no such clip", code="clip_unknown", field="clip", got=name[:80])
    return found


def wish(clip: ClipView) -> dict[str, Any]:
    """A clip's request as it was wished: what the planner settled from "auto" is "auto" again."""
    request = {name: value for name, value in clip.request.items() if name != "nonce"}
    for change in (clip.plan or {}).get("changes", ()):
        if change.get("from_value") == "auto" and change.get("field") in request:
            request[change["field"]] = "auto"
    if request.get("resolution") != "custom":
        request.pop("width", None), request.pop("height", None)
    return request
