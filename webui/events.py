"""Which part of the page answers to which event. The handlers are thin: actions.py and render.py do the work."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import find_model
from webui import actions, api, form, form_actions, initial_form, render
from webui.panels import create, extras
from webui.request_guard import BadRequest, handler, said
from webui.snapshot import StudioReader
from webui.wording import Words

if TYPE_CHECKING:
    from webui.page import Page

PICTURED = (
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
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class Wiring:
    """Joins one page to the studio."""

    def __init__(self, page: "Page", reader: StudioReader, words: Words) -> None:
        self.page, self.reader, self.words = page, reader, words
        self.draw = render.Renderer(reader, words)
        made = page.create
        self.names, self.parts = list(made.fields), list(made.fields.values())
        self.boxes = [made.picture_box, made.boundary_box, made.examples]
        self.told = [made.meter, made.go, made.anyway, made.lint, made.experts, made.residency, made.loras, made.rounds]
        self.panels = [page.stage[name] for name in render.PANELS]

    def connect(self, blocks: gr.Blocks) -> None:
        """Attach every handler."""
        if (
            self.words.lang == "en"
        ):  # one API, at the page without a language in its path; first, so that it gets its names
            api.add(self.reader)
        page = self.page
        out = [*self.panels, page.seen]
        page.timer.tick(self.draw.changed, inputs=[page.ui_state, page.seen], outputs=out, **QUIET)
        blocks.load(self.draw.everything, inputs=[page.ui_state], outputs=out, **QUIET)
        blocks.load(self.restore, inputs=[page.draft], outputs=[*self.parts, *self.boxes, *self.told], **QUIET)
        self._connect_form()
        self._connect_clicks()

    def _connect_form(self) -> None:
        page, fields = self.page, self.page.create.fields
        gr.on(  # one event for all fields: the last change wins, and it sees every field as it is then
            [part.change for part in self.parts],
            self.estimate,
            inputs=self.parts,
            outputs=[*self.told, page.draft],
            trigger_mode="always_last",
            **QUIET,
        )
        gr.on(  # apart from the meter: decoding a picture takes a process and part of a second
            [fields[name].change for name in PICTURED],
            self.look,
            inputs=self.parts,
            outputs=[page.create.picture_note],
            trigger_mode="always_last",
            **QUIET,
        )
        whole = [*self.parts, *self.boxes]
        fields["kind"].input(self.new_kind, inputs=self.parts, outputs=whole, **QUIET)
        fields["model"].input(self.new_model, inputs=self.parts, outputs=whole, **QUIET)
        page.form_bus.fill(self.fill, inputs=[page.ui_state, *self.parts], outputs=[*whole, page.note], **QUIET)
        page.video_file.upload(
            self.load_video, inputs=[page.video_file, *self.parts], outputs=[*whole, page.note], **QUIET
        )

    def _connect_clicks(self) -> None:
        page = self.page
        out = [*self.panels, page.seen, page.ui_state, page.note]
        made = page.create
        made.go.click(self.go, inputs=[page.ui_state, *self.parts], outputs=out, **QUIET)
        made.anyway.click(self.go_anyway, inputs=[page.ui_state, *self.parts], outputs=out, **QUIET)
        page.batch_file.upload(self.load_batch, inputs=[page.batch_file], outputs=[page.batch, page.note], **QUIET)
        page.batch_go.click(self.go_batch, inputs=[page.ui_state, page.batch, *self.parts], outputs=out, **QUIET)
        page.act_bus.act(self.act, inputs=[page.ui_state], outputs=out, **QUIET)
        page.search.change(
            self.search, inputs=[page.search, page.ui_state], outputs=out, trigger_mode="always_last", **QUIET
        )
        page.seed_file.upload(self.import_seeds, inputs=[page.seed_file, page.ui_state], outputs=out, **QUIET)

    # --- the form ------------------------------------------------------------------------------------------------

    def values_of(self, row: tuple[Any, ...]) -> dict[str, Any]:
        """The form's values by field name.

        Raises:
            BadRequest: no form of ours holds that.
        """
        values = dict(zip(self.names, row, strict=True))
        if len(form.sound(values)) != len(values):
            raise BadRequest("not the values of this form")
        return values

    @handler
    def estimate(self, *row: Any) -> list[Any]:
        """The meter and what goes with it, and the draft that the browser keeps."""
        values = self.values_of(row)
        return [*render.estimate(self.reader, values, self.words), {**values, "image": None}]

    @handler
    def look(self, *row: Any) -> Any:
        """What fitting makes of the picture, and what it proposes."""
        return render.look(self.reader, self.values_of(row), self.words)

    @handler
    def restore(self, draft: Any) -> list[Any]:
        """The form as this browser left it; whatever else is in the draft is passed over."""
        held = form.sound(draft) if isinstance(draft, dict) else {}
        kept = {name: value for name, value in held.items() if name in self.names and name != "image"}
        first = initial_form.values(self.reader)
        spec = form_actions.model_or(str(kept.get("model")), find_model(str(first["model"])))
        values = form.fitted_to(spec, {**(first if not kept else form.defaults(spec)), **kept})
        return [*self.refilled(values), *render.estimate(self.reader, values, self.words)]

    @handler
    def new_kind(self, *row: Any) -> list[Any]:
        """Another kind of clip: the first model that makes it."""
        values = self.values_of(row)
        fresh = initial_form.of_kind(self.reader, str(values["kind"]))
        return self.refilled(form.fitted_to(find_model(str(fresh["model"])), {**values, **fresh}))

    @handler
    def new_model(self, *row: Any) -> list[Any]:
        """Another model: what it cannot take becomes its default."""
        values = self.values_of(row)
        return self.refilled(form.fitted_to(form.model_called(values["model"]), values))

    @handler
    def fill(self, event: gr.EventData, ui_state: Mapping[str, str], *row: Any) -> list[Any]:
        """A button that fills the form."""
        name, argument = said(event)
        try:
            filled = form_actions.fill(self.reader, name, argument, self.values_of(row), ui_state)
        except TurbodiffError as error:
            return self.unfilled(error)
        return self.unfilled(None) if filled is None else [*self.refilled(filled), ""]

    @handler
    def load_video(self, path: Any, *row: Any) -> list[Any]:
        """Settings from a video."""
        try:
            filled = form_actions.from_video(self.reader, uploaded(path), self.values_of(row))
        except TurbodiffError as error:
            return self.unfilled(error)
        return [*self.refilled(filled), extras.draw_loaded(self.words)]

    def unfilled(self, error: Exception | None) -> list[Any]:
        """The form as it is, and why."""
        sentence = self.words.error(error.fields()) if isinstance(error, TurbodiffError) else ""
        return [gr.skip()] * (len(self.parts) + len(self.boxes)) + [extras.draw_note(sentence, "warn")]

    def refilled(self, values: Mapping[str, Any]) -> list[Any]:
        """Updates for every field, with the choices of its model, then the boxes that come and go with it."""
        spec = form.model_called(values["model"])
        choices = {"model": create.model_choices(self.reader.here(), self.words)}
        updates = [_update(name, values, choices) for name in self.names]
        examples = extras.draw_examples(spec, self.words)
        return [*updates, gr.update(visible=spec.kind == "i2v"), gr.update(visible=spec.two_experts), examples]

    # --- clicks --------------------------------------------------------------------------------------------------

    def answer(self, ui_state: Mapping[str, str], note: str = "", kind: str = "good") -> list[Any]:
        """Everything as it is now, what the browser looks at, and a sentence."""
        self.reader.changed()
        return [*self.draw.everything(ui_state), dict(ui_state), extras.draw_note(note, kind)]

    @handler
    def go(self, ui_state: Mapping[str, str], *row: Any) -> list[Any]:
        """Generate."""
        return self._submit(ui_state, row, anyway=False)

    @handler
    def go_anyway(self, ui_state: Mapping[str, str], *row: Any) -> list[Any]:
        """Generate exactly as asked."""
        return self._submit(ui_state, row, anyway=True)

    def _submit(self, ui_state: Mapping[str, str], row: tuple[Any, ...], anyway: bool) -> list[Any]:
        values = self.values_of(row)
        mark = hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
        try:
            asked = () if anyway or ui_state.get("agreed") == mark else actions.to_ask(self.reader, values, self.words)
            if asked:
                return [*self.answer({**ui_state, "agreed": mark})[:-1], extras.draw_ask(asked, self.words)]
            jobs = actions.submit(self.reader, values, anyway)
        except TurbodiffError as error:
            return self.answer(ui_state, self.words.error(error.fields()), "warn")
        return self.answer({**ui_state, "at": f"job:{jobs[0]}", "agreed": ""})

    @handler
    def load_batch(self, path: Any) -> list[Any]:
        """Lines of a text file into the box, to be looked at before they are queued."""
        try:
            text = actions.batch_text(uploaded(path))
        except TurbodiffError as error:
            return [gr.skip(), extras.draw_note(self.words.error(error.fields()), "warn")]
        return [text, ""]

    @handler
    def go_batch(self, ui_state: Mapping[str, str], lines: str, *row: Any) -> list[Any]:
        """One job per line."""
        try:
            jobs = actions.submit_batch(self.reader, self.values_of(row), str(lines or ""))
        except TurbodiffError as error:
            return self.answer(ui_state, self.words.error(error.fields()), "warn")
        return self.answer({**ui_state, "at": ""}, self.words("create.batch_done", n=len(jobs)))

    @handler
    def act(self, event: gr.EventData, ui_state: Mapping[str, str]) -> list[Any]:
        """A button of a panel."""
        name, argument = said(event)
        try:
            ui_state, sentence = actions.act(self.reader, name, argument, ui_state, self.words)
        except TurbodiffError as error:
            return self.answer(ui_state, self.words.error(error.fields()), "warn")
        return self.answer(ui_state, sentence)

    @handler
    def search(self, text: Any, ui_state: Mapping[str, str]) -> list[Any]:
        """Search the archive."""
        return self.answer({**ui_state, "search": str(text or "")[:200]})

    @handler
    def import_seeds(self, path: Any, ui_state: Mapping[str, str]) -> list[Any]:
        """Take over a table of seeds."""
        try:
            count = self.reader.studio.import_seeds(uploaded(path))
        except TurbodiffError as error:
            return self.answer(ui_state, self.words.error(error.fields()), "warn")
        return self.answer(ui_state, self.words("seeds.imported", n=count))


def _update(name: str, values: Mapping[str, Any], choices: Mapping[str, Any]) -> Any:
    if name in choices:
        return gr.update(value=values.get(name), choices=choices[name])
    return gr.update(value=values[name]) if name in values else gr.skip()


def uploaded(path: Any) -> Path:
    """The file that an upload button brought.

    Raises:
        BadRequest: none.
    """
    if not isinstance(path, str):
        raise BadRequest("no file")
    return Path(path)
