"""What changes by itself: the panels that a timer redraws, and the estimate that follows the form."""

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import Event
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.models import ModelSpec
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import MAX_PROMPT_CHARS, Request
from turbodiff.studio import pictures
from webui import form
from webui.markup import Html, el
from webui.panels import aid, bar, extras, library, meter, run, settings, system
from webui.request_guard import handler
from webui.snapshot import ClipView, StudioReader
from webui.view import Snapshot, clips, jobs, rounds, seeds
from webui.view import aid as aid_view
from webui.view import bar as bar_view
from webui.view import meter as meter_view
from webui.view import prompt as prompt_view
from webui.view import system as system_view
from webui.view.picture import Picture
from webui.view.picture import picture as picture_view
from webui.wording import Words

STARTUP_LOG = "webui_startup_latest.log"
PANELS = (
    "bar",
    "aid",
    "player",
    "progress",
    "card",
    "queue",
    "strip",
    "tail",
    "compare",
    "gallery",
    "side",
    "seeds",
    "system",
    "log",
    "settings",
)
# a clip's id or "job:7"; the archive's search; the clip to compare with; the form whose changes a person has seen
INITIAL_UI_STATE = {"at": "", "search": "", "left": "", "agreed": ""}
TAIL_LINES = 12
MARKED_FROM = 4  # fewer choices than this need no marks: the meter says it all
GALLERY_CLIPS = 60
KEPT_DRAWINGS = 8


class Renderer:
    """Draws every panel from one snapshot; a browser is sent only what differs from what it has."""

    def __init__(self, reader: StudioReader, words: Words) -> None:
        self.reader, self.words = reader, words
        self._drawings: OrderedDict[tuple[Any, ...], tuple[dict[str, Html], dict[str, str]]] = OrderedDict()

    @handler
    def everything(self, ui_state: Mapping[str, str]) -> list[Any]:
        """All panels and their digests."""
        drawn, digests = self._drawn(ui_state)
        return [*drawn.values(), digests]

    @handler
    def changed(self, ui_state: Mapping[str, str], seen: Mapping[str, str]) -> list[Any]:
        """Panels that differ from `seen`, the others skipped."""
        drawn, digests = self._drawn(ui_state)
        if digests == seen:
            return [gr.skip()] * (len(drawn) + 1)
        return [*(gr.skip() if seen.get(name) == digests[name] else drawn[name] for name in drawn), digests]

    def _drawn(self, ui_state: Mapping[str, str]) -> tuple[dict[str, Html], dict[str, str]]:
        """Panels and digests; tabs that look at the same thing share a drawing."""
        snapshot = self.reader.snapshot()
        key = (snapshot.now_s, *sorted(ui_state.items()))
        kept = self._drawings.get(key)
        if kept is None:
            drawn = self._draw(snapshot, {**INITIAL_UI_STATE, **ui_state})
            kept = (drawn, {name: _digest(markup) for name, markup in drawn.items()})
            self._drawings[key] = kept
            while len(self._drawings) > KEPT_DRAWINGS:
                self._drawings.popitem(last=False)
        return kept

    def _draw(self, snapshot: Snapshot, ui_state: Mapping[str, str]) -> dict[str, Html]:
        words, reader = self.words, self.reader
        job, clip = look_at(snapshot, ui_state["at"], reader)
        card = clips.card(clip, words, snapshot.clips) if clip else None
        running = job is not None and job.state in ("running", "verifying")
        events = [event for _, event in reader.studio.events(job.id)] if running and job else []
        left = reader.clip(ui_state["left"]) if ui_state["left"] else None
        report, ready = reader.report()
        posters = {shot.id for shot in snapshot.clips if shot.poster}
        archive = seeds.rows(reader.studio.seeds(ui_state["search"], 100), posters)
        shown = card.clip if card else ""
        told = bar_view.status_bar(snapshot, words)
        draw: dict[str, Callable[[], Html]] = {
            "bar": lambda: bar.draw(told, words),
            "aid": lambda: aid.draw(aid_view.aid(snapshot, words), told.restarted, words),
            "player": lambda: run.draw_player(card, preview(events), words),
            "progress": lambda: _progress(job, events, snapshot, words),
            "card": lambda: run.draw_card(card, words) if card else Html(""),
            "queue": lambda: run.draw_queue(jobs.queue(snapshot, words), snapshot.paused, words),
            "strip": lambda: run.draw_strip(clips.tiles(snapshot, words), shown, words),
            "tail": lambda: run.draw_log(snapshot.log[-TAIL_LINES:], words),
            "compare": lambda: library.draw_compare(clips.card(left, words), card, words) if left else Html(""),
            "gallery": lambda: run.draw_strip(clips.tiles(snapshot, words, GALLERY_CLIPS), shown, words, big=True),
            "side": lambda: run.draw_side(card, bool(left), words),
            "seeds": lambda: library.draw_seeds(archive, bool(ui_state["search"]), words),
            "system": lambda: system.draw(system_view.system(snapshot, report, words), ready, words),
            "log": lambda: run.draw_log(snapshot.log, words),
            "settings": lambda: settings.draw(snapshot.policy, places(reader, words), words),
        }
        return {name: draw[name]() for name in PANELS}


def look_at(snapshot: Snapshot, chosen: str, reader: StudioReader) -> tuple[QueuedJob | None, ClipView | None]:
    """The job and the clip that the stage shows: what was chosen, else what runs, else the newest clip."""
    if chosen.startswith("job:"):
        job = snapshot.job(int(chosen[4:])) or snapshot.active
        return job, clip_of(job, reader)
    if chosen:
        return snapshot.active, reader.clip(chosen)
    newest = snapshot.jobs[0] if snapshot.jobs else None
    if snapshot.active or (newest and newest.state in ("failed", "parked")):
        return snapshot.active or newest, None
    return None, snapshot.clips[0] if snapshot.clips else None


def clip_of(job: QueuedJob | None, reader: StudioReader) -> ClipView | None:
    """The clip that a finished job made."""
    path = job.result.path if job is not None and job.result else ""
    return reader.clip(path.rsplit("/", 1)[-1].removesuffix(".mp4")) if path else None


def preview(events: Sequence[Event]) -> str:
    """The newest preview of a running job as a data URL, "" while there is none."""
    pictures = [event.jpeg for event in events if event.type == "preview"]
    if not pictures:
        return ""
    base64.b64decode(pictures[-1], validate=True)
    return f"data:image/jpeg;base64,{pictures[-1]}"


def places(reader: StudioReader, words: Words) -> tuple[tuple[str, str], ...]:
    """Where clips, seeds, the queue and weights are on this machine."""
    studio = reader.studio
    found = {"outputs": studio.outputs, "seeds": studio.outputs / "seeds.md", "state": studio.state}
    return tuple((words(f"settings.place_{name}"), str(path)) for name, path in found.items())


def _progress(job: QueuedJob | None, events: list[Event], snapshot: Snapshot, words: Words) -> Html:
    if job is None:
        return Html("")
    if job.state in ("failed", "parked"):
        holders = system.draw_holders(aid_view.largest(snapshot, words), words)
        return run.draw_failure(jobs.failure(job, words), holders, words)
    if job.state in ("running", "verifying"):
        return run.draw_progress(jobs.progress(job, events, words), words)
    if job.state == "queued":
        said = jobs.waits_for_memory(job, words) or words("run.submitted", job=job.id)
        return el("div", said, cls="td-note", role="status")
    return Html("")


def estimate(reader: StudioReader, values: Mapping[str, Any], words: Words) -> list[Any]:
    """The form, told in the order of PageEvents.estimated: meter, buttons, lint, experts, residency, LoRAs, rounds."""
    spec = form.model_called(values["model"])
    asked = form.request_fields({**values, "loras": ""})
    plan: Plan | None = None
    try:
        asked = reader.asked(values)
        plan = reader.estimate(_complete(asked, spec), reader.studio.policy)
        shown = meter_view.meter(plan, words)
    except TurbodiffError as error:
        plan = getattr(error, "plan", None)  # a refusal knows what was asked
        shown = meter_view.problem(error.fields(), words, plan, _what_would_fit(reader, asked, spec))
    button = meter_view.button(plan, words)
    return [
        meter.draw(shown, words) + marks(reader, asked, spec),
        gr.update(value=button.label),
        gr.update(visible=bool(button.anyway)),
        _prompt_help(reader, str(values.get("prompt") or ""), spec, words),
        extras.draw_experts(meter_view.experts(plan), values, words) if spec.two_experts else "",
        extras.draw_note(meter_view.residency(plan, words), "calm") if plan else "",
        extras.draw_loras(reader.loras(), form.loras(values.get("loras")), spec.two_experts, words),
        _rounds(reader, asked, spec, words),
    ]


def _as_it_runs(reader: StudioReader, fields: Mapping[str, Any]) -> Request:
    """The request as planned, or as asked where nothing fits: a picture can be looked at all the same."""
    try:
        return reader.estimate(fields).request
    except TurbodiffError as error:
        plan: Plan | None = getattr(error, "plan", None)
        if plan is None:
            raise
        return plan.request


def _what_would_fit(reader: StudioReader, asked: Mapping[str, Any], spec: ModelSpec) -> Plan | None:
    """What the planner would make of a wish that nobody allows it to lower."""
    try:
        return reader.estimate(_complete(asked, spec)) if reader.studio.policy == "never" else None
    except TurbodiffError:
        return None


def _rounds(reader: StudioReader, asked: Mapping[str, Any], spec: ModelSpec, words: Words) -> Html:
    """The rounds: estimates of what each would set, so that its seconds are known before it is chosen."""
    values = {"kind": spec.kind, **form.defaults(spec), **asked, "model": spec.name}
    found = rounds.tiles(reader.studio.rounds(spec.bundled), values, lambda fields: _as_asked(reader, fields), words)
    note = "demo_note" if spec.bundled else "i2v_note" if spec.kind == "i2v" else "deliver_note"
    return extras.draw_rounds(found, words(f"round.{note}"), words)


def look(reader: StudioReader, values: Mapping[str, Any], words: Words) -> Html:
    """The fitted picture and what it proposes, for what the form holds now; it takes a process of its own to decode."""
    if values.get("kind") != "i2v":
        return Html("")
    if not values.get("image"):
        return extras.draw_note(words("create.no_wan21_i2v"), "calm")
    spec = form.model_called(values["model"])
    try:
        asked = reader.asked(values)
        request = _as_it_runs(reader, _complete(asked, spec))
        picture = Path(str(asked["image"]))
        seen = pictures.look(picture)
        fitted = pictures.preview(picture, request.width, request.height, request.fit)
    except TurbodiffError as error:
        return extras.draw_picture(Picture("", "", problem=words.error(error.fields())))
    return extras.draw_picture(picture_view(seen, request, fitted, values, spec, words))


def _prompt_help(reader: StudioReader, prompt: str, spec: ModelSpec, words: Words) -> Html:
    short = prompt[:MAX_PROMPT_CHARS]
    try:
        tokens = reader.studio.count_tokens(spec.name, short)
    except TurbodiffError:  # a damaged tokenizer: System names it, the form goes on without a count
        tokens = None
    help_ = prompt_view.prompt_help(short, tokens, spec, words)
    return extras.draw_lint(help_, words)


def _as_asked(reader: StudioReader, fields: dict[str, Any]) -> Plan:
    return reader.estimate(_complete(fields, form.model_called(fields["model"])))


def marks(reader: StudioReader, asked: Mapping[str, Any], spec: ModelSpec) -> Html:
    """A style sheet that shows this model's choices, each size and length with a fit mark, the rest as asked."""
    sizes, counts = list(spec.limits.resolutions), form.offered_frames(spec)
    if len(sizes) * len(counts) < MARKED_FROM:
        return choices_style(spec, asked, {})
    found: dict[tuple[str, Any], str] = {}
    found |= {("resolution", size): band(reader, {**asked, "resolution": size, "size": None}, spec) for size in sizes}
    found |= {("frames", count): band(reader, {**asked, "num_frames": count}, spec) for count in counts}
    return choices_style(spec, asked, found)


def choices_style(spec: ModelSpec, asked: Mapping[str, Any], bands: Mapping[tuple[str, Any], str]) -> Html:
    """Rules that show this model's sizes, aspects and lengths, and what the form holds now."""
    shown = (
        ("resolution", form.all_resolutions(), spec.limits.resolutions),
        ("aspect", form.all_aspects(), spec.limits.aspects),
        ("frames", form.all_frames(), (*form.offered_frames(spec), asked.get("num_frames"))),
    )
    rules = ["#resolution .wrap label,#aspect .wrap label,#frames .wrap label{display:none}"]
    for part, every, some in shown:
        places = [(place, value) for place, value in enumerate(every, 1) if value in some]
        rules += [f"#{part} .wrap label:nth-of-type({place}){{display:flex}}" for place, _ in places]
        rules += [_mark(part, place, bands[part, value]) for place, value in places if (part, value) in bands]
    return Html(f"<style>{''.join(rules)}</style>")


def band(reader: StudioReader, asked: Mapping[str, Any], spec: ModelSpec) -> str:
    """fits, tight or no for these fields exactly as they are."""
    try:
        plan = reader.estimate({**_complete(asked, spec), "prompt": "-", "pinned": form.PINS})
    except TurbodiffError:
        return "no"
    return plan.band


def _mark(part: str, place: int, found: str) -> str:
    colour = {"fits": "--good", "tight": "--warn", "no": "--bad"}[found]
    glyph = meter_view.GLYPHS[found]
    # a glyph besides the colour, for those who cannot tell the colours apart
    look = f"content:'{glyph}';color:var({colour});width:auto;height:auto;font-size:11px"
    return f"#{part} .wrap label:nth-of-type({place})::after{{{look}}}"


def _complete(asked: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The same fields as a whole request: a prompt and a picture that are still to come must not stop the meter."""
    whole = {**asked, "prompt": asked.get("prompt") or "-"}
    if spec.kind == "i2v" and not asked.get("image"):
        whole |= {"image": "-", "adaptive_resolution": False}
    return whole


def _digest(markup: str) -> str:
    return hashlib.blake2b(markup.encode(), digest_size=8).hexdigest()
