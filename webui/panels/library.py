"""Gallery, compare and seed archive as markup."""

from webui.markup import Html, action, each, el, join, void
from webui.view.clips import Card
from webui.view.seeds import COLUMNS, SeedRow
from webui.wording import Words


def draw_seeds(rows: list[SeedRow], searched: bool, words: Words) -> Html:
    """The archive as a table, the guide's columns in the guide's order."""
    if not rows:
        return el("div", words("seeds.no_match" if searched else "seeds.none"), cls="td-blank")
    head = el("tr", el("th", ""), *(el("th", words(f"seeds.{name}")) for name in COLUMNS), el("th", ""))
    table = el("table", head, each(_row(row, words) for row in rows), cls="td-table")
    return el("div", table, cls="td-scroll td-html", data_rows=len(rows))


def _row(row: SeedRow, words: Words) -> Html:
    poster = void("img", src=row.poster, alt="", loading="lazy", cls="td-mini") if row.poster else None
    cells = each(
        el("td", cell, cls="td-num" if name == "seed" else "") for name, cell in zip(COLUMNS, row.cells, strict=True)
    )
    use = action("use_seed", row.row, words("seeds.use"), form=True, cls="plain")
    return el("tr", el("td", poster), cells, el("td", use))


def draw_compare(left: Card | None, right: Card | None, words: Words) -> Html:
    """Two clips side by side; one button plays both from their start."""
    if left is None or right is None:
        return el("p", words("gallery.compare_hint"), cls="td-quiet")
    button = el("button", words("gallery.play"), type="button", cls="td-btn", data_do="play")
    sides = join(_side(left), _side(right))
    return el(
        "div", el("div", sides, cls="td-two"), el("div", button, cls="td-acts", style="margin-top:14px"), cls="td-html"
    )


def _side(card: Card) -> Html:
    video = el(
        "video", src=card.video, poster=card.poster, controls=True, loop=True, muted=True, playsinline=True, cls="sync"
    )
    facts = each(join(el("dt", name), el("dd", value, cls="td-num")) for name, value in card.facts)
    return el("div", el("div", video, cls="td-player"), el("h3", card.prompt), el("dl", facts, cls="td-facts"))
