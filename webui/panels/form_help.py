"""What is drawn around the form as it changes: example prompts, advice on the prompt, the fitted picture, the LoRAs on
this disk, and the rounds.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from turbodiff.prompt.demo_words import unknown_words
from turbodiff.prompt.lint import is_chinese, lint
from turbodiff.spec.models import ModelSpec, find_model
from turbodiff.spec.request import Request
from turbodiff.spec.schedules import RCM_SAMPLERS
from webui.form import strengths
from webui.markup import Html, action, el, join, local, void
from webui.panels.meter import short_model
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import Look, LoraFacts, LoraFile, Outlook, Round

Fields = Mapping[str, object]  # of the form, by name
Outlooks = Callable[[Fields], "Outlook | None"]  # of such a form, None where it is not a legal request
LoraRow = Mapping[str, Any]  # {"name", "strength", "expert"}, see form.loras

DEMO_EXAMPLES = ("demo_1", "demo_2", "demo_3")
EXAMPLES = ("astronaut", "samurai", "cat", "neon")
MAX_UNKNOWN = 4  # words named in a chip
NOT_FOR_DEMO = ("too_short", "no_verb")  # the demo's grammar is its own
THREE_ROUNDS, TEN_MINUTES_S = ("scout", "polish", "deliver"), 600.0  # from an idea to a clip, as the guide promises
# what is given up, in this order, where a round takes too long or does not fit; the model never for a picture
SHORTER: tuple[Fields, ...] = (
    {"num_frames": 49},
    {"resolution": "480p"},
    {"resolution": "480p", "num_frames": 49},
    {"resolution": "480p", "num_frames": 33},
    {"model": "wan2.1-1.3b", "resolution": "480p"},
    {"model": "wan2.1-1.3b", "resolution": "480p", "num_frames": 49},
)


@dataclass(frozen=True)
class PromptChip:
    """One piece of advice; `rewrite` is the prompt after one click, "" where that needs a person."""

    key: str
    sentence: str
    tip: str
    rewrite: str


@dataclass(frozen=True)
class PromptHelp:
    """What is shown under the prompt."""

    chips: tuple[PromptChip, ...]
    tokens: str
    chinese: bool


def prompt_help(prompt: str, tokens: int | None, spec: ModelSpec, words: Words) -> PromptHelp:
    """Advice for a prompt; the demo's grammar is its own, so it gets no rewrite and no word on length."""
    chips = tuple(
        PromptChip(
            advice.key,
            words(f"lint.{advice.key}", **advice.numbers),
            words(f"lint.{advice.key}_tip"),
            "" if spec.bundled else advice.rewrite,
        )
        for advice in lint(prompt, tokens)
        if not (spec.bundled and advice.key in NOT_FOR_DEMO)
    )
    unknown = unknown_words(prompt) if spec.bundled else ()
    if unknown:
        named = ", ".join(unknown[:MAX_UNKNOWN])
        chips += (PromptChip("unknown", words("lint.unknown", words=named), words("lint.unknown_tip"), ""),)
    count = words("create.tokens", n=tokens) if tokens is not None and prompt.strip() else ""
    return PromptHelp(chips, count, spec.turbo and not spec.bundled and is_chinese(prompt))


def draw_examples(spec: ModelSpec, words: Words) -> Html:
    """Prompts to start from: shapes for the demo, the guide's for Wan."""
    prompts = [words(f"example.{key}") for key in (DEMO_EXAMPLES if spec.bundled else EXAMPLES)]
    buttons = [  # one stop of the Tab key, the arrow keys go on (page.js)
        action("example", prompt, prompt, form=True, title=prompt, tabindex="-1" if place else None)
        for place, prompt in enumerate(prompts)
    ]
    tip = el("p", words("create.demo_tip"), cls="td-quiet", style="margin:10px 0 0;font-size:12.5px")
    return join(el("div", buttons, cls="td-examples"), tip if spec.bundled else None)


def draw_prompt_help(shown: PromptHelp, words: Words) -> Html:
    """Advice as chips, one click where a rewrite can do it, and the token count."""
    chips = []
    for chip in shown.chips:
        said = {"cls": "td-chip", "title": chip.tip, "data_key": chip.key}
        click = {"type": "button", "data_form": "example", "data_arg": chip.rewrite}
        chips.append(
            el("button", chip.sentence, **said, **click) if chip.rewrite else el("span", chip.sentence, **said)
        )
    count, tip = None, None
    if shown.tokens:
        count = el("span", shown.tokens, cls="td-quiet td-num", style="font-size:12px;margin-left:auto")
    if shown.chinese:
        button = local("gotit", "", words("create.got_it"), cls="plain")
        tip = el("div", words("create.tip_turbo"), " ", button, cls="td-note once", style="margin-top:8px")
    return join(el("div", chips, count, cls="td-chips") if chips or count else None, tip)


@dataclass(frozen=True)
class Picture:
    """What is shown below the picture; `proposal` is "" where there is none or the form holds it already."""

    preview: str  # a data: URL
    caption: str
    reason: str = ""
    proposal: str = ""
    take: str = ""  # the fields of the proposal as JSON


def picture(look: Look, request: Request, preview: bytes, values: Fields, spec: ModelSpec, words: Words) -> Picture:
    """The preview's caption and the advisor's proposal for the handoff between experts, with its reason.

    Args:
        look: what the picture proposes. request: as it will run. preview: the fitted picture as a JPEG.
    """
    size = {"width": request.width, "height": request.height}
    if spec.limits.free_size and request.adaptive_resolution and request.resolution != "custom":
        caption = words("picture.adaptive", resolution=request.resolution, **size)
    elif (look.width, look.height) == (request.width, request.height):
        caption = words("picture.as_it_is", **size)
    else:
        caption = words(f"picture.{request.fit}", source=f"{look.width}x{look.height}", **size)
    url = "data:image/jpeg;base64," + base64.b64encode(preview).decode()
    if not spec.two_experts:
        return Picture(url, caption)
    # shares in percent, colours in bits
    spoken = {name: f"{n:.1f}" if name.endswith("_bits") else f"{n:.0%}" for name, n in look.numbers.items()}
    reason = words(f"picture.{look.key}", **spoken)
    runs = request.sampler if values.get("sampler") == "auto" else values.get("sampler")
    of_rcm = runs == "auto" or runs in RCM_SAMPLERS  # other weights keep their own sampler
    what = {"boundary": f"{look.boundary:g}", "sampler": (look.sampler if of_rcm else str(runs)).upper()}
    proposed: Fields = {"boundary": look.boundary, **({"sampler": look.sampler} if of_rcm else {})}
    if all({**values, "sampler": runs}.get(name) == value for name, value in proposed.items()):
        return Picture(url, caption, reason + " " + words("picture.as_proposed", **what))
    return Picture(url, caption, reason, words("picture.take", **what), json.dumps(proposed))


def draw_picture(shown: Picture) -> Html:
    """The fitted picture, and what it proposes with the reason and one button."""
    image = void("img", src=shown.preview, alt=shown.caption, cls="td-fitted")
    button = action("fill", shown.take, shown.proposal, form=True) if shown.take else None
    advice = el("div", el("span", shown.reason), button, cls="td-note td-line", id="advice") if shown.reason else None
    return join(el("figure", image, el("figcaption", shown.caption, cls="td-quiet"), cls="td-figure td-html"), advice)


@dataclass(frozen=True)
class LoraLine:
    """One LoRA on this disk; strengths in the high- and low-noise expert, None where it is off."""

    name: str
    about: str
    strengths: tuple[float, float] | None
    picture: str = ""  # a data: URL


def lora_lines(
    files: Iterable[LoraFile],
    facts: Callable[[str], tuple[LoraFacts, bytes | None]],
    chosen: Iterable[LoraRow],
    words: Words,
) -> list[LoraLine]:
    """Every LoRA on this disk; those that are on say their title and trigger words."""
    on, lines = strengths(chosen), []
    for file in files:
        told, jpeg = facts(file.name) if file.name in on else (None, None)
        about, picture = "", f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else ""
        if told:
            spoken = words("field.lora_words", words=", ".join(told.words)) if told.words else ""
            expert = words(f"value.lora_is_{told.expert}") if told.expert in ("high", "low") else ""
            about = " · ".join(filter(None, (told.title, spoken, expert)))
        lines.append(LoraLine(file.name, about, on.get(file.name), picture))
    return lines


def draw_loras(lines: Iterable[LoraLine], folder: str, two_experts: bool, words: Words) -> Html:
    """One row per LoRA: on or off, a slider of its strength, and for two experts one each; or where to put files."""
    rows = []
    for line in lines:
        sent = {"data_change": "lora", "data_name": line.name}  # by page.js when a field changes
        on = void(
            "input", aria_label=line.name, **sent, data_key="on", type="checkbox", checked=line.strengths is not None
        )
        parts = [el("label", on, el("span", line.name, cls="what"))]
        keys = ("high", "low") if two_experts else ("strength",)
        for key, strength in zip(keys, line.strengths or (), strict=False):
            label = words(f"field.lora_{key}")
            limits = {"type": "range", "min": "-4", "max": "4", "step": "0.05", "value": f"{strength:g}"}
            slider = void("input", aria_label=f"{line.name} {label}", **sent, data_key=key, **limits)
            parts.append(el("label", label, slider, el("output", f"{strength:g}", cls="td-num"), cls="strength"))
        if line.picture:
            parts.insert(0, void("img", src=line.picture, alt="", cls="thumb"))
        if line.about:
            parts.append(el("span", line.about, cls="td-quiet about"))
        rows.append(el("div", parts, data_lora=line.name))
    label, info = el("span", words("field.loras"), cls="td-label"), el("span", words("field.loras_info"), cls="td-info")
    none = el("p", words("field.loras_none", folder=folder), cls="td-quiet td-small")
    return el("div", label, info, el("div", rows, cls="td-list") if rows else none, cls="td-html", id="lora-list")


@dataclass(frozen=True)
class RoundTile:
    """One round; `instead` and `instead_fields` are what fits its budget where it does not."""

    name: str
    title: str
    what: str
    time: str
    over: bool
    instead: str = ""
    instead_fields: Fields = field(default_factory=dict)


def round_fields(found: Round, values: Fields) -> Fields:
    """The form's values in a round: what it sets, the rest as it is."""
    return {**values, **(found.i2v if values.get("kind") == "i2v" else found.t2v).fields()}


def _seconds(told: Outlook | None) -> float | None:
    """Predicted seconds of what fits."""
    return None if told is None or told.band == "no" else told.seconds


def round_tile(found: Round, values: Fields, outlook: Outlooks, words: Words) -> RoundTile:
    """A round for what the form holds: the steps that its weights take, and its predicted seconds against its
    budget."""
    fields = round_fields(found, values)

    def what(tried: Fields) -> str:
        size, told = tried.get("resolution") or tried.get("size"), outlook(tried)
        steps = words("meter.steps", n=told.steps if told else tried.get("steps"))
        return f"{short_model(str(tried['model']))} {size} · {steps}"

    took, budget = _seconds(outlook(fields)), words.seconds(found.budget_s)
    over = took is None or took > found.budget_s
    time = words("meter.no")
    if took is not None:
        time = words(f"round.{'over' if over else 'within'}", time=words.predicted(took), budget=budget)
    tile = RoundTile(found.name, words(f"round.{found.name}"), what(fields), time, over)
    spec = find_model(str(fields["model"]))
    for change in SHORTER if over and not spec.bundled else ():
        tried = {**fields, **change}
        fewer = int(str(tried.get("num_frames") or 0)) <= int(str(fields.get("num_frames") or 0))
        if tried == fields or not fewer or find_model(str(tried["model"])).kind != spec.kind:
            continue
        took = _seconds(outlook(tried))
        if took is not None and took <= found.budget_s:
            frames = words("unit.frames", n=tried.get("num_frames"))
            set_too = (found.i2v if fields.get("kind") == "i2v" else found.t2v).fields()
            instead = f"{what(tried)} · {frames} · {words.predicted(took)}"
            return replace(tile, instead=instead, instead_fields={**set_too, **change})
    return tile


def rounds_sum(rounds: Iterable[Round], values: Fields, outlook: Outlooks, words: Words) -> tuple[str, bool]:
    """What the three rounds take together, one after the other from what the form holds, against ten minutes; and
    whether that is too much, or a round does not run here."""
    total_s, runs, fields = 0.0, True, values
    for found in rounds:
        if found.name in THREE_ROUNDS:
            fields = round_fields(found, fields)
            took = _seconds(outlook(fields))
            total_s, runs = total_s + (took or 0.0), runs and took is not None
    over = total_s > TEN_MINUTES_S or not runs
    key = "sum_part" if not runs else "sum_over" if over else "sum_within"
    return words(f"round.{key}", time=words.predicted(total_s), budget=words.seconds(TEN_MINUTES_S)), over


def draw_rounds(tiles: list[RoundTile], total: tuple[str, bool], spec: ModelSpec, words: Words) -> Html:
    """Buttons that fill the form, each with its predicted seconds, their sum, and a note on what they change."""
    if not tiles:
        return Html("")
    buttons, instead = [], []
    for tile in tiles:
        time = el("span", tile.time, cls="over" if tile.over else "td-num")
        buttons.append(action("round", tile.name, el("b", tile.title), el("span", tile.what), time, form=True))
        if tile.instead:
            packed = json.dumps(tile.instead_fields, ensure_ascii=False)
            fill = action("fill", packed, tile.instead, form=True, cls="plain", data_round=tile.name)
            fits = el("span", words("round.fits", round=tile.title), cls="td-quiet")
            instead.append(el("div", fits, fill, cls="td-line"))
    about = words(f"round.{'demo_note' if spec.bundled else 'i2v_note' if spec.kind == 'i2v' else 'deliver_note'}")
    together = el("p", total[0], cls="td-small over" if total[1] else "td-small td-num", id="rounds-sum")
    return join(el("div", buttons, cls="td-rounds td-html"), together, instead, el("p", about, cls="td-quiet td-small"))
