"""The System tab: cards, RAM, who holds memory, models present and missing, versions."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from turbodiff.spec.numbers import GB
from webui.view import Snapshot
from webui.view.bar import PRETENDED, card_name
from webui.wording import Words

CHECK_LINE = re.compile(r"selftest (\w+): (ok|FAILED), (.*)")
KERNEL_REASONS = {
    r"device is (?P<device>\w+)": "kernel_no_gpu",
    r"Triton is not installed": "kernel_no_triton",
    r"(?P<arch>sm_\d+) is older than (?P<oldest>sm_\d+)": "kernel_old",
    r"equal to its reference on this card": "kernel_equal",
    r"not checked on this card yet": "kernel_unchecked",
    r"TURBODIFF_KERNELS=(?P<wish>\w+)": "kernel_wish",
}
HOST_LINE = "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv"


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a card; `kill` are lines to copy, () where none must be offered."""

    pid: int
    name: str
    memory: str
    note: str
    kind: str
    kill: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A model and what is missing of it."""

    name: str
    about: str
    here: bool
    missing: tuple[str, ...]
    id: str = ""
    offer: str = ""  # "14.5 GB to checkpoints/, 80 GB free there"; "" where nothing can be fetched
    files: tuple[str, ...] = ()
    enough_room: bool = True
    running: bool = False
    words: str = ""


@dataclass(frozen=True)
class System:
    """Everything on the System tab."""

    cards: tuple[tuple[str, str], ...]
    holders: tuple[Holder, ...]
    host_line: str
    models: tuple[Model, ...]
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    pip_line: str
    best: Model | None = None  # what this card runs best and is not here
    kernels: tuple[tuple[str, str], ...] = ()  # operation, what computes it and why
    checks: tuple["Check", ...] = ()
    checking: bool = False


@dataclass(frozen=True)
class Check:
    """One line of the self-test."""

    name: str
    good: bool
    detail: str


def system(snapshot: Snapshot, report: Mapping[str, Any] | None, words: Words) -> System:
    """The tab from a snapshot and the slower report of versions (None while it is being read)."""
    machine: Any = snapshot.machine
    report = report or {}
    models = tuple(_model(spec, missing, snapshot, words) for spec, missing in snapshot.models)
    return System(
        cards=tuple(_cards(machine, words)),
        holders=tuple(holder(row, words) for card in snapshot.holders for row in card.rows),
        host_line=HOST_LINE if not snapshot.holders or any(not card.listed for card in snapshot.holders) else "",
        models=models,
        facts=tuple(
            (fact_name(name, words), fact_value(str(value), words))
            for name, value in (report.get("found") or {}).items()
        ),
        warnings=tuple(warning(key, sentence, words) for key, sentence in report.get("warnings", ())),
        pip_line=str(report.get("pip_line") or ""),
        best=_best(models, snapshot.tier),
        kernels=tuple(kernel(op, runs, why, words) for op, runs, why in report.get("kernels", ())),
        checks=tuple(_checks(snapshot.selftest.lines if snapshot.selftest else (), words)),
        checking=bool(snapshot.selftest and snapshot.selftest.running),
    )


def _best(models: tuple[Model, ...], tier: Any) -> Model | None:
    """The model of this card's tier that is still to be fetched: text to video first."""
    wanted = [start.model for start in (tier.t2v, tier.i2v)] if tier is not None else []
    return next((model for name in wanted for model in models if model.id == name and model.offer), None)


def _checks(lines: Iterable[str], words: Words) -> Iterable[Check]:
    """The self-test's lines: "selftest plan: ok, 312 MiB of 20000 MiB"."""
    for line in lines:
        found = CHECK_LINE.fullmatch(line.strip())
        if found:
            yield Check(words.or_else(f"system.check_{found[1]}", found[1]), found[2] == "ok", found[3])


def kernel(op: str, runs: str, why: str, words: Words) -> tuple[str, str]:
    """What computes an operation, and why, in the page's language (turbodiff_kernels/backend.py says it in English)."""
    for pattern, key in KERNEL_REASONS.items():
        found = re.fullmatch(pattern, why)
        if found:
            why = words(f"system.{key}", **found.groupdict())
            break
    else:
        why = words("system.kernel_differs", got=why)
    return op, f"{words(f'system.kernel_{runs}')} · {why}"


def _model(spec: Any, missing: Any, snapshot: Snapshot, words: Words) -> Model:
    told = about(spec, words)
    offer, download = snapshot.offers.get(spec.name), snapshot.downloads.get(spec.name)
    if not missing or offer is None:
        return Model(spec.display_name, told, not missing, tuple(missing))
    sizes = {"size": gb(offer.nbytes), "folder": offer.folder, "free": gb(offer.free_bytes), "host": offer.endpoint}
    return Model(
        spec.display_name,
        told,
        False,
        tuple(missing),
        id=spec.name,
        offer=words("system.offer", **sizes),
        files=tuple(f"{name}  {gb(nbytes)}  {repo}" for name, repo, nbytes in offer.files),
        enough_room=offer.free_bytes > offer.nbytes,
        running=bool(download and download.running),
        words=download.words if download else "",
    )


def gb(n_bytes: float) -> str:
    """Sizes of files as hubs and disks count them."""
    return f"{n_bytes / GB:.1f} GB"


def about(spec: Any, words: Words) -> str:
    """What a model is for, in the page's language."""
    return words.or_else(f"model.{spec.name.replace('.', '_').replace('-', '_')}", spec.about)


def fact_name(name: str, words: Words) -> str:
    """Names of programs stay as they are; words are worded."""
    return words.or_else(f"system.fact_{name.replace(' ', '_').lower()}", name)


def fact_value(value: str, words: Words) -> str:
    """Versions stay as they are; that there is none is worded."""
    known = {"none": "system.none", "none (none)": "system.none", "not found, not needed": "system.not_found"}
    if value.startswith(PRETENDED):
        return card_name(value.partition(" (")[0], words)
    return words(known[value]) if value in known else value


def warning(key: str, sentence: str, words: Words) -> str:
    """A warning of the doctor in the page's language."""
    return words.or_else(f"warning.{key}", sentence)


def _cards(machine: Any, words: Words) -> Iterable[tuple[str, str]]:
    if machine is None:
        return
    for gpu in machine.gpus:
        free = words.gib(gpu.free_bytes) if gpu.free_bytes is not None else "?"
        total = words.gib(gpu.total_bytes) if gpu.total_bytes else "?"
        extra = [
            f"{gpu.utilisation:.0%}" if gpu.utilisation is not None else "",
            f"{gpu.temperature_c:.0f} °C" if gpu.temperature_c is not None else "",
            f"{gpu.power_w:.0f} W" if gpu.power_w is not None else "",
            gpu.uuid,
        ]
        yield (
            card_name(gpu.name, words),
            " · ".join([words("system.free_of", free=free, total=total), *filter(None, extra)]),
        )
    if machine.ram_total_bytes and machine.ram_available_bytes is not None:
        free, total = words.gib(machine.ram_available_bytes), words.gib(machine.ram_total_bytes)
        yield words("bar.ram"), words("system.free_of", free=free, total=total)
    if machine.driver:
        yield words("system.driver"), machine.driver


def holder(found: Any, words: Words) -> Holder:
    """A holder of turbodiff/gpu/holders.py in words; `kill -9` only follows where `kill` is offered."""
    memory = words.gib(found.bytes) if found.bytes else "?"
    age = words.seconds(found.age_s) if found.age_s is not None else ""
    about = words(f"system.kind_{found.kind}")
    details = (about, found.command[:90], age, words("system.idle") if found.idle else "")
    note = " · ".join(part for part in details if part)
    name = found.name or about
    kill = (found.kill_line, found.kill_line.replace("kill ", "kill -9 ")) if found.kill_line else ()
    return Holder(found.pid or 0, name, memory, note, found.kind, kill)
