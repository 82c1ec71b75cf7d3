"""The form: prompt, picture, model, size, length, seed, Advanced, and the button that says what will run."""

from abc import ABCMeta
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.components import Component
from gradio.data_classes import ImageData

from turbodiff.spec.exports import RATES, SCALES
from turbodiff.spec.models import ModelSpec, all_models
from turbodiff.spec.request import Encoder, Exchange, TextDtype
from turbodiff.spec.schedules import MAX_STEPS, Sampler, WeightsAre
from webui import form
from webui.form import FormValues
from webui.markup import Html, el
from webui.panels import storyboard
from webui.wording import Words

SAMPLERS = get_args(Sampler)
LEAST_TOPK = 0.01
ATTENTIONS = ("auto", "dense", "sage", "sla", "sagesla")
FITS = ("crop", "pad", "stretch")
# colour and glyph of a fit mark: the glyph for those who cannot tell the colours apart
MARKS = {"fits": ("--good", "✓"), "tight": ("--warn", "≈"), "no": ("--bad", "✕")}


@dataclass(frozen=True)
class Create:
    """The parts of the form; `fields` by request field, in the order of form.FIELDS."""

    fields: Mapping[str, Any]
    opened: gr.Textbox  # not empty once the page shows what its browser kept
    lint: gr.HTML
    examples: gr.HTML
    picture_note: gr.HTML
    picture_box: gr.Column
    meter: gr.HTML
    verdict: gr.HTML
    experts: gr.HTML
    boundary_box: gr.Column
    go: gr.Button
    anyway: gr.Button
    rounds: gr.HTML
    residency: gr.HTML
    loras: gr.HTML
    storyboard: gr.HTML
    segments: gr.HTML
    longer: gr.Button
    longer_note: gr.HTML
    undo: gr.HTML

    def holdable(self, values: FormValues) -> FormValues:
        """The same values where a field can hold them, else its nearest or its first: a draft, a preset or a clip may
        be of another version or by another hand."""
        kept = {name: _holdable(part, values[name]) for name, part in self.fields.items() if name in values}  # type: ignore[literal-required]
        return cast(FormValues, {**values, **kept})


def build(words: Words, spec: ModelSpec, here: Mapping[str, bool], examples: str, enhancer: str = "") -> Create:
    """The form for a model, with its defaults filled in.

    Args:
        here: model name -> its files are on this disk.
        examples: markup of the example prompts.
        enhancer: the server that may lengthen prompts, "" for none: then no button offers it.
    """
    start, fields = form.defaults(spec), dict[str, Any]()
    kinds = [(words(f"create.kind_{kind}"), kind) for kind in ("t2v", "i2v")]
    fields["kind"] = gr.Radio(kinds, value=spec.kind, show_label=False, container=False, elem_id="kind")
    with gr.Column(visible=spec.kind == "i2v") as picture_box:
        for name, height in (("image", 220), ("end_image", 120)):
            fields[name] = _picture(words, name, height)
        picture_note = gr.HTML(padding=False, elem_id="picture")
    label, hint = words("create.prompt"), prompt_hint(spec, words)
    fields["prompt"] = gr.Textbox(
        label=label, placeholder=hint, lines=3, max_lines=10, elem_id="prompt", show_label=False
    )
    opened, lint = gr.Textbox("", visible="hidden", elem_id="opened-field", label="opened"), gr.HTML(elem_id="lint")
    samples = gr.HTML(examples, elem_id="examples")  # above what a click on them brings: they stay under the pointer
    with gr.Row(elem_id="prompt-tools"):
        label = words("longer.go", host=enhancer)
        longer = gr.Button(label, size="sm", visible=bool(enhancer), elem_id="longer-go", scale=0, min_width=240)
        undo = gr.HTML(elem_id="undo-form")
    note = gr.HTML(elem_id="longer")
    with gr.Row(equal_height=False):
        label, choices = words("field.model"), model_choices(here, words)
        fields["model"] = gr.Dropdown(choices, value=spec.name, label=label, filterable=False, elem_id="model", scale=3)
        label, hint = words("create.seed"), words("create.seed_hint")
        fields["seed"] = gr.Textbox(label=label, placeholder=hint, max_lines=1, elem_id="seed", scale=2)
    with gr.Row():
        (sizes, aspects, frames), label = form.all_choices(), words("field.resolution")
        fields["resolution"] = gr.Radio(sizes, value=start["resolution"], label=label, elem_id="resolution")
        label = words("field.aspect")
        fields["aspect"] = gr.Radio(aspects, value=start["aspect"], label=label, elem_id="aspect")
    fps, label = spec.defaults.fps, words("field.num_frames")
    counts = [(words("create.frames_label", n=n, time=words.seconds(n / fps)), n) for n in frames]
    fields["num_frames"] = gr.Radio(counts, value=start["num_frames"], label=label, elem_id="frames")
    with gr.Column(elem_id="go-box"):  # before what is long: it never covers the meter or the ways out
        verdict = gr.HTML(elem_id="verdict")
        with gr.Row(elem_id="go-row"):
            go = gr.Button(words("create.go"), variant="primary", elem_id="go", scale=3)
            anyway = gr.Button(words("create.anyway"), visible=False, elem_id="anyway", scale=1)
    meter = gr.HTML(choices_style(spec), elem_id="meter")
    rounds, loras = gr.HTML(elem_id="rounds"), gr.HTML(elem_id="loras-panel")
    whole = gr.HTML(elem_id="storyboard-sum")  # also while the rows are put away: Generate queues them all
    with gr.Accordion(words("storyboard.title"), open=False, elem_id="storyboard-box"):
        gr.HTML(el("p", words("storyboard.info"), cls="td-quiet td-small"))
        segments = gr.HTML(storyboard.draw_rows((), words), elem_id="storyboard-rows")
        fields["storyboard"] = gr.Textbox("", visible="hidden", elem_id="storyboard", label="storyboard")
        for name in ("continues", "edits"):
            fields[name] = gr.Textbox("", visible="hidden", elem_id=f"{name}-field", label=name)
    with gr.Accordion(words("create.advanced"), open=False, elem_id="advanced"):
        experts, boundary_box = _advanced(fields, spec, words)
        residency = gr.HTML(elem_id="residency")
        for key, at in (("loras", "loras"), ("gpu", "gpu-field"), ("cards", "cards-field"), ("card", "card-field")):
            fields[key] = gr.Textbox("", visible="hidden", elem_id=at, label=key)
    boxes = (lint, samples, picture_note, picture_box, meter, verdict, experts, boundary_box)
    return Create(fields, opened, *boxes, go, anyway, rounds, residency, loras, whole, segments, longer, note, undo)


def _holdable(part: Component, value: object) -> object:
    """The value as a field can hold it: a slider's nearest, of choices those that it has, else what it was built with.

    Gradio shows whatever it is sent, and then refuses every event that sends it back.
    """
    if isinstance(part, gr.Slider):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return min(max(value, part.minimum), part.maximum)
        return part.value
    if not isinstance(part, gr.Radio | gr.CheckboxGroup | gr.Dropdown):
        return value
    choices = [choice for _, choice in part.choices]
    if isinstance(part, gr.CheckboxGroup):
        return [one for one in value if one in choices] if isinstance(value, list) else []
    return value if value in choices else part.value


def prompt_hint(spec: ModelSpec, words: Words) -> str:
    """What the empty prompt invites to: something that this model can show."""
    return words("example.demo_1" if spec.bundled else "create.prompt_hint")


class Unwritten(ComponentMeta):
    """Gradio's class of components, but for the .pyi that it writes beside the source of each (6.31)."""

    def __new__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, object]) -> "Unwritten":
        """A component's class as Python makes it."""
        return ABCMeta.__new__(cls, name, bases, attrs)


class Picture(gr.Image, metaclass=Unwritten):
    """The upload of a picture; its bytes are decoded within limits elsewhere, the web process never opens them.

    A class, not a changed component: Gradio makes another one of the same class for each tab whose form is filled.
    """

    is_template = True  # the browser's part is that of gr.Image

    def preprocess(self, payload: ImageData | None) -> str | None:
        """Where the upload lies; Gradio's own reads it with PIL."""
        return payload.path if payload else None


def _picture(words: Words, name: str, height: int) -> Picture:
    return Picture(
        label=words(f"create.{name}"),
        type="filepath",
        image_mode=None,
        sources=["upload"],
        height=height,
        placeholder=words(f"create.{name}_hint"),
        elem_id=name.replace("_", "-"),
        buttons=[],
    )


def model_choices(here: Mapping[str, bool], words: Words) -> list[tuple[str, str]]:
    """Every model; what is not on this disk says so."""
    return [
        (spec.display_name if here.get(spec.name) else f"{spec.display_name} · {words('create.not_here')}", spec.name)
        for spec in all_models()
    ]


def _advanced(fields: dict[str, Any], spec: ModelSpec, words: Words) -> tuple[gr.HTML, gr.Column]:
    """The settings that few people touch; returns the strip of experts and the box of what two experts need."""
    start = form.defaults(spec)

    def say(name: str) -> dict[str, Any]:
        return {"label": words(f"field.{name}"), "info": words(f"field.{name}_info"), "elem_id": name.replace("_", "-")}

    def radio(name: str, choices: list[tuple[str, str]], value: str | None) -> None:
        fields[name] = gr.Radio(choices, value=value, **say(name))

    pins, info = words("create.pins"), words("create.pins_info")
    lockable = [(words(f"create.pin_{name}"), name) for name in form.PINS]
    fields["pinned"] = gr.CheckboxGroup(lockable, label=pins, info=info, elem_id="pins")
    fields["count"] = gr.Slider(1, 8, value=1, step=1, **say("count"))
    fields["steps"] = gr.Slider(1, MAX_STEPS, value=start["steps"], step=1, **say("steps"))
    radio("sampler", [(words.or_else(f"value.sampler_{name}", name), name) for name in SAMPLERS], start["sampler"])
    kinds = [(words(f"field.weights_are_{kind}"), kind) for kind in get_args(WeightsAre)]
    radio("weights_are", kinds, "auto")
    with gr.Column(visible=spec.two_experts) as boundary_box:
        fields["boundary"] = gr.Slider(0.5, 1.0, value=start["boundary"], step=0.005, **say("boundary"))
        experts = gr.HTML(elem_id="experts")
        fields["guidance_low"] = gr.Number(None, **say("guidance_low"))
        fields["adaptive_resolution"] = gr.Checkbox(True, **say("adaptive_resolution"))
        radio("fit", [(words(f"field.fit_{fit}"), fit) for fit in FITS], "crop")
    quant = [("value.quant_linear_auto", "auto"), ("", "on"), ("value.quant_linear_off", "off")]
    radio("quant_linear", [(words(key) if key else "int8", value) for key, value in quant], "auto")
    dtypes = [(words(f"value.text_dtype_{name}"), name) for name in ("auto", *get_args(TextDtype))]
    radio("text_dtype", dtypes, "auto")
    radio("exchange", [(words(f"value.exchange_{name}"), name) for name in get_args(Exchange)], "full")
    encoders = [(words(f"value.encoder_{name}"), name) for name in get_args(Encoder)]
    fields["encoder"] = gr.Radio(encoders, value="cpu", visible=False, **say("encoder"))
    radio("attention", [(words.or_else(f"value.attention_{name}", name), name) for name in ATTENTIONS], "auto")
    fields["topk"] = gr.Slider(LEAST_TOPK, 1.0, value=start["topk"], step=0.01, **say("topk"))
    with gr.Row():
        fields["sigma_max"] = gr.Number(start["sigma_max"], **say("sigma_max"))
        fields["fps"] = gr.Number(start["fps"], precision=0, **say("fps"))
    rates = [(words("export.rate", n=n) if n else words("export.rate_same"), n) for n in RATES]
    fields["smooth_fps"] = gr.Radio(rates, value=0, **say("smooth_fps"))
    # shown where such a file was found: `choices_style`
    fields["interpolator"] = gr.Textbox("", placeholder="flownet.pkl", max_lines=1, **say("interpolator"))
    sides = [(f"{n} ×" if n > 1 else words("export.rate_same"), n) for n in SCALES]
    fields["upscale"] = gr.Radio(sides, value=1, **say("upscale"))
    fields["upscaler"] = gr.Textbox("", placeholder="RealESRGAN_x4plus.pth", max_lines=1, **say("upscaler"))
    fields["size"] = gr.Textbox("", placeholder="832x480", max_lines=1, **say("size"))
    fields["negative_prompt"] = gr.Textbox("", lines=1, **say("negative_prompt"))
    with gr.Row():
        fields["guidance"] = gr.Number(None, **say("guidance"))
        fields["shift"] = gr.Number(None, **say("shift"))
    return experts, boundary_box


def choices_style(
    spec: ModelSpec,
    num_frames: object = None,
    bands: Mapping[tuple[str, object], str] | None = None,
    interpolates: bool = False,
) -> Html:
    """A style sheet that shows this model's sizes, aspects and lengths: the form holds those of every model.

    Args:
        num_frames: what the form holds now, shown whatever the model offers.
        bands: ("resolution" or "frames", value) -> fits, tight or no; each becomes a mark beside the choice.
        interpolates: a network for frames in between is here, or named: its field is shown.
    """
    sizes, aspects, frames = form.all_choices()
    shown: tuple[tuple[str, Sequence[object], Collection[object]], ...] = (
        ("resolution", sizes, spec.limits.resolutions),
        ("aspect", aspects, spec.limits.aspects),
        ("frames", frames, (*form.offered_frames(spec), num_frames)),
    )
    rules = ["#resolution .wrap label,#aspect .wrap label,#frames .wrap label{display:none}"]
    rules += [] if interpolates else ["#interpolator{display:none!important}"]
    for part, every, some in shown:
        for place, value in enumerate(every, 1):
            choice = f"#{part} .wrap label:nth-of-type({place})"
            if value in some:
                rules.append(choice + "{display:flex}")
            if value in some and bands and (part, value) in bands:
                colour, glyph = MARKS[bands[part, value]]
                look = f"content:'{glyph}';color:var({colour});width:auto;height:auto;font-size:11px"
                rules.append(f"{choice}::after{{{look}}}")
    return Html(f"<style>{''.join(rules)}</style>")
