"""How well predictions came true: the newest clips' seconds and peaks, measured against what their plans said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from webui.markup import Html, el
from webui.panels.models import section
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import ClipView

NEWEST = 50  # clips


@dataclass(frozen=True)
class Accuracy:
    """Measured over predicted of one quantity, 1.0 for a prediction that came true.

    Args:
        what: "time" or "memory".
        clips: how many clips tell.
        ratios: the least, the median and the greatest.
        typical: the median distance from the prediction, a share of it.
    """

    what: str
    clips: int
    ratios: tuple[float, float, float]
    typical: float


def accuracy(clips: Iterable[ClipView]) -> Iterator[Accuracy]:
    """Of the newest clips, the newest first; nothing of a quantity that none of them tells both ways."""
    pairs: dict[str, list[float]] = {"time": [], "memory": []}
    for clip in list(clips)[:NEWEST]:
        plan, measured = clip.sidecar.plan, clip.sidecar.measured
        if plan and plan.seconds > 0 and measured.seconds:
            pairs["time"].append(measured.seconds / plan.seconds)
        if plan and plan.peak_bytes > 0 and measured.peak_bytes:
            pairs["memory"].append(measured.device_bytes / plan.peak_bytes)
    for what, ratios in pairs.items():
        if ratios:
            shown = (min(ratios), median(ratios), max(ratios))
            yield Accuracy(what, len(ratios), shown, median(abs(ratio - 1) for ratio in ratios))


def draw_accuracy(rows: Iterable[Accuracy], words: Words) -> Html | None:
    """The section of the System tab; None before the first clip."""
    heads = ("", "clips", "least", "middle", "most", "typical")
    head = el("tr", [el("th", words(f"accuracy.{name}") if name else "") for name in heads])
    drawn = []
    for row in rows:
        numbers = [el("td", f"{ratio:.2f}x", cls="td-num") for ratio in row.ratios]
        typical = el("td", f"{row.typical:.0%}", cls="td-num")
        name = el("td", words(f"accuracy.{row.what}"))
        drawn.append(el("tr", name, el("td", row.clips, cls="td-num"), numbers, typical))
    if not drawn:
        return None
    table = el("div", el("table", head, drawn, cls="td-table"), cls="td-scroll", id="accuracy")
    return section(words("accuracy.title"), (table, el("p", words("accuracy.text", n=NEWEST), cls="td-quiet")))
