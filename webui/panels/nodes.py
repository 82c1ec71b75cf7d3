"""The machines of a cluster on the System tab: their cards, who runs what, and which cannot be reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from turbodiff.spec.models import display_name_of
from turbodiff.spec.page_flags import TOKEN_FILE, TOKEN_MODE
from webui.markup import Html, el
from webui.panels.models import section
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio.cards import NodeDownload
    from webui.snapshot import Snapshot

LOOKS = {"ok": "good", "unreachable": "bad", "other_version": "warn", "same_cards": "warn", "unfit": "warn"}


@dataclass(frozen=True)
class NodeRow:
    """A machine: its name, how it is, what to say of that, and its cards with what each does."""

    name: str
    look: str
    state: str
    more: str
    cards: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Nodes:
    """A cluster: its address, whether it was joined, in words, and its machines."""

    joined: bool
    address: str
    about: str
    rows: tuple[NodeRow, ...]


def nodes(snapshot: Snapshot, words: Words) -> Nodes | None:
    """The cluster that the app works with, None for none."""
    cluster = snapshot.cluster
    if cluster is None:
        return None
    rows = []
    for node in cluster.nodes:
        cards = []
        for at, card in enumerate(node.cards):
            does = (
                words("system.card_runs", job=card.job) if card.job else words(f"system.{_use(node.state, card.ours)}")
            )
            cards.append((card.name or words("system.node_card", n=at + 1), does))
        cards += [download_row(one, words) for one in node.downloads if one.state != "done"]
        more = "" if node.state == "ok" else words(f"system.node_{node.state}_more", program=node.program)
        name, state = node.host or words("system.node_unnamed"), words(f"system.node_{node.state}")
        rows.append(NodeRow(name, LOOKS[node.state], state, more, tuple(cards)))
    about = words(f"system.cluster_{cluster.state}", address=cluster.address, file=TOKEN_FILE, mode=TOKEN_MODE)
    return Nodes(cluster.joined, cluster.address, about, tuple(rows))


def download_row(found: NodeDownload, words: Words) -> tuple[str, str]:
    """A download to a node: the model, and how far it is or why it failed."""
    key = "failed" if found.state == "failed" else "running" if found.state == "running" else "paused"
    why = words.error(found.error) if found.error else ""
    return display_name_of(found.model), words(f"system.node_download_{key}", share=f"{found.share:.0%}", why=why)


def _use(state: str, ours: bool) -> str:
    return "card_unknown" if state != "ok" else "idle" if ours else "card_unasked"


def draw_nodes(shown: Nodes | None, words: Words) -> Html | None:
    """Each machine with its cards; None without a cluster."""
    if shown is None:
        return None
    rows = []
    for node in shown.rows:
        pill = el("span", node.state, cls=f"td-pill {node.look}")
        rows.append(el("div", el("b", node.name), el("span", node.more, cls="what"), pill, data_node=node.name))
        rows += [el("div", el("span", name), el("span", does, cls="what"), cls="td-of") for name, does in node.cards]
    about = el("p", shown.about, cls="td-quiet") if shown.joined else el("div", shown.about, cls="td-note warn")
    none = (
        el("p", words("system.nodes_none", line=f"turbodiff cluster join {shown.address}"), cls="td-quiet")
        if shown.joined and not rows
        else None
    )
    return section(words("system.nodes"), (el("div", rows, cls="td-list", id="nodes") if rows else none, about))
