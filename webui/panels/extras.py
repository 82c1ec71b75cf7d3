"""Small things around the form: example prompts, lint chips, the expert strip, the fitted size, one-line notes."""

from collections.abc import Mapping
from typing import Any

from turbodiff.spec.models import ModelSpec
from turbodiff.spec.plan import Plan
from webui import form
from webui.markup import Html, action, each, el, join
from webui.view.prompt import PromptChip, PromptHelp
from webui.view.rounds import RoundTile
from webui.wording import Words

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


def draw_experts(values: Mapping[str, Any], words: Words) -> Html:
    """Which expert runs which step, and a word where the low-noise one never does."""
    steps, boundary = int(values.get("steps") or 4), float(values.get("boundary") or 0.9)
    letters = form.schedule_letters(steps, boundary, float(values.get("sigma_max") or 200))
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
    return join(el("div", boxes, el("span", legend), cls="td-experts", data_letters=letters), warning)


def draw_fitted(plan: Plan, words: Words) -> Html:
    """The pixels that a picture will run at."""
    request = plan.request
    return el(
        "span",
        words("create.image_fit", width=request.width, height=request.height, resolution=request.resolution),
        cls="td-quiet",
    )


def draw_note(sentence: str, kind: str = "") -> Html:
    """One sentence in a coloured box."""
    return el("div", sentence, cls=f"td-note {kind}".strip(), role="status") if sentence else Html("")


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


def draw_rounds(tiles: list[RoundTile], words: Words) -> Html:
    """Three buttons that fill the form, each with its predicted seconds against its budget."""
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
    note = el("p", words("round.deliver_note"), cls="td-quiet", style="margin:8px 0 0;font-size:12px")
    return join(el("div", buttons, cls="td-rounds td-html"), note)
