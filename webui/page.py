"""Which component sits where, one page per language, and the theme."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from turbodiff.spec.grids import GRID_FIELDS
from turbodiff.spec.models import ModelSpec
from turbodiff.studio import ONLY, ORDERS, nvenc_fault
from webui import markup
from webui.app import PASSWORD, STARTUP_LOG
from webui.panels import create, form_help, gallery, jobs, status_bar, tabs
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import StudioReader

STATIC = Path(__file__).parent / "static"
SIDE = ("side", "export", "exports")  # panels beside the gallery
SCRIPTS = ("first.js", "page.js", "gallery.js", "queue.js", "notify.js", "changes.js")
DRAFT_KEY, DRAFT_SECRET = "turbodiff.draft", "turbodiff"  # fixed: a restart must find what the browser kept
# one component for all of static/'s events: the browser compiles two templates for each such component
BUS = """window.tdAct = (act, arg) => trigger('act', {act, arg});
window.tdForm = (act, arg) => trigger('fill', {act, arg});
window.tdLook = (event) => trigger(event === 'whole' ? 'whole' : 'look');"""


# a clip's id or "job:7"; the archive's search; the clips to compare it with, and whether one wipes over the other; the
# form whose changes a person has seen; the log that is read; what the gallery looks for, its page and its chosen clips
INITIAL_UI_STATE = {
    "at": "", "search": "", "left": "", "wipe": "", "agreed": "", "log": STARTUP_LOG,
    "find": "", "only": "all", "order": "newest", "page": "0", "picked": "", "recall": "",
}  # fmt: skip


GalleryFilters = tuple[gr.Textbox, gr.Dropdown, gr.Dropdown]  # what to find, which clips, in which order


@dataclass(frozen=True)
class Page:
    """The components that handlers read and write."""

    create: create.Create
    stage: dict[str, gr.HTML]  # by panel name of render.PANELS
    ui_state: gr.State  # what this browser looks at: INITIAL_UI_STATE
    seen: gr.State  # panel -> digest of what this browser was sent
    past: gr.State  # what the form held before a button filled it last; None for nothing
    draft: gr.BrowserState
    bus: gr.HTML
    note: gr.HTML
    search: gr.Textbox
    seed_file: gr.UploadButton
    video_file: gr.UploadButton
    batch: gr.Textbox
    batch_file: gr.UploadButton
    batch_go: gr.Button
    grid: tuple[Component, ...]  # a field, its values, another field, its values
    grid_go: gr.Button
    gallery_filters: GalleryFilters
    recall: gr.Textbox
    preset_file: gr.UploadButton


def layout(reader: StudioReader, words: Words, spec: ModelSpec) -> Page:
    """Lay the page out inside the gr.Blocks that is open."""
    gr.HTML(status_bar.draw_help(words), elem_id="first")  # before all else: the link that skips it
    stage = {"bar": gr.HTML(elem_id="bar"), "aid": gr.HTML(elem_id="aid")}
    bus = gr.HTML(elem_classes="hidden-bus", js_on_load=BUS)
    note = gr.HTML(elem_id="note")
    with gr.Tabs(elem_id="tabs"):
        with gr.Tab(words("create.tab"), id="create"), gr.Row(elem_id="create", equal_height=False):
            with gr.Column(scale=42, min_width=320, elem_id="form"):
                enhancer = reader.studio.enhancer.host if reader.studio.enhancer else ""
                made = create.build(words, spec, reader.here(), form_help.draw_examples(spec, words), enhancer)
                made.fields["encoder"].visible = not nvenc_fault()  # before the page is sent
                batch, grid, recalled = _batch(words), _grid(words), _recipes(stage, words)
            with gr.Column(scale=58, min_width=320, elem_id="stage"):
                stage |= {name: gr.HTML(elem_id=name) for name in ("player", "progress", "card", "queue")}
                gr.HTML(jobs.draw_night(words), elem_id="night")
                stage["strip"] = gr.HTML(elem_id="strip")
                with gr.Accordion(words("log.tail", name=STARTUP_LOG), open=False, elem_id="tail"):
                    stage["tail"] = gr.HTML(max_height=220, autoscroll=True)
        with gr.Tab(words("gallery.tab"), id="gallery"):
            filters, video_file = _gallery(stage, words)
        with gr.Tab(words("seeds.tab"), id="seeds"):
            with gr.Row(equal_height=True, elem_id="seed-tools"):
                hint = words("seeds.search")
                box = gr.Textbox(
                    placeholder=hint, show_label=False, label=hint, max_lines=1, elem_id="seed-search", scale=5
                )
                seed_file = _upload(words("seeds.import"), ".md", elem_id="import-seeds", scale=1, min_width=180)
                gr.HTML(
                    markup.download(markup.link("/seeds.md"), words("seeds.export"), cls="td-btn", download="seeds.md")
                )
            stage["seeds"] = gr.HTML(elem_id="seed-table")
        with gr.Tab(words("system.tab"), id="system"):
            stage["system"] = gr.HTML(elem_id="system")
            stage["source"] = gr.HTML(elem_id="source")
        with gr.Tab(words("log.tab"), id="log-tab"):
            stage["logs"] = gr.HTML(elem_id="logs")
            gr.HTML(tabs.draw_log_tools(words))
            stage["log"] = gr.HTML(max_height=640, autoscroll=True, elem_id="log")
        with gr.Tab(words("settings.tab"), id="settings-tab"):
            stage["settings"] = gr.HTML(elem_id="settings")
            if os.environ.get(PASSWORD):
                button = markup.el("button", words("server.log_out"), type="submit", cls="td-btn")
                leave, narrow = markup.link("/logout"), "td-html td-narrow"
                gr.HTML(markup.el("form", button, method="post", action=leave, cls=narrow, id="log-out"))
    ui_state, seen = gr.State(dict(INITIAL_UI_STATE)), gr.State({})
    draft = gr.BrowserState(None, storage_key=DRAFT_KEY, secret=DRAFT_SECRET)
    shown = (made, stage, ui_state, seen, gr.State(None), draft, bus, note)
    return Page(*shown, box, seed_file, video_file, *batch, *grid, filters, *recalled)


def _batch(words: Words) -> tuple[gr.Textbox, gr.UploadButton, gr.Button]:
    """Many prompts at once, folded."""
    with gr.Accordion(words("create.batch"), open=False, elem_id="batch-box"):
        label, hint = words("create.batch_label"), words("create.batch_info")
        batch = gr.Textbox(label=label, info=hint, lines=4, elem_id="batch")
        batch_file = _upload(words("create.batch_file"), ".txt", ".md", elem_id="batch-file")
        return batch, batch_file, gr.Button(words("create.batch_go"), elem_id="batch-go")


def _grid(words: Words) -> tuple[tuple[Component, ...], gr.Button]:
    """Two fields with the values to compare, folded."""
    names = [(words.or_else(f"field.{name}", name), name) for name in GRID_FIELDS]
    parts: list[Component] = []
    with gr.Accordion(words("grid.title"), open=False, elem_id="grid-box"):
        gr.HTML(markup.el("p", words("grid.info"), cls="td-quiet td-small"))
        for axis, first, some in (("rows", "seed", "1, 2, 3"), ("columns", "steps", "2, 4")):
            with gr.Row():
                label, at = words(f"grid.{axis}"), f"grid-{axis}"
                parts.append(gr.Dropdown(names, value=first, label=label, filterable=False, elem_id=at))
                label = words("grid.values")
                parts.append(gr.Textbox(label=label, placeholder=some, max_lines=1, elem_id=f"{at}-values"))
        return tuple(parts), gr.Button(words("grid.go"), elem_id="grid-go")


def _recipes(stage: dict[str, gr.HTML], words: Words) -> tuple[gr.Textbox, gr.UploadButton]:
    """Earlier prompts and presets, folded."""
    with gr.Accordion(words("recipes.title"), open=False, elem_id="recipes"):
        hint = words("recipes.search")
        recall = gr.Textbox(placeholder=hint, show_label=False, label=hint, max_lines=1, elem_id="recall")
        stage |= {name: gr.HTML(elem_id=name) for name in ("prompts", "presets")}
        return recall, _upload(words("recipes.load"), ".json", elem_id="preset-file")


def _gallery(stage: dict[str, gr.HTML], words: Words) -> tuple[GalleryFilters, gr.UploadButton]:
    """The gallery's tab: what to find, the clips, the chosen one beside them."""
    with gr.Row(equal_height=True, elem_id="shelf"):
        hint, kinds = words("gallery.find"), [(words(f"gallery.only_{name}"), name) for name in ONLY]
        find = gr.Textbox(
            placeholder=hint, show_label=False, label=hint, max_lines=1, elem_id="find", scale=4, min_width=200
        )
        label, orders = words("gallery.only"), [(words(f"gallery.order_{name}"), name) for name in ORDERS]
        only = gr.Dropdown(kinds, value="all", label=label, show_label=False, filterable=False, elem_id="only")
        label = words("gallery.order")
        order = gr.Dropdown(orders, value="newest", label=label, show_label=False, filterable=False, elem_id="order")
        video_file = _upload(words("gallery.load"), ".mp4", elem_id="load-video", scale=0, min_width=220)
    gr.HTML(gallery.draw_tools(words))
    stage["compare"] = gr.HTML(elem_id="compare")
    with gr.Row(elem_id="gallery", equal_height=False):
        with gr.Column(scale=62, min_width=320):
            stage["gallery"] = gr.HTML(elem_id="gallery-grid")
        with gr.Column(scale=38, min_width=320, elem_id="gallery-side"):
            stage |= {name: gr.HTML(elem_id=f"{name}-panel" if name == "export" else name) for name in SIDE}
    return (find, only, order), video_file


def _upload(label: str, *suffixes: str, elem_id: str, **options: Any) -> gr.UploadButton:
    return gr.UploadButton(label, file_types=list(suffixes), elem_id=elem_id, size="sm", **options)


def theme() -> gr.themes.Base:
    """Gradio's base theme with the fonts and variables of static/theme.toml, the same by day and in the dark."""
    look = tomllib.loads((STATIC / "theme.toml").read_text("utf-8"))
    base = gr.themes.Base(font=look["font"], font_mono=look["font_mono"], radius_size=gr.themes.sizes.radius_md)
    variables: dict[str, str] = look["variables"]
    dark = {f"{name}_dark": value for name, value in variables.items() if hasattr(base, f"{name}_dark")}
    return base.set(**variables, **dark)
