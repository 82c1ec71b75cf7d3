"""The status bar: card, memory (ours, others, unaccounted), RAM, queue, leftover workers."""

from dataclasses import dataclass
from typing import Any

from webui.view import Snapshot
from webui.wording import Words

OURS = ("worker", "leftover")
PRETENDED = "pretended card of "


@dataclass(frozen=True)
class Segment:
    """A part of a gauge; `share` is a fraction of the whole."""

    kind: str  # ours | others | unknown
    share: float
    title: str


@dataclass(frozen=True)
class Gauge:
    """A labelled bar."""

    label: str
    text: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Bar:
    """What the status bar says."""

    card: str
    card_note: str
    gauges: tuple[Gauge, ...]
    queue: str
    busy: bool
    leftovers: tuple[tuple[int, str], ...]  # pid, sentence
    restarted: str = ""


def status_bar(snapshot: Snapshot, words: Words) -> Bar:
    """The bar for this snapshot; unknown numbers are left out, never shown as 0."""
    machine = snapshot.machine
    card, note = _card(machine, words)
    gauges = [gauge for gauge in (_memory(snapshot, words), _ram(machine, words)) if gauge]
    running, waiting = snapshot.active, len(snapshot.waiting)
    if snapshot.paused:
        queue = words("bar.paused", n=waiting)
    elif running:
        queue = words("bar.running", n=waiting)
    else:
        queue = words("bar.waiting", n=waiting) if waiting else words("bar.idle")
    left = tuple(
        (left.pid, words("bar.leftover", memory=_held_by(left.pid, snapshot, words))) for left in snapshot.leftovers
    )
    return Bar(card, note, tuple(gauges), queue, running is not None, left, _restarted(snapshot, words))


def _restarted(snapshot: Snapshot, words: Words) -> str:
    outcome = snapshot.restarted
    if outcome is None:
        return ""
    if not outcome.get("ok"):
        return words("bar.restart_failed")
    freed = outcome.get("freed_bytes")
    return words("bar.freed", memory=words.gib(freed)) if freed is not None else words("bar.restarted")


def _card(machine: Any, words: Words) -> tuple[str, str]:
    if machine is None:
        return words("bar.looking"), ""
    if machine.gpus:
        gpu = machine.gpus[0]
        size = words.gib(gpu.total_bytes) if gpu.total_bytes else words("bar.size_unknown")
        more = words("bar.more_cards", n=len(machine.gpus) - 1) if len(machine.gpus) > 1 else ""
        return card_name(gpu.name, words), " · ".join(part for part in (size, more, gpu.uuid[:12]) if part)
    state = getattr(machine, "gpu_state", "none")
    note = words("bar.cpu_note") if state == "none" else words.or_else(f"bar.gpu_{state}", state)
    return words("bar.no_gpu"), note


def card_name(name: str, words: Words) -> str:
    """A card by its own name; a pretended one (turbodiff/plan/hardware.py) in the page's language."""
    size = name.removeprefix(PRETENDED)
    return words("bar.pretended", size=size) if size != name else name


def _memory(snapshot: Snapshot, words: Words) -> Gauge | None:
    machine: Any = snapshot.machine
    if machine is None or not machine.gpus or not machine.gpus[0].total_bytes:
        return None
    gpu, total = machine.gpus[0], machine.gpus[0].total_bytes
    used = gpu.used_bytes if gpu.used_bytes is not None else total - (gpu.free_bytes or 0)
    rows = [row for card in snapshot.holders if card.uuid == gpu.uuid for row in card.rows]
    ours = sum(row.bytes or 0 for row in rows if row.kind in OURS) or min(used, gpu.reclaimable_bytes)
    others = sum(row.bytes or 0 for row in rows if row.kind not in (*OURS, "unaccounted"))
    ours, others = min(ours, used), min(others, max(0, used - ours))
    parts = (("ours", ours), ("others", others), ("unknown", used - ours - others))
    segments = tuple(
        Segment(kind, size / total, words(f"bar.{kind}", memory=words.gib(size))) for kind, size in parts if size
    )
    return Gauge(words("bar.vram"), f"{words.gib(used)} / {words.gib(total)}", segments)


def _ram(machine: Any, words: Words) -> Gauge | None:
    if machine is None or not machine.ram_total_bytes or machine.ram_available_bytes is None:
        return None
    used = machine.ram_total_bytes - machine.ram_available_bytes
    share = used / machine.ram_total_bytes
    segment = Segment("others", share, words("bar.ram_free", memory=words.gib(machine.ram_available_bytes)))
    return Gauge(words("bar.ram"), f"{words.gib(used)} / {words.gib(machine.ram_total_bytes)}", (segment,))


def _held_by(pid: int, snapshot: Snapshot, words: Words) -> str:
    found = [row.bytes for card in snapshot.holders for row in card.rows if row.pid == pid and row.bytes]
    return words.gib(sum(found)) if found else words("bar.size_unknown")
