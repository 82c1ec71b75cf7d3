"""The form: prompt, picture, model, size, length, seed, Advanced, and the button that says what will run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from turbodiff.spec.models import ModelSpec, all_models
from turbodiff.spec.request import MAX_TURBO_STEPS
from webui import form
from webui.wording import Words

ATTENTIONS = ("auto", "dense", "sage", "sla", "sagesla")
FITS = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class Create:
    """The parts of the form; `fields` by request field, in the order of form.FIELDS."""

    fields: Mapping[str, Any]
    lint: gr.HTML
    examples: gr.HTML
    picture_note: gr.HTML
    picture_box: gr.Column
    meter: gr.HTML
    experts: gr.HTML
    boundary_box: gr.Column
    go: gr.Button
    anyway: gr.Button
    rounds: gr.HTML
    residency: gr.HTML
    loras: gr.HTML


def build(words: Words, spec: ModelSpec, here: Mapping[str, bool], examples: str, shown_style: str) -> Create:
    """The form for a model, with its defaults filled in.

    Args:
        here: model name -> its files are on this disk.
        shown_style: the style sheet that shows this model's choices only, until the first estimate brings the next.
    """
    start = form.defaults(spec)
    fields: dict[str, Any] = {}
    fields["kind"] = gr.Radio(_kinds(words), value=spec.kind, show_label=False, container=False, elem_id="kind")
    with gr.Column(visible=spec.kind == "i2v") as picture_box:
        fields["image"] = _picture(words)
        picture_note = gr.HTML(padding=False, elem_id="picture")
    fields["prompt"] = _prompt(words)
    lint = gr.HTML(elem_id="lint")
    samples = gr.HTML(examples, elem_id="examples")
    fields["model"], fields["seed"] = _model(model_choices(here, words), spec, words)
    fields["resolution"], fields["aspect"] = _size(start, words)
    fields["num_frames"] = gr.Radio(
        frame_choices(spec.defaults.fps, words),
        value=start["num_frames"],
        label=words("field.num_frames"),
        elem_id="frames",
    )
    meter = gr.HTML(shown_style, elem_id="meter")
    with gr.Row(elem_id="go-row"):
        go = gr.Button(words("create.go"), variant="primary", elem_id="go", scale=3)
        anyway = gr.Button(words("create.anyway"), visible=False, elem_id="anyway", scale=1)
    rounds = gr.HTML(elem_id="rounds")
    with gr.Accordion(words("create.advanced"), open=False, elem_id="advanced"):
        experts, boundary_box = _advanced(fields, spec, start, words)
        residency = gr.HTML(elem_id="residency")
        loras = gr.HTML(elem_id="loras-panel")
        fields["loras"] = gr.Textbox("", visible="hidden", elem_id="loras", label="LoRA")
    made = (
        lint,
        samples,
        picture_note,
        picture_box,
        meter,
        experts,
        boundary_box,
        go,
        anyway,
        rounds,
        residency,
        loras,
    )
    return Create(fields, *made)


def _prompt(words: Words) -> gr.Textbox:
    return gr.Textbox(
        label=words("create.prompt"),
        placeholder=words("create.prompt_hint"),
        lines=3,
        max_lines=10,
        elem_id="prompt",
        show_label=False,
    )


def _model(choices: list[tuple[str, str]], spec: ModelSpec, words: Words) -> tuple[gr.Dropdown, gr.Textbox]:
    with gr.Row(equal_height=False):
        model = gr.Dropdown(
            choices, value=spec.name, label=words("field.model"), filterable=False, elem_id="model", scale=3
        )
        seed = gr.Textbox(
            label=words("create.seed"),
            placeholder=words("create.seed_hint"),
            max_lines=1,
            elem_id="seed",
            scale=2,
        )
    return model, seed


def _picture(words: Words) -> gr.Image:
    """The upload of a picture; its bytes are decoded within limits elsewhere, the web process never opens them."""
    picture = gr.Image(
        label=words("create.image"),
        type="filepath",
        image_mode=None,
        sources=["upload"],
        height=220,
        placeholder=words("create.image_hint"),
        elem_id="image",
        buttons=[],
    )
    picture.preprocess = _path_of  # type: ignore[method-assign]  # Gradio's own reads the head with PIL
    return picture


def _path_of(payload: Any) -> Any:
    return payload.path if payload is not None else None


def _kinds(words: Words) -> list[tuple[str, str]]:
    return [(words(f"create.kind_{kind}"), kind) for kind in ("t2v", "i2v")]


def model_choices(here: Mapping[str, bool], words: Words) -> list[tuple[str, str]]:
    """Every model; what is not on this disk says so."""
    return [
        (spec.display_name if here.get(spec.name) else f"{spec.display_name} · {words('create.not_here')}", spec.name)
        for spec in all_models()
    ]


def frame_choices(fps: int, words: Words) -> list[tuple[str, int]]:
    """Frame counts with their seconds."""
    return [(words("create.frames_label", n=n, time=words.seconds(n / fps)), n) for n in form.all_frames()]


def _size(start: Mapping[str, Any], words: Words) -> tuple[gr.Radio, gr.Radio]:
    with gr.Row():
        resolution = gr.Radio(
            form.all_resolutions(), value=start["resolution"], label=words("field.resolution"), elem_id="resolution"
        )
        aspect = gr.Radio(form.all_aspects(), value=start["aspect"], label=words("field.aspect"), elem_id="aspect")
    return resolution, aspect


def _advanced(
    fields: dict[str, Any], spec: ModelSpec, start: Mapping[str, Any], words: Words
) -> tuple[gr.HTML, gr.Column]:
    def say(name: str) -> dict[str, Any]:
        return {"label": words(f"field.{name}"), "info": words(f"field.{name}_info"), "elem_id": name.replace("_", "-")}

    fields["pinned"] = gr.CheckboxGroup(
        [(words(f"create.pin_{name}"), name) for name in form.PINS],
        label=words("create.pins"),
        info=words("create.pins_info"),
        elem_id="pins",
    )
    fields["count"] = gr.Slider(1, 8, value=1, step=1, **say("count"))
    fields["steps"] = gr.Slider(1, MAX_TURBO_STEPS, value=start["steps"], step=1, **say("steps"))
    fields["sampler"] = gr.Radio(
        [("SDE", "sde"), ("ODE", "ode"), ("UniPC", "unipc")], value=start["sampler"], **say("sampler")
    )
    with gr.Column(visible=spec.two_experts) as boundary_box:
        fields["boundary"] = gr.Slider(0.5, 1.0, value=start["boundary"], step=0.005, **say("boundary"))
        experts = gr.HTML(elem_id="experts")
        fields["adaptive_resolution"] = gr.Checkbox(True, **say("adaptive_resolution"))
        fields["fit"] = gr.Radio([(words(f"field.fit_{fit}"), fit) for fit in FITS], value="crop", **say("fit"))
    fields["quant_linear"] = gr.Radio(
        [(words("value.quant_linear_auto"), "auto"), ("int8", "on"), (words("value.quant_linear_off"), "off")],
        value="auto",
        **say("quant_linear"),
    )
    fields["attention"] = gr.Radio(
        [(words.or_else(f"value.attention_{name}", name), name) for name in ATTENTIONS],
        value="auto",
        **say("attention"),
    )
    fields["topk"] = gr.Slider(0.02, 1.0, value=start["topk"], step=0.01, **say("topk"))
    with gr.Row():
        fields["sigma_max"] = gr.Number(start["sigma_max"], **say("sigma_max"))
        fields["fps"] = gr.Number(start["fps"], precision=0, **say("fps"))
    fields["size"] = gr.Textbox("", placeholder="832x480", max_lines=1, **say("size"))
    fields["negative_prompt"] = gr.Textbox("", lines=1, **say("negative_prompt"))
    with gr.Row():
        fields["guidance"] = gr.Number(1.0, **say("guidance"))
        fields["shift"] = gr.Number(5.0, **say("shift"))
    return experts, boundary_box
