"""Which event calls which action. A click writes to the store and returns; a timer draws what the store says.

So a reload, a second tab or a lost network can lose nothing: only what a browser has chosen to look at is kept here.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypedDict

import gradio as gr

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import find_model
from webui import actions, api, form, form_actions, markup, render
from webui.actions import Answer, UiState
from webui.form import FormValues
from webui.markup import Html
from webui.page import Page, layout
from webui.panels import create, form_help
from webui.request_guard import BadRequest, GuardedBlocks, button_of, handler
from webui.snapshot import StudioReader
from webui.wording import Words

P = ParamSpec("P")
Updates = list[object]  # one per output: a value, gr.update or gr.skip
Filling = tuple[FormValues | None, str]  # the form's new values, None to leave it; markup to show or ""
PICTURE_FIELDS = (
    "kind",
    "image",
    "fit",
    "adaptive_resolution",
    "model",
    "resolution",
    "aspect",
    "size",
    "boundary",
    "sampler",
)  # what the fitted picture and its proposal depend on
MAX_SEARCH_CHARS = 200


class _EventOptions(TypedDict):
    queue: bool
    show_progress: str
    api_visibility: str


QUIET: _EventOptions = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build(reader: StudioReader, words: Words) -> gr.Blocks:
    """The whole page in one language."""
    blocks = GuardedBlocks(title="turbodiff", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400))
    spec = form.model_called(form_actions.initial_values(reader)["model"])
    with blocks:
        PageEvents(layout(reader, words, spec), reader, words).connect(blocks)
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
        return [*self.renderer.everything(ui_state), dict(ui_state), note]

    return redrawn


def form_handler(method: Callable[Concatenate["PageEvents", P], Filling]) -> Callable[..., Updates]:
    """A handler that fills the form: every field with the boxes that come and go, and what there is to say."""

    @handler
    @wraps(method)
    def refilled(self: "PageEvents", *args: P.args, **kwargs: P.kwargs) -> Updates:
        try:
            values, note = method(self, *args, **kwargs)
        except TurbodiffError as error:
            values, note = None, markup.note(self.words.error(error.fields()), "warn")
        whole = [gr.skip()] * (len(self.fields) + len(self.boxes)) if values is None else self.refilled(values)
        return [*whole, note]

    return refilled


class PageEvents:
    """Joins the components of one page to the studio."""

    def __init__(self, page: Page, reader: StudioReader, words: Words) -> None:
        self.page, self.reader, self.words = page, reader, words
        self.renderer = render.Renderer(reader, words)
        tab = page.create
        self.names, self.fields = list(tab.fields), list(tab.fields.values())
        self.boxes = [tab.picture_box, tab.boundary_box, tab.examples]
        self.estimated = [tab.meter, tab.go, tab.anyway, tab.lint, tab.experts, tab.residency, tab.loras, tab.rounds]
        self.panels = [page.stage[name] for name in render.PANELS]

    def connect(self, blocks: gr.Blocks) -> None:
        """Attach every handler."""
        # one API, at the page without a language in its path; first, so that it gets its names
        if self.words.lang == "en":
            api.add(self.reader)
        page, fields, made, draw = self.page, self.page.create.fields, self.page.create, self.renderer
        drawn, whole = [*self.panels, page.seen], [*self.fields, *self.boxes]
        page.timer.tick(draw.changed, inputs=[page.ui_state, page.seen], outputs=drawn, **QUIET)
        blocks.load(draw.everything, inputs=[page.ui_state], outputs=drawn, **QUIET)
        blocks.load(self.restore, inputs=[page.draft], outputs=[*whole, *self.estimated], **QUIET)
        # one event for all fields: the last change wins, and it sees every field as it is then
        gr.on(
            [part.change for part in self.fields],
            self.estimate,
            inputs=self.fields,
            outputs=[*self.estimated, page.draft],
            trigger_mode="always_last",
            **QUIET,
        )
        # apart from the meter: decoding a picture takes a process and part of a second
        gr.on(
            [fields[name].change for name in PICTURE_FIELDS],
            self.look,
            inputs=self.fields,
            outputs=[made.picture_note],
            trigger_mode="always_last",
            **QUIET,
        )
        fields["kind"].input(self.new_kind, inputs=self.fields, outputs=whole, **QUIET)
        fields["model"].input(self.new_model, inputs=self.fields, outputs=whole, **QUIET)
        filled = [*whole, page.note]
        page.form_bus.fill(self.fill, inputs=[page.ui_state, *self.fields], outputs=filled, **QUIET)
        page.video_file.upload(self.load_video, inputs=[page.video_file, *self.fields], outputs=filled, **QUIET)

        out = [*drawn, page.ui_state, page.note]
        made.go.click(self.go, inputs=[page.ui_state, *self.fields], outputs=out, **QUIET)
        made.anyway.click(self.go_anyway, inputs=[page.ui_state, *self.fields], outputs=out, **QUIET)
        page.batch_file.upload(self.load_batch, inputs=[page.batch_file], outputs=[page.batch, page.note], **QUIET)
        page.batch_go.click(self.go_batch, inputs=[page.ui_state, page.batch, *self.fields], outputs=out, **QUIET)
        page.act_bus.act(self.act, inputs=[page.ui_state], outputs=out, **QUIET)
        page.search.change(
            self.search, inputs=[page.ui_state, page.search], outputs=out, trigger_mode="always_last", **QUIET
        )
        page.seed_file.upload(self.import_seeds, inputs=[page.ui_state, page.seed_file], outputs=out, **QUIET)

    # --- the form ------------------------------------------------------------------------------------------------

    def values_of(self, row: tuple[object, ...]) -> FormValues:
        """The form's values by field name.

        Raises:
            BadRequest: no form of ours holds that.
        """
        values = form.sanitize(dict(zip(self.names, row, strict=True)))
        if len(values) != len(row):
            raise BadRequest("not the values of this form")
        return values

    def refilled(self, values: FormValues) -> Updates:
        """Updates for every field, with the choices of its model, then the boxes that come and go with it."""
        spec, held = form.model_called(values["model"]), dict(values)
        updates = {name: gr.update(value=held[name]) if name in held else gr.skip() for name in self.names}
        updates["model"]["choices"] = create.model_choices(self.reader.here(), self.words)
        examples = form_help.draw_examples(spec, self.words)
        return [
            *updates.values(),
            gr.update(visible=spec.kind == "i2v"),
            gr.update(visible=spec.two_experts),
            examples,
        ]

    @handler
    def estimate(self, *row: object) -> Updates:
        """The meter and what goes with it, and the draft that the browser keeps."""
        values = self.values_of(row)
        return [*render.estimate(self.reader, values, self.words), {**values, "image": None}]

    @handler
    def look(self, *row: object) -> str:
        """What fitting makes of the picture, and what it proposes."""
        return render.look(self.reader, self.values_of(row), self.words)

    @handler
    def restore(self, draft: object) -> Updates:
        """The form as this browser left it; whatever else is in the draft is passed over."""
        kept: Mapping[str, object] = form.sanitize(draft) if isinstance(draft, dict) else {}
        kept = {name: value for name, value in kept.items() if name in self.names and name != "image"}
        first = form_actions.initial_values(self.reader)
        spec = form.model_called(kept.get("model"), find_model(str(first["model"])))
        values = form.fitted_to(spec, {**(form.defaults(spec) if kept else first), **kept})
        return [*self.refilled(values), *render.estimate(self.reader, values, self.words)]

    @handler
    def new_kind(self, *row: object) -> Updates:
        """Another kind of clip: the first model that makes it."""
        values = self.values_of(row)
        fresh = form_actions.initial_values(self.reader, str(values["kind"]))
        return self.refilled(form.fitted_to(find_model(str(fresh["model"])), {**values, **fresh}))

    @handler
    def new_model(self, *row: object) -> Updates:
        """Another model: what it cannot take becomes its default."""
        values = self.values_of(row)
        return self.refilled(form.fitted_to(form.model_called(values["model"]), values))

    @form_handler
    def fill(self, event: gr.EventData, ui_state: UiState, *row: object) -> Filling:
        """A button that fills the form."""
        name, argument = button_of(event)
        return form_actions.fill(self.reader, name, argument, self.values_of(row), ui_state), ""

    @form_handler
    def load_video(self, path: object, *row: object) -> Filling:
        """The settings of a video of ours, back in the form."""
        values = form_actions.from_video(self.reader, uploaded(path), self.values_of(row))
        return values, form_help.draw_loaded(self.words)

    # --- clicks --------------------------------------------------------------------------------------------------

    @action_handler
    def go(self, ui_state: UiState, *row: object) -> Answer:
        """Generate."""
        return actions.generate(self.reader, self.values_of(row), ui_state, self.words)

    @action_handler
    def go_anyway(self, ui_state: UiState, *row: object) -> Answer:
        """Generate exactly as asked."""
        return actions.generate(self.reader, self.values_of(row), ui_state, self.words, anyway=True)

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
    def act(self, ui_state: UiState, event: gr.EventData) -> Answer:
        """A button of a panel."""
        name, argument = button_of(event)
        return actions.act(self.reader, name, argument, ui_state, self.words)

    @action_handler
    def search(self, ui_state: UiState, text: object) -> Answer:
        """Search the archive."""
        return {**ui_state, "search": str(text or "")[:MAX_SEARCH_CHARS]}, ""

    @action_handler
    def import_seeds(self, ui_state: UiState, path: object) -> Answer:
        """Take over a table of seeds."""
        count = self.reader.studio.import_seeds(uploaded(path))
        return ui_state, self.words("seeds.imported", n=count)


def uploaded(path: object) -> Path:
    """The file that an upload button brought.

    Raises:
        BadRequest: none.
    """
    if not isinstance(path, str):
        raise BadRequest("no file")
    return Path(path)
