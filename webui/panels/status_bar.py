"""The status bar on every tab: card, memory (ours, others, unaccounted), RAM, queue, leftover workers, and buttons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turbodiff.spec.jobs import Recovered
from turbodiff.spec.numbers import GIB
from webui.markup import Html, action, el, join, local
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import GpuFacts, Machine
    from webui.snapshot import Snapshot

RESTART = "重启应用"  # literal in both languages
OTHER_LANGUAGE = {"en": "zh", "zh": "en"}
KEYS = (("Ctrl+Enter", "bar.help_go"), ("/", "bar.help_prompt"), ("?", "bar.help_keys"))
OURS = ("worker", "leftover")


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
class StatusBar:
    """What the status bar says."""

    card: str
    card_note: str
    gauges: tuple[Gauge, ...]
    queue: str
    busy: bool
    leftovers: tuple[tuple[int, str], ...]  # pid, sentence
    restarted: str = ""  # what the last restart brought back
    recovered: str = ""  # what the last start brought back of the queue


def status_bar(snapshot: Snapshot, words: Words) -> StatusBar:
    """The bar for this snapshot; unknown numbers are left out, never shown as 0."""
    card, note = _card(snapshot.machine, words)
    waiting = max(snapshot.queued, len(snapshot.waiting))
    busy = snapshot.active is not None
    running = "running" if waiting else "running_last"
    queue = "paused" if snapshot.paused else running if busy else "waiting" if waiting else "idle"
    queue = "held" if queue in ("waiting", "idle") and snapshot.held_until_s else queue
    leftovers = []
    for left in snapshot.leftovers:
        held_bytes = sum(row.bytes or 0 for row in snapshot.holder_rows() if row.pid == left.pid)
        memory = words.gib(held_bytes) if held_bytes else words("bar.size_unknown")
        leftovers.append((left.pid, words("bar.leftover", memory=memory)))
    restarted, outcome = "", snapshot.restarted
    if outcome is not None:
        freed = outcome.freed_bytes
        came_back = words("bar.freed", memory=words.gib(freed)) if isinstance(freed, int) else words("bar.restarted")
        restarted = came_back if outcome.ok else words("bar.restart_failed")
        restarted = " ".join([restarted, *words.fates(outcome.jobs)])
    mended = snapshot.recovered
    return StatusBar(
        card,
        note,
        tuple(_gauges(snapshot, words)),
        words(f"bar.{queue}", n=waiting, time=words.clock(snapshot.held_until_s)),
        busy,
        tuple(leftovers),
        restarted,
        _mended(mended, words) if mended else "",
    )


def _mended(mended: Recovered, words: Words) -> str:
    """What the last start brought back, and why it had to."""
    numbers = mended.model_dump()
    lost = [words("bar.folder_lost")] if mended.folder_lost else []
    return " ".join([*lost, words("bar.recovered", **numbers)] if any({**numbers, "folder_lost": 0}.values()) else lost)


def card_name(gpu: GpuFacts, machine: Machine, words: Words) -> str:
    """A card by its own name; one that is only pretended (no id) by its size."""
    if machine.pretended and not gpu.uuid and gpu.total_bytes:
        return words("bar.pretended", size=f"{gpu.total_bytes / GIB:g} GiB")
    return gpu.name


def _card(machine: Machine | None, words: Words) -> tuple[str, str]:
    """The first card's name, and a line about it."""
    if machine is None:
        return words("bar.looking"), ""
    if machine.gpus:
        gpu = machine.gpus[0]
        size = words.gib(gpu.total_bytes) if gpu.total_bytes else words("bar.size_unknown")
        more = words("bar.more_cards", n=len(machine.gpus) - 1) if len(machine.gpus) > 1 else ""
        return card_name(gpu, machine, words), " · ".join(filter(None, (size, more, gpu.uuid[:12])))
    state = machine.gpu_state
    return words("bar.no_gpu"), words("bar.cpu_note") if state == "none" else words.or_else(f"bar.gpu_{state}", state)


def _gauges(snapshot: Snapshot, words: Words) -> Iterable[Gauge]:
    """Memory of the first card and of the machine, where they are known."""
    machine = snapshot.machine
    if machine is None:
        return
    if machine.gpus and machine.gpus[0].total_bytes:
        gpu, total = machine.gpus[0], machine.gpus[0].total_bytes
        used = gpu.used_bytes if gpu.used_bytes is not None else total - (gpu.free_bytes or 0)
        rows = list(snapshot.holder_rows(gpu.uuid))
        ours = sum(row.bytes or 0 for row in rows if row.kind in OURS) or min(used, gpu.reclaimable_bytes)
        others = sum(row.bytes or 0 for row in rows if row.kind not in (*OURS, "unaccounted"))
        ours, others = min(ours, used), min(others, max(0, used - ours))
        parts = (("ours", ours), ("others", others), ("unknown", used - ours - others))
        segments = [
            Segment(kind, size / total, words(f"bar.{kind}", memory=words.gib(size))) for kind, size in parts if size
        ]
        yield Gauge(words("bar.vram"), f"{words.gib(used)} / {words.gib(total)}", tuple(segments))
    total_ram, free = machine.ram_total_bytes, machine.ram_available_bytes
    if total_ram and free is not None:
        title = words("bar.ram_free", memory=words.gib(free))
        segment = Segment("others", (total_ram - free) / total_ram, title)
        yield Gauge(words("bar.ram"), f"{words.gib(total_ram - free)} / {words.gib(total_ram)}", (segment,))


def draw(bar: StatusBar, words: Words) -> Html:
    """The bar as markup."""
    pill = "td-pill accent" if bar.busy else "td-pill"
    leftovers = [
        el("span", sentence, action("end_leftover", pid, words("bar.end_leftover"), cls="plain"), cls="td-pill warn")
        for pid, sentence in bar.leftovers
    ]
    gauges = []
    for gauge in bar.gauges:
        parts, titles = gauge.segments, " · ".join(part.title for part in gauge.segments)
        spans = [el("span", cls=part.kind, style=f"width:{part.share:.1%}", title=part.title) for part in parts]
        row = el("div", el("span", gauge.label), el("b", gauge.text, cls="td-num"), cls="row")
        gauges.append(el("div", row, el("div", spans, cls="td-track"), cls="td-gauge", title=titles))
    other = "中文" if words.lang == "en" else "EN"
    buttons = join(
        _plain("aid", "", words("bar.firstaid"), words("bar.firstaid_tip")),
        action("restart", "", RESTART, title=words("bar.restart_tip"), data_ask=words("bar.restart_ask")),
        _plain("lang", OTHER_LANGUAGE[words.lang], other, words("bar.lang_tip")),
        _plain("theme", "", el("span", "◐", aria_hidden="true"), words("bar.theme_tip")),
        _plain("help", "", el("span", "?", aria_hidden="true"), words("bar.help_tip")),
    )
    return el(
        "div",
        el("h1", "turbo", el("i", "diff"), cls="name"),
        el("div", bar.card, el("small", bar.card_note), cls="card"),
        gauges,
        el("span", el("span", cls="td-dot"), bar.queue, cls=pill, role="status"),
        el("span", bar.restarted, cls="td-pill good", role="status") if bar.restarted else None,
        el("span", bar.recovered, cls="td-pill warn", role="status") if bar.recovered else None,
        leftovers,
        el("div", buttons, cls="end"),
        cls="td-bar",
    )


def _plain(name: str, argument: str, label: str | Html, tip: str) -> Html:
    """A quiet button; its tip is also its name where its label is only a glyph."""
    named = tip if isinstance(label, Html) else None
    return local(name, argument, label, cls="plain", title=tip, aria_label=named)


def draw_help(words: Words) -> Html:
    """The list of keys, hidden until asked for, and the few words that page.js needs."""
    listed = [el("p", el("kbd", key), " ", words(sentence)) for key, sentence in KEYS]
    close = local("help", "", words("bar.close"), cls="plain")
    box = el("div", el("h3", words("bar.help_title")), listed, close)
    dialog = {"role": "dialog", "aria_modal": "true", "aria_label": words("bar.help_title")}
    return join(
        local("prompt", "", words("bar.skip"), cls="skip"),
        el("div", box, id="help", cls="td-help", hidden=True, **dialog),
        el("div", words("run.offline"), id="offline", cls="td-note warn", role="status", hidden=True),
        el(
            "span",
            id="words",
            data_copied=words("bar.copied"),
            data_seed=words("create.seed_info"),
            data_done=words("settings.said_done", job=0),
            data_failed=words("settings.said_failed", job=0),
            data_refused=words("settings.refused"),
            hidden=True,
        ),
    )
