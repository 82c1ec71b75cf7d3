"""What changes by itself: the panels, and what follows the form."""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gradio as gr

from turbodiff.spec.clips import clip_id
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import Event
from turbodiff.spec.jobs import ACTIVE, STOPPED, QueuedJob
from turbodiff.spec.models import ModelSpec, all_models
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import MAX_PROMPT_CHARS
from turbodiff.studio import POLICIES, Outlook, pictures, storyboard_requests
from webui import form
from webui.app import RUN_LOG, STARTUP_LOG
from webui.form import FormValues
from webui.markup import Html, join, note
from webui.page import INITIAL_UI_STATE
from webui.panels import (
    compare,
    create,
    export,
    first_aid,
    form_help,
    gallery,
    jobs,
    meter,
    models,
    recipes,
    stage,
    status_bar,
    storyboard,
    system,
    tabs,
)  # fmt: skip
from webui.request_guard import handler
from webui.snapshot import LOG_LINES, ClipView, Snapshot, StudioReader
from webui.wording import Words

PANELS = (
    "bar", "aid", "player", "progress", "card", "queue", "strip", "tail", "compare", "gallery", "side", "export",
    "exports", "prompts", "presets", "seeds", "system", "source", "logs", "log", "settings",
)  # fmt: skip
TAIL_LINES = 12
MARKED_FROM = 4  # fewer choices than this need no marks: the meter says it all
STRIP_CLIPS = 12
SEED_ROWS = 100
KEPT_DRAWINGS = 8
Drawing = tuple[dict[str, Html], dict[str, str]]  # of each panel: the markup, its digest


class Renderer:
    """Draws every panel from one snapshot; a browser is sent only what differs from what it has."""

    def __init__(self, reader: StudioReader, words: Words) -> None:
        self.reader, self.words = reader, words
        self._drawings: OrderedDict[tuple[object, ...], Drawing] = OrderedDict()
        self._panels: dict[Callable[..., Html], deque[tuple[tuple[object, ...], Html]]] = {}

    @handler
    def changed(self, ui_state: Mapping[str, str], seen: Mapping[str, str] | None = None) -> list[object]:
        """Panels that differ from `seen`, the others skipped, and the digests; tabs that look alike share a drawing.

        With `seen` no action asked for it; what an action has overtaken is then dropped: it shows what was before."""
        acted, is_late = self.reader.acted, seen is not None
        drawn, digests = self.drawing(self.reader.snapshot(), ui_state)
        seen = seen or {}
        if digests == seen or (is_late and acted != self.reader.acted):
            return [gr.skip()] * (len(drawn) + 1)
        return [*(gr.skip() if seen.get(name) == digests[name] else drawn[name] for name in drawn), digests]

    def drawing(self, snapshot: Snapshot, ui_state: Mapping[str, str]) -> Drawing:
        """Every panel by its name, and their digests."""
        key = (snapshot.now_s, *sorted(ui_state.items()))
        kept = self._drawings.get(key)
        if kept is None:
            drawn = self._draw(snapshot, {**INITIAL_UI_STATE, **ui_state})
            digests = {name: hashlib.blake2b(drawn[name].encode(), digest_size=8).hexdigest() for name in drawn}
            kept = self._drawings[key] = (drawn, digests)
            while len(self._drawings) > KEPT_DRAWINGS:
                self._drawings.popitem(last=False)
        return kept

    def _draw(self, snapshot: Snapshot, ui_state: Mapping[str, str]) -> dict[str, Html]:
        words, reader, studio = self.words, self.reader, self.reader.studio
        index = studio.clip_index
        job, clip = looked_at(snapshot, ui_state["at"], reader)
        events = [event for _, event in studio.events(job.id)] if job and job.state in ACTIVE else []
        compared = [one for name in ui_state["left"].split() if (one := reader.clip(name))]
        card, preview = stage.card(clip, words, snapshot.clips) if clip else None, stage.preview(events)
        shown = clip.id if clip else ""
        bar = status_bar.status_bar(snapshot, words)
        report = reader.report.or_none()
        posters = {clip.id for clip in snapshot.clips if clip.poster}
        found = studio.seeds(ui_state["search"], SEED_ROWS)
        places = {"outputs": studio.outputs, "seeds": studio.outputs / "seeds.md", "state": studio.state}
        log = tuple(studio.log_tail(LOG_LINES, RUN_LOG)) if ui_state["log"] == RUN_LOG else snapshot.log
        cards = [stage.card(one, words) for one in compared] + ([card] if card and compared else [])
        entry, alike = index.entry(shown), len(index.same_but_seed(shown))
        told = studio.serving.webhook
        hook = (told.host, told.last) if told and told.host else None
        presets = studio.recipes.presets(), studio.recipes.wildcards(), studio.recipes.wildcard_folder
        drawn = {
            "bar": self._drawn(status_bar.draw, bar),
            "aid": first_aid.draw(snapshot, bar.restarted, words),
            "player": self._drawn(stage.draw_player, card, preview)
            if card or preview or not (job and job.state in ACTIVE)
            else self._drawn(stage.draw_making),
            "progress": _progress(job, events, snapshot, words, ui_state["at"]),
            "card": self._drawn(stage.draw_card, card) if card else Html(""),
            "queue": self._drawn(
                jobs.draw_queue,
                jobs.queue(snapshot, words),
                snapshot.paused,
                words.clock(snapshot.held_until_s),
                jobs.total(snapshot, words),
            ),
            "strip": stage.draw_strip(snapshot, STRIP_CLIPS, shown, words),
            "tail": self._drawn(tabs.draw_log, snapshot.log[-TAIL_LINES:]),
            "compare": self._drawn(compare.draw, cards, bool(ui_state["wipe"])),
            "gallery": self._gallery(ui_state, shown, snapshot.now_s),
            "side": self._drawn(gallery.draw_side, card, entry, bool(compared), alike),
            "export": self._drawn(export.draw_form, clip),
            "exports": self._drawn(export.draw_exports, studio.exports.newest()),
            "prompts": self._drawn(
                recipes.draw_prompts, studio.recipes.prompts(ui_state["recall"]), bool(ui_state["recall"])
            ),
            "presets": self._drawn(recipes.draw_presets, *presets),
            "seeds": self._drawn(tabs.draw_seeds, found, posters, bool(ui_state["search"])),
            "system": self._drawn(system.draw, system.system(snapshot, report, words), report is not None),
            "source": self._drawn(models.draw_source, snapshot.mirror),
            "logs": self._drawn(tabs.draw_logs, (STARTUP_LOG, RUN_LOG), ui_state["log"]),
            "log": self._drawn(tabs.draw_log, log),
            "settings": self._drawn(tabs.draw_settings, snapshot.policy, POLICIES, places, hook),
        }
        return {name: drawn[name] for name in PANELS}

    def _drawn(self, draw: Callable[..., Html], *shown: object) -> Html:
        """What `draw` makes of what a panel shows; drawn anew only where that is something else than lately."""
        kept = self._panels.setdefault(draw, deque(maxlen=KEPT_DRAWINGS))
        for known, html in list(kept):
            if known == shown:
                return html
        kept.appendleft((shown, html := draw(*shown, self.words)))
        return html

    def _gallery(self, ui_state: Mapping[str, str], shown: str, now_s: float) -> Html:
        """One page of the library; a page that is no more there is the last one."""
        index = self.reader.studio.clip_index
        index.refresh_soon()
        ask = partial(index.find, ui_state["find"], ui_state["only"], ui_state["order"], gallery.PER_PAGE)
        page = int(ui_state["page"] or 0)
        found = ask(page * gallery.PER_PAGE)
        if not found.entries and page:
            page = max(0, found.total - 1) // gallery.PER_PAGE
            found = ask(page * gallery.PER_PAGE)
        searched = bool(ui_state["find"]) or ui_state["only"] != "all"
        picked = ui_state["picked"].split()
        return self._drawn(gallery.draw, gallery.gallery(found, page, picked, shown, searched, now_s, self.words))


def looked_at(snapshot: Snapshot, chosen: str, reader: StudioReader) -> tuple[QueuedJob | None, ClipView | None]:
    """The job and the clip that the stage shows: what was chosen, else what runs, else the newest clip.

    A job that only waits, or was cancelled, is no reason to hide the one that runs: it stands in the queue beside it.
    """
    if chosen.startswith("job:"):
        job = snapshot.job(int(chosen[4:])) or snapshot.active
        if job is not None and job.state in ("queued", "cancelled"):
            job = snapshot.active or job
        return job, reader.clip(clip_id(Path(job.result.path).stem)) if job and job.result else None
    if chosen:
        return snapshot.active, reader.clip(chosen)
    newest = snapshot.jobs[0] if snapshot.jobs else None
    if snapshot.active or (newest and newest.state in STOPPED):
        return snapshot.active or newest, None
    return None, snapshot.clips[0] if snapshot.clips else None


def _progress(job: QueuedJob | None, events: list[Event], snapshot: Snapshot, words: Words, chosen: str = "") -> Html:
    """What the stage says of a job that is not over, or that failed."""
    if job is None:
        return Html("")
    if job.state in STOPPED:
        return first_aid.draw_failure(first_aid.failure(job, words), snapshot, words)
    if job.state in ACTIVE:
        card = jobs.cards_of(job, snapshot)
        drawn = jobs.draw_progress(jobs.progress(job, events, words, card), words)
        mine = snapshot.job(int(chosen[4:])) if chosen.startswith("job:") else None
        if mine is None or mine.state != "queued":
            return drawn
        begins = jobs.starts_in(mine, snapshot, words)
        said = words("run.submitted_begins" if begins else "run.submitted", job=mine.id, begins=begins)
        return join(drawn, note(said, "calm"))
    if job.state == "queued":
        why = jobs.why_it_waits(job, snapshot, words)
        return note(why or words("run.submitted", job=job.id))
    return Html("")


def estimate(reader: StudioReader, values: FormValues, words: Words) -> list[object]:
    """The form, told in the order of PageEvents.estimated: meter, verdict, buttons, lint, experts, residency, LoRAs,
    storyboard, rounds."""
    spec = form.model_called(values["model"])
    asked = form.request_fields({**values, "loras": ""})
    with suppress(TurbodiffError):
        asked = reader.asked(values)
    plan, shown = _planned(reader, values, spec, words)
    go = _go(reader, values, plan, shown, words)
    prompt = str(values.get("prompt") or "")[:MAX_PROMPT_CHARS]
    try:
        tokens = reader.count_tokens(spec.name, prompt)
    except TurbodiffError:  # a damaged tokenizer: System names it, the form goes on without a count
        tokens = None
    boundary = float(values.get("boundary") or 0.9)
    of_round = {"kind": spec.kind, **form.defaults(spec), **asked, "model": spec.name}

    known: dict[str, Outlook | None] = {}

    def outlook(fields: Mapping[str, object]) -> Outlook | None:
        key = repr(sorted(fields.items()))  # the sum of the rounds asks again what their tiles asked
        if key not in known:
            known[key] = None
            with suppress(TurbodiffError):
                known[key] = reader.outlook(_complete(fields, form.model_called(fields["model"])))
        return known[key]

    rounds = reader.studio.rounds(spec.bundled)
    tiles = [form_help.round_tile(found, of_round, outlook, words) for found in rounds]
    return [
        _meter(reader, values, asked, spec, shown, words),
        go.verdict,
        gr.update(value=go.label),
        gr.update(visible=go.anyway),
        form_help.draw_prompt_help(form_help.prompt_help(prompt, tokens, spec, words), words),
        meter.draw_experts(meter.experts(plan), boundary, words) if spec.two_experts else "",
        note(meter.residency(plan, words), "calm") if plan else "",
        form_help.draw_loras(
            form_help.lora_lines(reader.loras(), reader.lora_facts, form.loras(values.get("loras")), words),
            str(reader.studio.lora_folder()),
            spec.two_experts,
            words,
        ),
        _storyboard(reader, values, plan, words),
        form_help.draw_rounds(tiles, form_help.rounds_sum(rounds, of_round, outlook, words), spec, words),
    ]


def _meter(
    reader: StudioReader, values: FormValues, asked: Mapping[str, object], spec: ModelSpec, shown: meter.Meter,
    words: Words,
) -> Html:  # fmt: skip
    card = str(values.get("card") or "")
    if card:  # a pretended one is for the meter only: the button says what will run here
        _, shown = _planned(reader, values, spec, words, card)
    return join(
        meter.draw(shown, words, card),
        meter.draw_cards(reader.snapshot().fleet, str(values.get("gpu") or ""), words),
        meter.draw_together(shown.plan, str(values.get("cards") or "auto"), words),
        fit_marks(reader, asked, spec, card),
    )


class Go(NamedTuple):
    """What stands at the button: the verdict above it, what it says, and whether "Run anyway" is beside it."""

    verdict: Html
    label: str
    anyway: bool


def _go(reader: StudioReader, values: FormValues, plan: Plan | None, shown: meter.Meter, words: Words) -> Go:
    machine, begin = reader.snapshot().machine, None
    if plan is not None and machine is not None:
        begin = reader.studio.cards.begin(plan, machine, reader.inventory(), str(values.get("gpu") or ""))
    button, verdict = meter.button(plan, words, begin), meter.draw_verdict(shown, words, begin)
    label, what = button.label, button.label.removeprefix(words("create.go")).lstrip(" ·")
    if rows := form.segments(values):  # Generate queues them all
        label = words("storyboard.go", n=len(rows) + 1, what=what)
    if editing := str(values.get("edits") or ""):
        label, verdict = words("run.edit_go", job=editing, what=what), join(jobs.draw_editing(editing, words), verdict)
    return Go(verdict, label, bool(button.anyway))


def begins(reader: StudioReader, values: FormValues, said: str, words: Words) -> list[object]:
    """The verdict and the button again: what waits and runs has moved on, the form has not; and the meter where the
    plan is another than that of the verdict `said`, as a clip that was made since teaches seconds."""
    spec = form.model_called(values["model"])
    plan, shown = _planned(reader, values, spec, words)
    go = _go(reader, values, plan, shown, words)
    drawn: object = gr.skip()
    if plan is not None and meter.told(plan) not in said:
        with suppress(TurbodiffError):
            drawn = _meter(reader, values, reader.asked(values), spec, shown, words)
    return [go.verdict, gr.update(value=go.label), drawn]


def _storyboard(reader: StudioReader, values: FormValues, first: Plan | None, words: Words) -> Html:
    """What the rows of the storyboard take with the form's own segment, or which of them cannot run and why."""
    rows, plans, number = form.segments(values), [first] if first else [], 1
    if not rows or first is None:
        return Html("")
    try:
        asked = reader.asked(values)
        for fields in storyboard_requests({**asked, "prompt": asked.get("prompt") or "-"}, rows, first)[1:]:
            number += 1
            plans.append(reader.estimate(fields, reader.studio.policy))
        before = reader.clip(str(values.get("continues") or "-"))
        return storyboard.draw_sum(plans, before.sidecar.whole_frames if before else 0, "", words)
    except TurbodiffError as error:
        told = words.error(error.fields())
        if error.field != "storyboard":
            told = words("storyboard.row_error", n=number, error=told)
        return storyboard.draw_sum((), 0, told, words)


def _planned(
    reader: StudioReader, values: FormValues, spec: ModelSpec, words: Words, card: str = ""
) -> tuple[Plan | None, meter.Meter]:
    """The plan of the form and its meter, on this machine or a pretended card; no plan where it is not legal."""
    asked = form.request_fields({**values, "loras": ""})
    try:
        asked = reader.asked(values)
        plan = reader.estimate(_complete(asked, spec), reader.studio.policy, card)
        return plan, meter.meter(plan, words)
    except TurbodiffError as error:
        refused: Plan | None = getattr(error, "plan", None)  # a refusal knows what was asked
        would_fit = None
        if reader.studio.policy == "never":
            with suppress(TurbodiffError):
                would_fit = reader.estimate(_complete(asked, spec), card=card)
        return refused, meter.problem(error.fields(), words, refused, would_fit)


def look(reader: StudioReader, values: FormValues, words: Words) -> Html:
    """The fitted picture and what it proposes, for what the form holds now; it takes a process of its own to decode."""
    if values.get("kind") != "i2v":
        return Html("")
    if clip := reader.clip(str(values.get("continues") or "-")):
        frames = clip.sidecar.whole_frames
        return storyboard.draw_continued(clip.id, clip.request, frames, stage.poster_url(clip), words)
    if values.get("continues"):
        return storyboard.draw_gone(words)
    if not values.get("image"):
        of_kind = [spec for spec in all_models() if spec.kind == "i2v" and not spec.bundled]
        named, turbo = (", ".join(spec.display_name for spec in of_kind if spec.turbo or one) for one in (True, False))
        return note(words("create.i2v_models", models=named, turbo=turbo), "calm")
    spec = form.model_called(values["model"])
    try:
        asked = reader.asked(values)
        try:
            plan = reader.estimate(_complete(asked, spec))
        except TurbodiffError as error:  # nothing fits: a picture can be looked at all the same, as it was asked
            if not isinstance(getattr(error, "plan", None), Plan):
                raise
            plan = error.plan  # type: ignore[attr-defined]
        request, path = plan.request, Path(str(asked["image"]))
        fitted = pictures.preview(path, request.width, request.height, request.fit)
        return form_help.draw_picture(form_help.picture(pictures.look(path), request, fitted, values, spec, words))
    except TurbodiffError as error:
        return note(words.error(error.fields()), "warn")


def fit_marks(reader: StudioReader, asked: Mapping[str, object], spec: ModelSpec, card: str = "") -> Html:
    """A style sheet that shows this model's choices, each size and length with a fit mark, the rest as asked."""
    sizes, counts = spec.limits.resolutions, form.offered_frames(spec)
    bands: dict[tuple[str, object], str] = {}
    if len(sizes) * len(counts) >= MARKED_FROM:
        # the encoder's precision has nothing to do with size and length; the meter tells it
        locked = asked.get("pinned")
        keep = isinstance(locked, list) and "text_dtype" in locked
        exactly = {**asked, "prompt": "-", "pinned": [pin for pin in form.PINS if keep or pin != "text_dtype"]}
        choices: dict[tuple[str, object], dict[str, object]] = {
            **{("resolution", size): {"resolution": size, "size": None} for size in sizes},
            **{("frames", count): {"num_frames": count} for count in counts},
        }
        for choice, fields in choices.items():
            try:
                bands[choice] = reader.outlook(_complete({**exactly, **fields}, spec), card).band
            except TurbodiffError:
                bands[choice] = "no"
    interpolates = any(one.kind == "interpolator" for one in reader.inventory().networks)
    return create.choices_style(spec, asked.get("num_frames"), bands, interpolates or bool(asked.get("interpolator")))


def _complete(asked: Mapping[str, object], spec: ModelSpec) -> dict[str, object]:
    """The same fields as a whole request: a prompt and a picture that are still to come must not stop the meter."""
    whole = {**asked, "prompt": asked.get("prompt") or "-"}
    if spec.kind == "i2v" and not (asked.get("image") or asked.get("continues")):
        whole |= {"image": "-", "adaptive_resolution": False}
    return whole
