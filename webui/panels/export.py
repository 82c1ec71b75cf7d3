"""Export of the clip that the gallery shows: what to make of it, and how the last exports are doing.

Drawn by hand: Gradio has no range with two handles, and one for each clip would need its length beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import quote

from turbodiff.spec.exports import FORMATS, RATES, SCALES
from webui.markup import Html, download, el, link, void
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import Exporting
    from webui.snapshot import ClipView

QUALITIES = (("best", 95), ("good", 80), ("small", 50))


def export_url(name: str) -> str:
    """Where our own route serves a finished export."""
    return link(f"/exports/{quote(name)}")


def draw_form(clip: ClipView | None, words: Words) -> Html:
    """Format, quality, frames per second and the two handles of a clip."""
    if clip is None:
        return Html("")
    length_s = clip.sidecar.whole_frames / max(1, clip.request.fps)
    step = round(1 / max(1, clip.request.fps), 6)
    chosen = (
        ("format", [(name, words(f"export.format_{name}")) for name in FORMATS], "gif"),
        ("quality", [(value, words(f"export.quality_{name}")) for name, value in QUALITIES], 80),
        ("fps", [(rate, words("export.rate", n=rate) if rate else words("export.rate_same")) for rate in RATES], 0),
        ("upscale", [(n, f"{n} ×" if n > 1 else words("export.rate_same")) for n in SCALES], 1),
    )
    fields = []
    for name, options, first in chosen:
        listed = [el("option", said, value=value, selected=value == first) for value, said in options]
        field = el("select", listed, name=name, cls="td-input", aria_label=words(f"export.{name}"))
        fields.append(el("label", el("span", words(f"export.{name}"), cls="td-info"), field))
    handles = [
        void(
            "input", type="range", name=name, min=0, max=f"{length_s:.6f}", step=step, value=value,
            aria_label=words(f"export.{name}"), data_handle=True,
        )
        for name, value in (("start_s", "0"), ("end_s", f"{length_s:.6f}"))
    ]  # fmt: skip
    said = el("output", f"0.00 – {length_s:.2f} s", cls="td-num td-quiet", data_from="0")
    trim = el("div", el("span", words("export.trim"), cls="td-info"), el("div", handles, cls="td-range"), said)
    go = el(
        "button", words("export.go"), type="button", cls="td-btn main", data_act="export", data_gather="export-box",
        data_arg=clip.id,
    )  # fmt: skip
    box = el("div", el("div", fields, cls="td-fields"), trim, el("div", go, cls="td-acts"), id="export-box")
    return el(
        "details", el("summary", words("export.title")), box, cls="td-card td-html", id="export", data_clip=clip.id
    )


def draw_exports(found: Iterable[Exporting], words: Words) -> Html:
    """The last exports: how far, why not, or the file."""
    rows = []
    for one in found:
        ending = f"{one.name.partition('.')[0][:40]}… .{one.name.split('.', 2)[-1]}"
        match one.state:
            case "done":
                label = words("export.save", size=words.gib(one.size_bytes))
                shown: object = download(export_url(one.name), label, cls="td-btn")
            case "running":
                shown = el("span", words("export.running", n=int(100 * one.share)), cls="td-num", role="status")
            case _:
                said = words.error(one.error) if one.error else words("export.broken")
                shown = el("span", said, cls="td-pill bad", role="status")
        rows.append(el("div", el("span", ending, cls="what", title=one.name), shown, data_state=one.state))
    return el("div", rows, cls="td-list td-html", id="export-list") if rows else Html("")
