"""Two to four clips in sync: side by side, or two of them as one picture with an edge that wipes over it.

Drawn by hand: Gradio's ImageSlider compares two pictures, not clips, and its Video knows no other player.
"""

from collections.abc import Sequence

from webui.markup import Html, action, el, facts, local, void
from webui.panels.stage import Card, draw_video
from webui.wording import Words


def draw(cards: Sequence[Card], wipe: bool, words: Words) -> Html:
    """The clips; nothing without any, and a hint while there is but one. `wipe` counts where there are two."""
    by_id = {card.clip.id: card for card in cards}
    if not by_id:
        return Html("")
    shown = list(by_id.values())
    if len(shown) == 1:
        hint = words("gallery.compare_hint", clip=shown[0].clip.request.prompt[:60])
        stop = action("stop_compare", "", words("gallery.stop"), cls="plain")
        return el("p", hint, " ", stop, cls="td-note calm")
    wipe = wipe and len(shown) == 2
    if wipe:
        left, right = map(_draw_video, shown)
        edge = void("input", type="range", min=0, max=100, value=50, cls="edge", aria_label=words("gallery.edge"))
        players = el("div", left, el("div", right, cls="over"), el("i", cls="line"), edge, cls="td-player td-wipe")
        under = [el("div", el("h3", card.clip.request.prompt), facts(card.facts), cls="td-side") for card in shown]
        body = el("div", players, el("div", under, cls="td-two"), cls="td-stack")
    else:
        sides = []
        for card in shown:
            player = el("div", _draw_video(card), cls="td-player")
            sides.append(el("div", player, el("h3", card.clip.request.prompt), facts(card.facts)))
        body = el("div", sides, cls="td-two td-of-4" if len(shown) > 2 else "td-two")
    switch = action("wipe", "" if wipe else "1", words("gallery.beside" if wipe else "gallery.wipe"))
    buttons = (
        local("play", "", words("gallery.play")),
        local("pause", "", words("gallery.pause")),
        switch if len(shown) == 2 else None,
        action("stop_compare", "", words("gallery.stop"), cls="plain"),
    )
    # above the players: what stands below them is off the screen where the picture is large
    return el("div", el("div", buttons, cls="td-acts", style="margin-bottom:14px"), body, cls="td-html")


def _draw_video(card: Card) -> Html:
    """A player of the comparison: static/page.js keeps them together, also where one is shorter than the others."""
    return draw_video(card.clip, loop=False, cls="sync", aria_label=card.clip.request.prompt[:120])
