"""The gallery: pages of posters over the whole library, what is chosen of them, the trash, and the clip beside them.

Drawn by hand: Gradio's Gallery holds pictures that it copies into its own folder, shows one at a time, and knows no
pages, no choice of several, no stars and no keys.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from webui.markup import Html, action, blank, el, poster, void
from webui.panels.meter import short_model
from webui.panels.stage import Card, draw_card, draw_player, media_url
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import Entry, Found

PER_PAGE = 60
SEEDS_COMPARED = 4


@dataclass(frozen=True)
class Tile:
    """A clip of the grid."""

    name: str
    prompt: str
    about: str
    tags: str
    poster: str
    starred: bool
    picked: bool
    shown: bool
    trashed: bool


@dataclass(frozen=True)
class Gallery:
    """One page of the gallery."""

    tiles: tuple[Tile, ...]
    total: int
    page: int  # from 0
    pages: int
    picked: int
    in_trash: bool
    searched: bool
    disk: str


def gallery(
    found: Found, page: int, picked: Collection[str], shown: str, searched: bool, now_s: float, words: Words
) -> Gallery:
    """What the gallery shows of an answer of the index; `searched`: not all clips were asked for."""
    sizes = {"n": f"{found.clips:,}", "size": words.gib(found.size_bytes)}
    disk = [words("gallery.disk", **sizes)]
    if found.trashed:
        disk.append(words("gallery.disk_trash", n=f"{found.trashed:,}", size=words.gib(found.trash_bytes)))
    disk += [words("gallery.reading")] if found.reading and not found.total else []
    tiles = []
    for clip in found.entries:
        parts = (
            clip.rating, short_model(clip.model) if clip.model else "?", f"{clip.width}x{clip.height}",
            "?" if clip.seed is None else str(clip.seed), words.ago(max(0, now_s - clip.created_s)),
        )  # fmt: skip
        source = media_url(clip.name, poster=True) if clip.poster and not clip.batch else ""
        about = " · ".join(filter(None, parts))
        tags = " ".join(f"#{tag}" for tag in clip.tags)
        state = (clip.starred, clip.name in picked, clip.name == shown, bool(clip.batch))
        tiles.append(Tile(clip.name, clip.prompt or clip.name, about, tags, source, *state))
    pages = max(1, math.ceil(found.total / PER_PAGE))
    in_trash = any(tile.trashed for tile in tiles)
    return Gallery(tuple(tiles), found.total, page, pages, len(picked), in_trash, searched, " · ".join(disk))


def draw(shown: Gallery, words: Words) -> Html:
    """The page of posters, below what can be done with those that are chosen."""
    head = el("div", el("span", shown.disk, cls="td-quiet td-num"), _draw_choice(shown, words), cls="td-toolbar")
    if not shown.tiles:
        none = blank(words("gallery.no_match")) if shown.searched else blank(words("clip.none"), words("clip.first"))
        return el("div", head, none, cls="td-html td-stack td-gallery")
    tiles = [_draw_tile(tile, words) for tile in shown.tiles]
    grid = el("div", tiles, cls="td-strip td-big-grid", role="group", aria_label=words("gallery.tab"))
    return el("div", head, grid, _draw_pages(shown, words), cls="td-html td-stack td-gallery", data_total=shown.total)


def _draw_tile(tile: Tile, words: Words) -> Html:
    """A poster that shows the clip, with a box that chooses it and a star."""
    open_it = "pick" if tile.trashed else "choose"
    picture = action(
        open_it, tile.name, poster(tile.poster), cls="pic bare", title=tile.prompt, aria_label=tile.prompt[:120]
    )
    box = action(
        "pick", tile.name, "✓", cls="td-check", aria_pressed=str(tile.picked).lower(),
        aria_label=words("gallery.pick"), title=words("gallery.pick_tip"), tabindex="-1",
    )  # fmt: skip
    star = action(
        "star", tile.name, "★", cls="td-star on" if tile.starred else "td-star",
        aria_pressed=str(tile.starred).lower(), aria_label=words("gallery.star"), title=words("gallery.star"),
        tabindex="-1",
    )  # fmt: skip
    state = " on" * tile.shown + " picked" * tile.picked
    tags = el("small", tile.tags, title=tile.tags) if tile.tags else None
    caption = (el("span", tile.prompt, cls="cap"), el("small", tile.about, title=tile.about), tags)
    corner = (box, None if tile.trashed else star)
    return el("div", el("div", picture, corner, cls="frame"), caption, cls=f"td-tile{state}", data_clip=tile.name)


def _draw_choice(shown: Gallery, words: Words) -> Html:
    """What can be done with the chosen clips; without a choice how to choose, or to empty the trash."""
    if not shown.picked:
        every = action("pick_all", "", words("gallery.pick_all", n=f"{shown.total:,}"), cls="plain")
        return el("span", every if shown.total else None, cls="td-acts end")
    number = el("b", words("gallery.picked", n=f"{shown.picked:,}"), cls="td-num")
    clear = action("pick_none", "", words("gallery.pick_none"), cls="plain")
    if shown.in_trash:
        ask = words("gallery.erase_ask", n=shown.picked)
        erase = action("erase", "", words("gallery.erase"), cls="danger", data_ask=ask)
        return el(
            "span", number, action("restore", "", words("gallery.restore"), cls="main"), erase, clear, cls="td-acts end"
        )
    field = void(
        "input", type="text", id="pick-tags", placeholder=words("gallery.tags"), aria_label=words("gallery.tags"),
        cls="td-input",
    )  # fmt: skip
    compare = action("versus", "", words("gallery.compare")) if 1 < shown.picked <= SEEDS_COMPARED else None
    buttons = (
        compare,
        action("star_all", "", "★", title=words("gallery.star"), aria_label=words("gallery.star")),
        field,
        action("tag_all", "", words("gallery.tag"), data_from="pick-tags"),
        action("trash", "", words("gallery.delete"), cls="danger"),
        clear,
    )
    return el("span", number, buttons, cls="td-acts end", role="group", aria_label=words("gallery.chosen"))


def _draw_pages(shown: Gallery, words: Words) -> Html | None:
    """Numbers of pages: the first, the last and those around this one."""
    if shown.pages < 2:
        return None
    near = {0, shown.pages - 1, *range(shown.page - 2, shown.page + 3)}
    parts: list[Html] = []
    for number in sorted(page for page in near if 0 <= page < shown.pages):
        if parts and number - 1 not in near:
            parts.append(el("span", "…", cls="td-quiet"))
        here = "page" if number == shown.page else None
        parts.append(action("page", number, number + 1, cls="on" if here else "plain", aria_current=here))
    before = action("page", shown.page - 1, "‹", aria_label=words("gallery.before"), id="page-before")
    after = action("page", shown.page + 1, "›", aria_label=words("gallery.after"), id="page-after")
    ends = (before if shown.page else None, after if shown.page + 1 < shown.pages else None)
    return el("nav", ends[0], parts, ends[1], cls="td-toolbar td-pages", aria_label=words("gallery.pages"))


def draw_side(card: Card | None, entry: Entry | None, comparing: bool, same: int, words: Words) -> Html:
    """The chosen clip with its card.

    Args:
        entry: the clip in the index, None while that does not know it yet.
        comparing: it is being compared.
        same: clips that differ from it in nothing but the seed, itself among them.
    """
    if card is None:
        return blank(words("gallery.side_none"))
    clip = card.clip.id
    missing = max(0, SEEDS_COMPARED - same)
    seeds = words("gallery.seeds_more", n=missing) if missing else words("gallery.seeds")
    starred = bool(entry and entry.starred)
    star = "★ " + words("gallery.starred") if starred else "☆ " + words("gallery.star")
    buttons = (
        action("stop_compare", "", words("gallery.stop"))
        if comparing
        else action("compare", clip, words("gallery.compare")),
        action("seeds", clip, seeds, title=words("gallery.seeds_tip")),
        action("star", clip, star, aria_pressed=str(starred).lower()),
        action("trash", clip, words("gallery.delete"), cls="danger"),
    )
    tags = el(
        "div",
        void(
            "input", type="text", id="tags-side", value=" ".join(entry.tags) if entry else "",
            placeholder=words("gallery.tags"), aria_label=words("gallery.tags"), cls="td-input",
        ),
        action("tags", clip, words("gallery.tags_save"), data_from="tags-side", cls="plain"),
        cls="td-line",
        data_clip=clip,
    )  # fmt: skip
    player = draw_player(card, "", words, autoplay=False)
    head = el("div", buttons, cls="td-acts")
    return el("div", player, head, tags, draw_card(card, words, "side"), cls="td-stack")


def draw_undo(sentence: str, batch: str, words: Words) -> Html:
    """What was deleted, with the button that brings it back."""
    undo = action("undo_trash", batch, words("gallery.undo"), id="undo")
    return el("div", sentence, " ", undo, cls="td-note", role="status")


def draw_tools(words: Words) -> Html:
    """The keys of the gallery, folded."""
    keys: Iterable[tuple[str, str]] = (
        ("← → ↑ ↓", "gallery.key_move"), ("Enter", "gallery.key_open"), ("x", "gallery.pick"),
        ("Shift", "gallery.key_range"), ("Ctrl A", "gallery.key_all"), ("1…5", "gallery.key_rate"),
        ("s", "gallery.star"), ("Del", "gallery.delete"), ("Ctrl Z", "gallery.undo"),
        ("PgUp PgDn", "gallery.pages"),
    )  # fmt: skip
    listed = [el("span", el("kbd", key), " ", words(sentence)) for key, sentence in keys]
    return el("details", el("summary", words("gallery.keys")), el("div", listed, cls="td-keys"), cls="td-html")
