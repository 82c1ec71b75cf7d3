"""The System tab: cards, RAM, who holds memory, the self-test, kernels, versions, models present and missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from turbodiff.spec.jobs import ACTIVE
from webui.form import CARDS
from webui.markup import Html, action, el, facts, join, local
from webui.panels.accuracy import Accuracy, accuracy, draw_accuracy
from webui.panels.models import Model, draw_best, draw_model, model_card, section
from webui.panels.nodes import Nodes, draw_nodes, nodes
from webui.panels.status_bar import RESTART, card_name
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import DoctorReport, Holder, Machine
    from webui.snapshot import Snapshot

QUICK = "turbodiff calibrate --quick"
LARGEST_HOLDERS = 5  # shown in first aid
CARD_STATES = ("on", "paused", "excluded")
SHOWN_FILES = 100  # of those that no model uses


@dataclass(frozen=True)
class HolderRow:
    """A process that holds memory of a card; `kill` are lines to copy, () where none must be offered."""

    pid: int
    name: str
    memory: str
    note: str
    kind: str
    kill: tuple[str, ...]


@dataclass(frozen=True)
class Switch:
    """A card: its name, whether it takes jobs, and what it does."""

    uuid: str
    name: str
    state: str
    does: str


@dataclass(frozen=True)
class System:
    """Everything on the System tab."""

    cards: tuple[tuple[str, str], ...]
    holders: tuple[HolderRow, ...]
    host_line: str
    models: tuple[Model, ...]
    versions: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    pip_line: str = ""
    best: Model | None = None  # what this card runs best and is not here
    kernels: tuple[tuple[str, str], ...] = ()  # operation, what computes it and why
    checks: tuple[tuple[str, bool, str], ...] = ()  # of the self-test: name, whether it is good, what it found
    checking: bool = False
    switches: tuple[Switch, ...] = ()  # a card each
    nodes: Nodes | None = None  # other machines
    passed_over: tuple[tuple[str, str], ...] = ()  # files of the search roots that no model uses, and why
    accuracy: tuple[Accuracy, ...] = ()


def system(snapshot: Snapshot, report: DoctorReport | None, words: Words) -> System:
    """The tab from a snapshot and the slower report of versions (None while it is being read)."""
    models = tuple(model_card(spec, tuple(missing), snapshot, words) for spec, missing in snapshot.models)
    tier, selftest = snapshot.tier, snapshot.selftest
    wanted = [start.model for start in (tier.t2v, tier.i2v)] if tier is not None else []  # text to video first
    shown = System(
        cards=tuple(_cards(snapshot.machine, words)) if snapshot.machine else (),
        holders=tuple(_holders(snapshot, words)),
        host_line=host_line(snapshot),
        switches=tuple(_switches(snapshot, words)),
        nodes=nodes(snapshot, words),
        models=models,
        best=next(
            (model for name in wanted for model in models if model.id == name and not model.here and model.best), None
        ),
        checks=tuple(
            (
                words.or_else(f"system.check_{check.name}", check.name),
                check.ok,
                _said(check.name, check.ok, check.detail, check.facts, words),
            )
            for check in (selftest.checks if selftest else ())
        ),
        checking=bool(selftest and selftest.running),
        passed_over=tuple(
            (one.path, words.or_else(f"error.{one.code}", one.what, field=one.path, got=one.got, expected=one.expected))
            for one in snapshot.passed_over
        ),
        accuracy=tuple(accuracy(snapshot.clips)),
    )
    if report is None:
        return shown
    versions = []
    for name, version in report.versions.items():  # they stay as they are; that there is none is worded
        if name == "GPU" and report.machine.pretended:
            version = ", ".join(card_name(gpu, report.machine, words) for gpu in report.machine.gpus)
        none = words("fact.not_needed" if name in report.optional else "fact.none")
        label = words.or_else(f"fact.{name.replace(' ', '_').lower()}", name)
        versions.append((label, version or none))
    return replace(
        shown,
        versions=tuple(versions),
        warnings=tuple(words.or_else(f"warning.{key}", sentence) for key, sentence in report.warnings),
        pip_line=report.pip_line,
        kernels=tuple(
            (op, f"{words(f'system.kernel_{runs}')} · {words(f'system.kernel_{key}', **numbers)}")
            for op, runs, key, numbers in report.kernel_reasons
        ),
    )


def _said(name: str, ok: bool, detail: str, facts: Mapping[str, str], words: Words) -> str:
    """What a check of the self-test found, in the language of the page; `detail` is how it said so itself."""
    if not ok:
        return words.or_else(f"warning.{facts.get('code')}", words.error(facts)) if facts else detail
    if name == "gpu" and facts and not facts.get("cards"):
        return words.or_else(f"reason.{facts.get('reason')}", words("bar.gpu_none"), got=facts.get("got", ""))
    return words.or_else(f"system.found_{name}", detail, **facts)


def host_line(snapshot: Snapshot) -> str:
    """The line that lists holders on the host, where they cannot be seen from here."""
    return snapshot.host_command if not snapshot.holders or any(not card.listed for card in snapshot.holders) else ""


def holder(found: Holder, words: Words) -> HolderRow:
    """A holder of turbodiff/gpu/processes.py in words; `kill -9` only follows where `kill` is offered."""
    kind = words(f"system.kind_{found.kind}")
    age = words.seconds(found.age_s) if found.age_s is not None else ""
    details = (kind, found.command[:90], age, words("system.idle") if found.idle else "")
    kill = (found.kill_line, found.kill_line.replace("kill ", "kill -9 ")) if found.kill_line else ()
    memory = words.gib(found.bytes) if found.bytes else "?"
    return HolderRow(found.pid or 0, found.name or kind, memory, " · ".join(filter(None, details)), found.kind, kill)


def _holders(snapshot: Snapshot, words: Words) -> Iterable[HolderRow]:
    """Every holder, with its card where there are several; a program of which the driver does not say where it is,
    once."""
    seen = set()
    for card in snapshot.holders:
        for row in card.rows:
            if row.bytes is None and row.pid in seen:
                continue
            seen.add(row.pid)
            shown = holder(row, words)
            several = len(snapshot.holders) > 1 and row.bytes is not None
            yield replace(shown, note=f"{shown.note} · {card.name}") if several else shown


def largest_holders(snapshot: Snapshot, words: Words) -> tuple[HolderRow, ...]:
    """The holders of most memory, ours included."""
    rows = sorted(snapshot.holder_rows(), key=lambda row: -(row.bytes or 0))
    return tuple(holder(row, words) for row in rows[:LARGEST_HOLDERS])


def _switches(snapshot: Snapshot, words: Words) -> Iterable[Switch]:
    running = {job.slot: job.id for job in snapshot.jobs if job.state in ACTIVE}
    for card in snapshot.fleet.cards if snapshot.fleet else ():
        if card.uuid:
            does = words("system.card_runs", job=running[card.slot]) if card.slot in running else words("system.idle")
            yield Switch(card.uuid, card.name, card.state, does)


def _draw_switches(switches: tuple[Switch, ...], words: Words) -> Html:
    """Each card with its switch."""
    rows = []
    for card in switches:
        acts = [
            action(
                "card_state", f"{card.uuid} {state}", words(f"system.card_{state}"),
                cls="main" if state == card.state else "plain", aria_pressed=str(state == card.state).lower(),
            )
            for state in CARD_STATES
        ]  # fmt: skip
        told = el("b", card.name), el("span", card.does, cls="what"), el("span", acts, cls="td-acts")
        rows.append(el("div", told, data_card=card.uuid))
    return el("div", rows, cls="td-list", id="card-switches") if rows else Html("")


def _cards(machine: Machine, words: Words) -> Iterable[tuple[str, str]]:
    for gpu in machine.gpus:
        free = words.gib(gpu.free_bytes) if gpu.free_bytes is not None else "?"
        total = words.gib(gpu.total_bytes) if gpu.total_bytes else "?"
        told = (
            words("system.free_of", free=free, total=total),
            f"{gpu.utilisation:.0%}" if gpu.utilisation is not None else "",
            f"{gpu.temperature_c:.0f} °C" if gpu.temperature_c is not None else "",
            f"{gpu.power_w:.0f} W" if gpu.power_w is not None else "",
            gpu.uuid,
            words("system.card_measured", day=gpu.measured_on)
            if gpu.measured
            else words("system.card_unmeasured", line=QUICK),
        )
        yield card_name(gpu, machine, words), " · ".join(filter(None, told))
    if not machine.gpus and machine.gpu_reason:
        yield words("bar.no_gpu"), words.or_else(f"reason.{machine.gpu_reason}", "", got=machine.gpu_error)
    if machine.ram_total_bytes and machine.ram_available_bytes is not None:
        free, total = words.gib(machine.ram_available_bytes), words.gib(machine.ram_total_bytes)
        yield words("bar.ram"), words("system.free_of", free=free, total=total)
    if machine.driver:
        yield words("system.driver"), machine.driver


def draw(shown: System, ready: bool, words: Words) -> Html:
    """Machine and versions on the left, holders and models on the right; `ready` False: versions are being read."""
    reading = el("p", words("system.reading"), cls="td-quiet")
    host = draw_host_line(shown.host_line, bool(shown.holders), words) or el(
        "p", words("system.holders_none"), cls="td-quiet"
    )
    holders = join(draw_holders(shown.holders, words), host if shown.host_line or not shown.holders else None)
    if shown.kernels:
        kernels = facts(shown.kernels, cls="", id="kernels")
    else:
        kernels = el("p", words("system.kernels_none"), cls="td-quiet") if ready else reading
    versions = (
        [el("div", sentence, cls="td-note warn") for sentence in shown.warnings],
        facts(shown.versions),
        el("p", words("system.pip"), " ", el("code", shown.pip_line)) if shown.pip_line else None,
        el("p", words("system.not_needed"), cls="td-quiet"),
    )
    checks = []
    for name, good, detail in shown.checks:
        verdict = "good" if good else "bad"
        pill = el("span", words(f"system.{verdict}"), cls=f"td-pill {verdict}")
        checks.append(el("div", pill, el("span", name), el("code", detail, cls="what")))
    about = el("p", words("system.selftest_reading" if shown.checking else "system.selftest_text"), cls="td-quiet")
    selftest = el("div", checks, cls="td-list", id="selftest") if checks else about
    start = words("system.selftest_running" if shown.checking else "system.selftest_go")
    run = action("selftest", "", start, disabled=shown.checking, cls="plain")
    cards = el("div", [action("card", size, f"{size} GiB", form=True) for size in CARDS], cls="td-acts", id="cards")
    switches = _draw_switches(shown.switches, words)
    left = (
        section(words("system.machine"), facts(shown.cards)),
        section(words("system.cards"), (switches, el("p", words("system.cards_text"), cls="td-quiet")))
        if switches
        else None,
        draw_nodes(shown.nodes, words),
        section(words("system.try_card"), (cards, el("p", words("system.try_card_text"), cls="td-quiet"))),
        section(words("system.holders"), holders),
        draw_accuracy(shown.accuracy, words),
        section(words("system.selftest"), selftest, run),
        section(words("system.kernels"), kernels),
        section(words("system.versions"), versions if ready else reading),
    )
    models = [draw_model(model, not shown.best, words) for model in shown.models]
    rescan = action("rescan", "", words("system.rescan"), cls="plain")
    others = _passed_over(shown.passed_over, words)
    right = section(words("system.models"), (draw_best(shown.best, words), models, others), rescan)
    return el("div", el("div", left, cls="td-stack"), el("div", right, cls="td-stack"), cls="td-two td-html")


def draw_host_line(line: str, own: bool, words: Words) -> Html | None:
    """The command that lists programs on the host, where there is one to run; `own`: this user's are shown."""
    told = words("system.holders_own" if own else "system.holders_unknown")
    return el("p", told, " ", el("code", line), cls="td-quiet") if line else None


def draw_holders(holders: tuple[HolderRow, ...], words: Words) -> Html:
    """Programs that hold memory, each with the line that ends it where one may be offered."""
    if not holders:
        return Html("")
    head = el("tr", [el("th", words(f"system.{name}")) for name in ("process", "memory", "what")], el("th", ""))
    rows = []
    for found in holders:
        if found.kind == "worker":
            end = action("restart", "", RESTART)
        elif found.kind == "leftover":
            end = action("end_leftover", found.pid, words("bar.end_leftover"))
        else:
            end = join([local("copy", line, line, cls="plain", title=words("system.copy")) for line in found.kill])
        name = f"{found.name} ({found.pid})" if found.pid else found.name
        rows.append(el("tr", el("td", name), el("td", found.memory, cls="td-num"), el("td", found.note), el("td", end)))
    table = el("table", head, rows, cls="td-table")
    return join(el("div", table, cls="td-scroll"), el("p", words("system.holders_note"), cls="td-quiet"))


def _passed_over(files: tuple[tuple[str, str], ...], words: Words) -> Html | None:
    """The files that no model uses, each with the reason."""
    if not files:
        return None
    rows = [el("li", el("code", path), " ", why) for path, why in files[:SHOWN_FILES]]
    rows += [el("li", "…")] if len(files) > SHOWN_FILES else []
    summary = el("summary", words("system.passed_over", count=len(files)))
    return el("details", summary, el("ul", rows), id="passed-over")
