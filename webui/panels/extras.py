"""Small things around the form: example prompts, lint chips, the expert strip, the fitted size, one-line notes."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from turbodiff.spec.models import ModelSpec
from webui.markup import Html, action, each, el, join, void
from webui.view.meter import Diff
from webui.view.picture import Picture
from webui.view.prompt import PromptChip, PromptHelp
from webui.view.rounds import RoundTile
from webui.wording import Words

# boundaries between which 3 and 4 steps are shared out alike (spec/experts.py, rCM schedule)
SAME_FROM, SAME_TO = 0.853, 0.933
DEMO_EXAMPLES = ("demo_1", "demo_2", "demo_3")
EXAMPLES = ("astronaut", "samurai", "cat", "neon")


def draw_examples(spec: ModelSpec, words: Words) -> Html:
    """Prompts to start from: shapes for the demo, the guide's for Wan."""
    keys = DEMO_EXAMPLES if spec.bundled else EXAMPLES
    buttons = each(_example(words(f"example.{key}")) for key in keys)
    tip = (
        el("p", words("create.demo_tip"), cls="td-quiet", style="margin:10px 0 0;font-size:12.5px")
        if spec.bundled
        else None
    )
    return join(el("div", buttons, cls="td-examples"), tip)


def _example(prompt: str) -> Html:
    return action("example", prompt, prompt, form=True, title=prompt)


def draw_lint(help_: PromptHelp, words: Words) -> Html:
    """Advice as chips, one click where a rewrite can do it, and the token count."""
    chips = each(_chip(chip) for chip in help_.chips)
    tip = _turbo_tip(words) if help_.chinese else None
    count = (
        el("span", help_.tokens, cls="td-quiet td-num", style="font-size:12px;margin-left:auto")
        if help_.tokens
        else None
    )
    return join(el("div", chips, count, cls="td-chips") if chips or count else None, tip)


def _chip(chip: PromptChip) -> Html:
    if not chip.rewrite:
        return el("span", chip.sentence, cls="td-chip", title=chip.tip, data_key=chip.key)
    return el(
        "button",
        chip.sentence,
        type="button",
        cls="td-chip",
        title=chip.tip,
        data_key=chip.key,
        data_form="example",
        data_arg=chip.rewrite,
    )


def _turbo_tip(words: Words) -> Html:
    button = el("button", words("create.got_it"), type="button", cls="td-btn plain", data_do="gotit")
    return el("div", words("create.tip_turbo"), " ", button, cls="td-note once", style="margin-top:8px")


def draw_experts(letters: str, values: Mapping[str, Any], words: Words) -> Html:
    """Which expert runs which step ("HHLL", as the plan says), and a word where the low-noise one never does."""
    if not letters:
        return Html("")
    steps, boundary = len(letters), float(values.get("boundary") or 0.9)
    boxes = each(
        el(
            "b",
            f"{i}{letter}",
            cls="low" if letter == "L" else "",
            title=words("create.experts_low" if letter == "L" else "create.experts_high"),
        )
        for i, letter in enumerate(letters, 1)
    )
    legend = f"H {words('create.experts_high')} · L {words('create.experts_low')}"
    warning = (
        None if "L" in letters else el("div", words("create.experts_one"), cls="td-note warn", style="margin-top:8px")
    )
    same = steps in (3, 4) and SAME_FROM < boundary < SAME_TO
    note = el("p", words("create.experts_same"), cls="td-quiet td-small") if same else None
    return join(el("div", boxes, el("span", legend), cls="td-experts", data_letters=letters), warning, note)


def draw_picture(shown: Picture) -> Html:
    """The fitted picture, and what it proposes with the reason and one button."""
    if shown.problem:
        return draw_note(shown.problem, "warn")
    image = void("img", src=shown.preview, alt=shown.caption, cls="td-fitted")
    button = action("fill", shown.take, shown.proposal, form=True) if shown.take else None
    advice = el("div", el("span", shown.reason), button, cls="td-note td-line", id="advice") if shown.reason else None
    return join(el("figure", image, el("figcaption", shown.caption, cls="td-quiet"), cls="td-figure td-html"), advice)


def draw_loras(files: Iterable[Any], chosen: list[dict[str, Any]], two_experts: bool, words: Words) -> Html:
    """One row per LoRA on this disk: on or off, strength, and for two experts which of them; nothing without files."""
    worn = {row["name"]: row for row in chosen}
    rows = each(_lora(file.name, worn.get(file.name), two_experts, words) for file in files)
    if not rows:
        return Html("")
    label, info = el("span", words("field.loras"), cls="td-label"), el("span", words("field.loras_info"), cls="td-info")
    return el("div", label, info, el("div", rows, cls="td-list"), cls="td-html", id="lora-list")


def _lora(name: str, row: dict[str, Any] | None, two_experts: bool, words: Words) -> Html:
    on = el("label", _input("on", name, type="checkbox", checked=row is not None), el("span", name, cls="what"))
    strength = _input(
        "strength", name, type="number", min="-4", max="4", step="0.05", value=f"{row['strength']:g}" if row else "1"
    )
    options = each(
        el("option", words(f"field.lora_{who}"), value=who, selected=row is not None and row["expert"] == who)
        for who in ("both", "high", "low")
    )
    which = el("select", options, aria_label=words("field.lora_expert"), cls="td-input", **_says("expert", name))
    return el("div", on, *((strength, which if two_experts else None) if row else ()), data_lora=name)


def _input(key: str, name: str, **attributes: Any) -> Html:
    return void(
        "input", aria_label=f"{name} {key}" if key != "on" else name, cls="td-input", **_says(key, name), **attributes
    )


def _says(key: str, name: str) -> dict[str, Any]:
    """What page.js sends when the field changes."""
    return {"data_change": "lora", "data_name": name, "data_key": key}


def draw_ask(diffs: Iterable[Diff], words: Words) -> Html:
    """The question before a run that was lowered: what changes, and both ways on."""
    rows = each(el("div", f"{row.label}: ", el("del", row.before), " → ", el("ins", row.after)) for row in diffs)
    yes = el("button", words("settings.ask_yes"), type="button", cls="td-btn main", data_do="press", data_arg="go")
    no = el("button", words("create.anyway"), type="button", cls="td-btn", data_do="press", data_arg="anyway")
    body = join(el("b", words("settings.ask_question")), rows, el("div", yes, no, cls="td-acts"))
    return el("div", body, cls="td-note td-diff td-html", role="alertdialog", id="ask")


def draw_note(sentence: str, kind: str = "") -> Html:
    """One sentence in a coloured box."""
    return el("div", sentence, cls=f"td-note {kind}".strip(), role="status") if sentence else Html("")


def draw_loaded(words: Words) -> Html:
    """That a video's settings are in the form, and the way there."""
    button = el("button", words("create.tab"), type="button", cls="td-btn plain", data_do="tab", data_arg="0")
    return draw_note(join(words("gallery.loaded"), " ", button), "good")


def draw_log_tools(words: Words) -> Html:
    """Level filter and copy, all in the browser."""
    levels = each(
        el(
            "button",
            words(f"log.{name}"),
            type="button",
            cls="td-btn on" if name == "all" else "td-btn",
            data_do="level",
            data_arg=name,
        )
        for name in ("all", "warnings", "errors")
    )
    copy = el("button", words("log.copy"), type="button", cls="td-btn plain", data_do="copylog")
    bundle = el(
        "a",
        words("log.bundle"),
        href="/support.zip",
        download=True,
        cls="td-btn plain",
        title=words("log.bundle_tip"),
        style="text-decoration:none",
    )
    note = el("span", words("log.run_log", name="webui_test.log"), cls="td-quiet")
    return el("div", levels, copy, bundle, note, cls="td-toolbar td-html")


def draw_export(words: Words) -> Html:
    """The link that saves the archive as a Markdown table."""
    return el(
        "a", words("seeds.export"), href="/seeds.md", download="seeds.md", cls="td-btn", style="text-decoration:none"
    )


def draw_rounds(tiles: list[RoundTile], note: str, words: Words) -> Html:
    """Buttons that fill the form, each with its predicted seconds against its budget; `note` names what they change."""
    if not tiles:
        return Html("")
    buttons = each(
        action(
            "round",
            tile.name,
            el("b", tile.title),
            el("span", tile.what),
            el("span", tile.time, cls="over" if tile.over else "td-num"),
            form=True,
        )
        for tile in tiles
    )
    instead = each(
        el("div", el("span", words("round.fits", round=tile.title), cls="td-quiet"), _instead(tile), cls="td-line")
        for tile in tiles
        if tile.instead
    )
    return join(el("div", buttons, cls="td-rounds td-html"), instead, el("p", note, cls="td-quiet td-small"))


def _instead(tile: RoundTile) -> Html:
    packed = json.dumps(dict(tile.instead_fields), ensure_ascii=False)
    return action("fill", packed, tile.instead, form=True, cls="plain", data_round=tile.name)
