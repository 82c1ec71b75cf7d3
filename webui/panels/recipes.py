"""Below the form: prompts that were used, and named presets of all fields."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from webui.markup import Html, action, download, el, link, void
from webui.panels.stage import DIFF_TAGS, prompt_diff
from webui.wording import Words


def draw_longer(before: str, after: str, words: Words) -> Html:
    """A prompt that was written at length, what changed, and buttons that take it or go back to the person's own."""
    pieces = [el(DIFF_TAGS[word.how], word.text) if word.how in DIFF_TAGS else word.text
              for word in prompt_diff(before, after)]  # fmt: skip
    use = action("example", after, words("longer.use"), form=True, cls="main")
    back = action("example", before, words("longer.back"), form=True)
    shown = el("div", pieces or words("longer.same"), cls="td-diff td-words")
    return el("div", el("b", words("longer.title")), shown, el("div", use, back, cls="td-acts"), cls="td-card td-html")


def draw_undo(words: Words) -> Html:
    """A button that brings back what the form held before it was filled; once more, and the filled form is back."""
    return el("div", action("undo", "", words("longer.undo"), form=True, cls="plain"), cls="td-html td-acts")


def draw_prompts(found: Iterable[str], searched: bool, words: Words) -> Html:
    """The history as buttons that fill the prompt."""
    rows = [
        el("div", action("example", text, text, form=True, cls="plain what", title=text, aria_label=text[:120]))
        for text in found
    ]
    blank = words("recipes.no_match" if searched else "recipes.no_prompts")
    return el("div", rows or el("div", blank), cls="td-list td-html", id="prompt-list")


def draw_presets(presets: Mapping[str, object], wildcards: Mapping[str, object], folder: Path, words: Words) -> Html:
    """Presets to apply, save, delete and export; which lists of wildcards there are."""
    hint = words("recipes.name")
    field = void(
        "input", type="text", id="preset-name", placeholder=hint, aria_label=hint, cls="td-input", maxlength=60
    )
    save = action("save_preset", "", words("recipes.save"), form=True, data_from="preset-name")
    rows = [
        el(
            "div",
            el("span", name, cls="what"),
            action("preset", name, words("recipes.apply"), form=True),
            action(
                "delete_preset", name, words("recipes.delete"), cls="plain", data_ask=words("recipes.ask", name=name)
            ),
            data_preset=name,
        )
        for name in presets
    ]
    export = download(link("/presets.json"), words("recipes.export"), download="turbodiff-presets.json")
    lists = ", ".join(f"__{name}__" for name in wildcards)
    about = words("recipes.wildcards", lists=lists) if lists else words("recipes.no_wildcards", folder=folder)
    return el(
        "div",
        el("div", field, save, cls="td-line"),
        el("div", rows, cls="td-list") if rows else None,
        el("div", export, cls="td-acts") if rows else None,
        el("p", about, cls="td-info"),
        cls="td-html td-gallery",
    )
