"""The page: panels joined to the studio, one gr.Blocks per language; every handler answers in milliseconds.

A click writes to the store and returns; a timer draws what the store says. So a reload, a second tab or a lost network
can lose nothing: this file keeps no job, only what a browser has chosen to look at.
"""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from webui import form, initial_form, render, request_guard
from webui.events import Wiring
from webui.panels import bar, create, extras
from webui.snapshot import StudioReader
from webui.wording import Words

TICK_S = 1.0
DRAFT_KEY, DRAFT_SECRET = "turbodiff.draft", "turbodiff"  # fixed: a restart must find what the browser kept
BUS = """window.{hook} = (act, arg) => trigger('{event}', {{act, arg}});"""


@dataclass(frozen=True)
class Page:
    """The parts that handlers read and write."""

    create: create.Create
    stage: dict[str, gr.HTML]  # by panel name of render.PANELS
    ui_state: gr.State  # what this browser looks at: render.INITIAL_UI_STATE
    seen: gr.State  # panel -> digest of what this browser was sent
    draft: gr.BrowserState
    act_bus: gr.HTML
    form_bus: gr.HTML
    note: gr.HTML
    timer: gr.Timer
    search: gr.Textbox
    seed_file: gr.UploadButton
    video_file: gr.UploadButton
    batch: gr.Textbox
    batch_file: gr.UploadButton
    batch_go: gr.Button


def build(reader: StudioReader, words: Words) -> gr.Blocks:
    """The whole page in one language."""
    with request_guard.Page(
        title="turbodiff", fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)
    ) as blocks:
        page = _parts(reader, words)
        Wiring(page, reader, words).connect(blocks)
    return blocks


def _parts(reader: StudioReader, words: Words) -> Page:
    stage: dict[str, gr.HTML] = {"bar": gr.HTML(elem_id="bar"), "aid": gr.HTML(elem_id="aid")}
    gr.HTML(bar.draw_help(words))
    act_bus = gr.HTML(elem_classes="hidden-bus", js_on_load=BUS.format(hook="tdAct", event="act"))
    form_bus = gr.HTML(elem_classes="hidden-bus", js_on_load=BUS.format(hook="tdForm", event="fill"))
    note = gr.HTML(elem_id="note")
    parts: dict[str, Any] = {}
    with gr.Tabs(elem_id="tabs"):
        with gr.Tab(words("create.tab"), id="create"), gr.Row(elem_id="create", equal_height=False):
            _create_tab(stage, parts, reader, words)
        with gr.Tab(words("gallery.tab"), id="gallery"):
            _gallery_tab(stage, parts, words)
        with gr.Tab(words("seeds.tab"), id="seeds"):
            _seeds_tab(stage, parts, words)
        with gr.Tab(words("system.tab"), id="system"):
            stage["system"] = gr.HTML(elem_id="system")
        with gr.Tab(words("log.tab"), id="log-tab"):
            gr.HTML(extras.draw_log_tools(words))
            stage["log"] = gr.HTML(max_height=640, autoscroll=True, elem_id="log")
        with gr.Tab(words("settings.tab"), id="settings-tab"):
            stage["settings"] = gr.HTML(elem_id="settings")
    return Page(
        stage=stage,
        ui_state=gr.State(dict(render.INITIAL_UI_STATE)),
        seen=gr.State({}),
        act_bus=act_bus,
        form_bus=form_bus,
        note=note,
        draft=gr.BrowserState(None, storage_key=DRAFT_KEY, secret=DRAFT_SECRET),
        timer=gr.Timer(TICK_S),
        **parts,
    )


def _create_tab(stage: dict[str, gr.HTML], parts: dict[str, Any], reader: StudioReader, words: Words) -> None:
    with gr.Column(scale=42, min_width=320, elem_id="form"):
        spec = form.model_called(str(initial_form.values(reader)["model"]))
        shown = render.choices_style(spec, {}, {})
        parts["create"] = create.build(words, spec, reader.here(), extras.draw_examples(spec, words), shown)
        with gr.Accordion(words("create.batch"), open=False, elem_id="batch-box"):
            parts["batch"] = gr.Textbox(
                label=words("create.batch_label"), info=words("create.batch_info"), lines=4, elem_id="batch"
            )
            parts["batch_file"] = gr.UploadButton(
                words("create.batch_file"), file_types=[".txt", ".md"], elem_id="batch-file", size="sm"
            )
            parts["batch_go"] = gr.Button(words("create.batch_go"), elem_id="batch-go")
    with gr.Column(scale=58, min_width=320, elem_id="stage"):
        for name in ("player", "progress", "card", "queue", "strip"):
            stage[name] = gr.HTML(elem_id=name)
        with gr.Accordion(words("log.tail", name=render.STARTUP_LOG), open=False, elem_id="tail"):
            stage["tail"] = gr.HTML(max_height=220, autoscroll=True)


def _gallery_tab(stage: dict[str, gr.HTML], parts: dict[str, Any], words: Words) -> None:
    parts["video_file"] = gr.UploadButton(
        words("gallery.load"), file_types=[".mp4"], elem_id="load-video", size="sm", scale=0, min_width=240
    )
    stage["compare"] = gr.HTML(elem_id="compare")
    with gr.Row(elem_id="gallery", equal_height=False):
        with gr.Column(scale=62, min_width=320):
            stage["gallery"] = gr.HTML(elem_id="gallery-grid")
        with gr.Column(scale=38, min_width=320, elem_id="gallery-side"):
            stage["side"] = gr.HTML(elem_id="side")


def _seeds_tab(stage: dict[str, gr.HTML], parts: dict[str, Any], words: Words) -> None:
    with gr.Row(equal_height=True, elem_id="seed-tools"):
        parts["search"] = gr.Textbox(
            placeholder=words("seeds.search"),
            show_label=False,
            label=words("seeds.search"),
            max_lines=1,
            elem_id="seed-search",
            scale=5,
        )
        parts["seed_file"] = gr.UploadButton(
            words("seeds.import"), file_types=[".md"], elem_id="import-seeds", size="sm", scale=1, min_width=180
        )
        gr.HTML(extras.draw_export(words))
    stage["seeds"] = gr.HTML(elem_id="seed-table")
