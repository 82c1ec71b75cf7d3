"""Which event calls which action. A click writes to the store and returns; what that says is drawn as it changes.

So a reload, a second tab or a lost network can lose nothing: only what a browser has chosen to look at is kept here.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import gradio as gr
from gradio.components import Component

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import find_model
from turbodiff.spec.request import MAX_PROMPT_CHARS
from turbodiff.spec.text import is_blank, whole
from webui import actions, api, form, form_actions, gallery_actions, markup, queue_actions, render
from webui.actions import Answer, UiState
from webui.form import FormValues
from webui.markup import Html
from webui.page import INITIAL_UI_STATE, Page, layout
from webui.panels import create, form_help, recipes, storyboard
from webui.request_guard import BadRequest, First, FirstShown, GuardedBlocks, button_of, handler, properties, since
from webui.snapshot import StudioReader
from webui.wording import Words

P = ParamSpec("P")
Updates = list[object]  # one per output: a value, gr.update or gr.skip
Filling = tuple[FormValues | None, str]  # the form's new values, None to leave it; markup to show or ""
# what the fitted picture and its proposal depend on
PICTURE_FIELDS = ("kind", *form.I2V_ONLY, "model", "resolution", "aspect", "size", "boundary", "sampler")
MAX_SEARCH_CHARS = 200
OPENED = "1"  # what Create.opened holds once the page shows its browser's draft, or has none to show


def build(reader: StudioReader, words: Words) -> gr.Blocks:
    """The whole page in one language."""
    blocks = GuardedBlocks(title="turbodiff", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400))
    spec = form.model_called(form_actions.initial_values(reader)["model"])
    with blocks:
        events = PageEvents(layout(reader, words, spec), reader, words)
        events.connect(blocks)
    blocks.first = FirstShown(events.first)
    return blocks


def action_handler(method: Callable[Concatenate["PageEvents", UiState, P], Answer]) -> Callable[..., Updates]:
    """A handler of an action: all panels as they are then, what the browser looks at, and what there is to say."""

    @handler
    @wraps(method)
    def redrawn(self: "PageEvents", ui_state: UiState, *args: P.args, **kwargs: P.kwargs) -> Updates:
        kind = "good"
        try:
            ui_state, sentence = method(self, ui_state, *args, **kwargs)
        except TurbodiffError as error:
            sentence, kind = self.words.error(error.fields()), "warn"
        self.reader.changed()
        note = sentence if isinstance(sentence, Html) else markup.note(sentence, kind)
        return [*self.renderer.changed(ui_state), dict(ui_state), stamped(note)]

    return redrawn


def form_handler(method: Callable[Concatenate["PageEvents", P], Filling]) -> Callable[..., Updates]:
    """A handler that fills the form: every field with the boxes that come and go, what it held (the row of fields
    is the last of the arguments) with the button that brings that back, and what there is to say."""

    @handler
    @wraps(method)
    def refilled(self: "PageEvents", *args: P.args, **kwargs: P.kwargs) -> Updates:
        try:
            values, note = method(self, *args, **kwargs)
        except TurbodiffError as error:
            values, note = None, markup.note(self.words.error(error.fields()), "warn")
        if values is None:
            return [*[gr.skip()] * (len(self.fields) + len(self.boxes) + 2), stamped(note)]
        before = self.values_of(args[-len(self.names) :])
        return [*self.refilled(values), before, recipes.draw_undo(self.words), stamped(note)]

    return refilled


def let_go(answer: Updates) -> Updates:
    """The same answer, before it whether the form lets go of the waiting job that it changed."""
    ui_state = answer[-2]
    edited = isinstance(ui_state, dict) and ui_state.pop("edited", "")
    return ["" if edited else gr.skip(), *answer]


def stamped(note: Html | str) -> Html | str:
    """The same words once more are drawn once more, also where the browser has put the last ones away."""
    return markup.el("div", note, data_at=time.time_ns()) if note else ""


class PageEvents:
    """Joins the components of one page to the studio."""

    def __init__(self, page: Page, reader: StudioReader, words: Words) -> None:
        self.page, self.reader, self.words = page, reader, words
        self.renderer = render.Renderer(reader, words)
        tab = page.create
        self.names, self.fields = list(tab.fields), list(tab.fields.values())
        self.boxes = [tab.picture_box, tab.boundary_box, tab.examples, tab.segments]
        self.estimated = [
            tab.meter, tab.verdict, tab.go, tab.anyway, tab.lint, tab.experts, tab.residency, tab.loras, tab.storyboard,
            tab.rounds,
        ]  # fmt: skip
        self.panels = [page.stage[name] for name in render.PANELS]
        built: Any = {name: part.value for name, part in zip(self.names, self.fields, strict=True)}
        self.as_built = self.refilled(built)  # what a browser has of the form before anything is sent

    def connect(self, blocks: gr.Blocks) -> None:
        """Attach every handler."""
        # one API, at the page without a language in its path; first, so that it gets its names
        if self.words.lang == "en":
            api.add(self.reader)
        page, fields, made, draw = self.page, self.page.create.fields, self.page.create, self.renderer
        drawn, whole = [*self.panels, page.seen], [*self.fields, *self.boxes]
        past, out = [page.past, made.undo], [*drawn, page.ui_state, page.note]
        filled, chosen = [*whole, *past, page.note], [*whole, *past, *self.estimated]
        # one event for all fields: the last change wins, and it sees every field as it is then
        changed = partial(gr.on, [part.change for part in self.fields], trigger_mode="always_last")
        # apart from the meter: decoding a picture takes a process and part of a second
        picture = partial(gr.on, [fields[name].change for name in PICTURE_FIELDS], trigger_mode="always_last")
        search = partial(page.search.change, trigger_mode="always_last")
        recall = partial(page.recall.change, trigger_mode="always_last")
        look_for = partial(gr.on, [part.change for part in page.gallery_filters], trigger_mode="always_last")
        looks = [partial(told, trigger_mode="always_last") for told in (page.bus.look, page.bus.whole)]
        # one event for every button of the lists: a press must not be lost while the answer to another is awaited
        act = partial(page.bus.act, trigger_mode="multiple")
        fill = partial(page.bus.fill, trigger_mode="multiple")
        row, clicked = self.fields, [page.ui_state, *self.fields]
        shown: list[Component] = [page.ui_state, page.seen]
        when: list[Component] = [made.verdict, made.go, made.meter]

        def click(button: gr.Button) -> Callable[..., object]:  # each press makes a job, answered or not
            return partial(button.click, trigger_mode="multiple")

        # Gradio's script writes how an event is doing into each component that is named here, by default into all
        # outputs, shown or not: with 60 of them a first load took the browser 2.0 s of CPU time instead of 1.7
        quiet: dict[str, Any] = {
            "queue": False, "show_progress": "hidden", "show_progress_on": page.note, "api_visibility": "private",
        }  # fmt: skip
        events: tuple[tuple[Callable[..., object], Callable[..., object], list[Component], list[Component]], ...] = (
            (looks[0], draw.changed, shown, drawn),
            (looks[1], self.whole, [*shown, made.opened, made.verdict, *row], [*drawn, *when]),
            (blocks.load, self.opened, [page.ui_state, page.draft], [*drawn, *whole, *self.estimated, made.opened]),
            (changed, self.estimate, [made.opened, *row], [*self.estimated, page.draft]),
            (picture, self.look, row, [made.picture_note]),
            (fields["kind"].input, self.new_kind, row, chosen),
            (fields["model"].input, self.new_model, row, chosen),
            (fill, self.fill, [page.ui_state, page.past, *row], filled),
            (page.video_file.upload, self.load_video, [page.video_file, *row], filled),
            (click(made.go), self.go, clicked, [fields["edits"], *out]),
            (click(made.anyway), self.go_anyway, clicked, [fields["edits"], *out]),
            (page.batch_file.upload, self.load_batch, [page.batch_file], [page.batch, page.note]),
            (page.batch_go.click, self.go_batch, [page.ui_state, page.batch, *row], out),
            (page.grid_go.click, self.go_grid, [page.ui_state, *page.grid, *row], out),
            (act, self.act, [page.ui_state], out),
            (search, self.search, [page.ui_state, page.search], out),
            (recall, self.recall, [page.ui_state, page.recall], out),
            (page.preset_file.upload, self.load_presets, [page.ui_state, page.preset_file], out),
            (look_for, self.look_for, [page.ui_state, *page.gallery_filters], out),
            (page.seed_file.upload, self.import_seeds, [page.ui_state, page.seed_file], out),
        )
        for listen, answer, inputs, outputs in events:
            listen(answer, inputs=inputs, outputs=outputs, **quiet)
        told = made.longer_note
        made.longer.click(self.asking, None, told, **quiet).then(self.longer, fields["prompt"], told, **quiet)

    @handler
    def asking(self) -> str:
        """That a longer prompt is awaited, and from where."""
        enhancer = self.reader.studio.enhancer
        return markup.note(self.words("longer.asking", host=enhancer.host), "calm") if enhancer else ""

    @handler
    def longer(self, prompt: object) -> str:
        """A longer prompt beside the person's own, or why there is none; nothing waits for it."""
        asked, enhancer = whole(str(prompt or "")[:MAX_PROMPT_CHARS]), self.reader.studio.enhancer
        if enhancer is None or is_blank(asked):
            return markup.note(self.words("longer.empty"), "calm")
        try:
            return recipes.draw_longer(asked, enhancer.longer(asked), self.words)
        except TurbodiffError as error:
            return markup.note(self.words.error(error.fields()), "warn")

    def values_of(self, row: tuple[object, ...]) -> FormValues:
        """The form's values by field name.

        Raises:
            BadRequest: no form of ours holds that.
        """
        values = form.sanitize(dict(zip(self.names, row, strict=True)))
        if len(values) != len(row):
            raise BadRequest("not the values of this form")
        return values

    def refilled(self, values: FormValues, before: Mapping[str, object] | None = None) -> Updates:
        """Updates for every field, with the choices of its model, then the boxes that come and go with it.

        `before`: what the form held, which is not sent back: a person may have written on meanwhile.
        """
        spec, values = form.model_called(values["model"]), self.page.create.holdable(values)
        had = before or {}
        held = {name: value for name, value in values.items() if name not in had or had[name] != value}
        updates = {name: gr.update(value=held[name]) if name in held else gr.skip() for name in self.names}
        updates["image"]["visible"] = not values.get("continues")
        updates["prompt"]["placeholder"] = create.prompt_hint(spec, self.words)
        updates["model"]["choices"] = create.model_choices(self.reader.here(), self.words)
        boxes = [gr.update(visible=spec.kind == "i2v"), gr.update(visible=spec.two_experts)]
        held_rows = before is not None and before.get("storyboard") == values.get("storyboard")
        segments = gr.skip() if held_rows else storyboard.draw_rows(form.rows(values.get("storyboard")), self.words)
        return [*updates.values(), *boxes, form_help.draw_examples(spec, self.words), segments]

    @handler
    def estimate(self, opened: object, *row: object) -> Updates:
        """The meter and what goes with it, and the draft that the browser keeps: not before the page shows the one that
        it has kept, which would be lost."""
        values = self.values_of(row)
        if not form.is_settled(values):  # a change of model is under way and tells the rest in one step
            return [gr.skip()] * (len(self.estimated) + 1)
        kept = {**values, "card": ""} if opened else gr.skip()
        return [*render.estimate(self.reader, values, self.words), kept]

    @handler
    def whole(self, ui_state: UiState, seen: Mapping[str, str], opened: object, said: object, *row: object) -> Updates:
        """The panels that changed, when and where the clip of the form would start now, and what runs since `said`, the
        verdict, have taught."""
        told = self.begins(said, *row) if opened else [gr.skip()] * 3
        return [*self.renderer.changed(ui_state, seen), *told]

    def begins(self, said: object, *row: object) -> Updates:
        """What `whole` says of the form."""
        values = self.values_of(row)
        if not form.is_settled(values):
            return [gr.skip()] * 3
        return render.begins(self.reader, values, str(said), self.words)

    @handler
    def look(self, *row: object) -> str:
        """What fitting makes of the picture, and what it proposes."""
        return render.look(self.reader, self.values_of(row), self.words)

    def first(self) -> First:
        """What a browser without a draft shows, as properties of components; it comes with the page itself."""
        panels, told = self.renderer.changed(INITIAL_UI_STATE)[:-1], [*self.restore(None), OPENED]
        form_parts = [*self.fields, *self.boxes, *self.estimated, self.page.create.opened]
        return {"panels": properties(self.panels, panels), "form": properties(form_parts, told)}

    @handler
    def opened(self, ui_state: UiState, draft: object) -> Updates:
        """What a browser shows that has just opened the page: each panel, the form as it left it, and that it is."""
        return [*self.renderer.changed(ui_state), *self.restore(draft), OPENED]

    @handler
    def restore(self, draft: object) -> Updates:
        """The form as this browser left it; whatever else is in the draft is passed over."""
        values = self.page.create.holdable(form_actions.kept_form(self.reader, self.names, draft))
        told = [since(built, now) for built, now in zip(self.as_built, self.refilled(values), strict=True)]
        return [*told, *render.estimate(self.reader, values, self.words)]

    @handler
    def new_kind(self, *row: object) -> Updates:
        """Another kind of clip: the first model that makes it."""
        before = self.values_of(row)
        fresh = form_actions.initial_values(self.reader, str(before["kind"]))
        values = form.fitted_to(find_model(str(fresh["model"])), {**before, **fresh})
        past = [before, recipes.draw_undo(self.words)]
        return [*self.refilled(values, before), *past, *render.estimate(self.reader, values, self.words)]

    @handler
    def new_model(self, *row: object) -> Updates:
        """Another model: what it cannot take becomes its default."""
        before = self.values_of(row)
        values = form.fitted_to(form.model_called(before["model"]), before)
        past = [before, recipes.draw_undo(self.words)]
        return [*self.refilled(values, before), *past, *render.estimate(self.reader, values, self.words)]

    @form_handler
    def fill(self, event: gr.EventData, ui_state: UiState, past: FormValues | None, *row: object) -> Filling:
        """A button that fills the form."""
        name, argument = button_of(event)
        values = self.values_of(row)
        if name == "undo":
            return form_actions.with_pictures(self.reader, past, past) if past else None, ""
        if name == "save_preset":
            actions.save_presets(self.reader, {argument: values})
            return None, markup.note(self.words("recipes.saved", name=argument.strip()), "good")
        return form_actions.fill(self.reader, name, argument, values, ui_state), ""

    @form_handler
    def load_video(self, path: object, *row: object) -> Filling:
        """The settings of a video of ours, back in the form."""
        request = self.reader.studio.sidecar_of(uploaded(path)).request.model_dump(mode="json")
        values = form_actions.from_request(self.reader, request, self.values_of(row))
        to_form = markup.local("tab", "0", self.words("create.tab"), cls="plain")
        return values, markup.note(markup.join(self.words("gallery.loaded"), " ", to_form), "good")

    @handler
    def go(self, ui_state: UiState, *row: object) -> Updates:
        """Generate."""
        return let_go(self._generated(ui_state, False, *row))

    @handler
    def go_anyway(self, ui_state: UiState, *row: object) -> Updates:
        """Generate exactly as asked."""
        return let_go(self._generated(ui_state, True, *row))

    @action_handler
    def _generated(self, ui_state: UiState, anyway: bool, *row: object) -> Answer:
        return actions.generate(self.reader, self.values_of(row), ui_state, self.words, anyway)

    @handler
    def load_batch(self, path: object) -> Updates:
        """Lines of a text file into the box, to be looked at before they are queued."""
        try:
            return [actions.batch_text(uploaded(path)), ""]
        except TurbodiffError as error:
            return [gr.skip(), markup.note(self.words.error(error.fields()), "warn")]

    @action_handler
    def go_batch(self, ui_state: UiState, lines: object, *row: object) -> Answer:
        """One job per line."""
        return actions.generate_batch(self.reader, self.values_of(row), str(lines or ""), ui_state, self.words)

    @action_handler
    def go_grid(self, ui_state: UiState, *row: object) -> Answer:
        """One job for each pair of values of two fields."""
        count = len(self.page.grid)
        axes, values = row[:count], self.values_of(row[count:])
        return actions.generate_grid(self.reader, values, axes, ui_state, self.words)

    @action_handler
    def act(self, ui_state: UiState, event: gr.EventData) -> Answer:
        """A button of a panel."""
        name, argument = button_of(event)
        asked = self.reader, name, argument, ui_state, self.words
        return gallery_actions.act(*asked) or queue_actions.act(*asked) or actions.act(*asked)

    @action_handler
    def search(self, ui_state: UiState, text: object) -> Answer:
        """Search the archive."""
        return {**ui_state, "search": _searched(text)}, ""

    @action_handler
    def recall(self, ui_state: UiState, text: object) -> Answer:
        """Search the prompts that were used."""
        return {**ui_state, "recall": _searched(text)}, ""

    @action_handler
    def load_presets(self, ui_state: UiState, path: object) -> Answer:
        """Take over the presets of a file that was exported."""
        count = actions.import_presets(self.reader, uploaded(path))
        return ui_state, self.words("recipes.loaded", n=count)

    @action_handler
    def look_for(self, ui_state: UiState, text: object, only: object, order: object) -> Answer:
        """Find clips in the gallery: from its first page on, with none chosen."""
        asked = {"find": _searched(text), "only": str(only), "order": str(order)}
        return {**ui_state, **asked, "page": "0", "picked": ""}, ""

    @action_handler
    def import_seeds(self, ui_state: UiState, path: object) -> Answer:
        """Take over a table of seeds."""
        count = self.reader.studio.import_seeds(uploaded(path))
        return ui_state, self.words("seeds.imported", n=count)


def _searched(text: object) -> str:
    return whole(str(text or "")[:MAX_SEARCH_CHARS])


def uploaded(path: object) -> Path:
    """The file that an upload button brought.

    Raises:
        BadRequest: none.
    """
    if not isinstance(path, str):
        raise BadRequest("no file")
    return Path(path)
