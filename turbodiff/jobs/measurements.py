"""Measured peaks and seconds per phase: what corrects the next plan (plan/calibration.py) and the stuck deadlines.

Each row says on which kind of card it was measured, by name and memory: what one card takes says nothing of another.

Only the supervisor records what jobs took, each phase once; `turbodiff calibrate` adds what it measured itself.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from operator import itemgetter
from statistics import median

from pydantic import ValidationError

from turbodiff.gpu.card_measurements import keep_link
from turbodiff.jobs.database import as_column
from turbodiff.jobs.rows import parsed
from turbodiff.jobs.store import Store
from turbodiff.plan.calibration import History, Sample, kind_of, provenance, work_bytes
from turbodiff.plan.hardware import Machine
from turbodiff.spec.events import Event
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.plan import Calibration, Phase, Plan

HISTORY = 300  # rows that are looked at: 50 runs of six phases
KEEP_ROWS = 3000  # ten times that: other models and sizes have a history, too
SHAPE = ("model", "width", "height", "num_frames")


def planned_phase(plan: Plan | None, name: str) -> Phase | None:
    """The plan's own row for a phase, None where it has none."""
    return next((phase for phase in plan.phases if phase.name == name), None) if plan else None


def record(store: Store, job: QueuedJob, event: Event, machine: Machine | None, slot: int = 0) -> None:
    """Keep what a finished phase took; where it was planned it also teaches the next plan.

    An out-of-memory is a sample, too: the phase needed more than the budget had beside its weights.
    """
    peak_bytes = took_s = None
    if event.type == "phase" and event.state == "done":
        name, peak_bytes, took_s = event.name, event.peak_bytes, event.seconds
    elif event.type == "error" and event.code == "oom":
        name = event.field
    else:
        if event.type == "link" and machine and slot < len(machine.gpus):
            keep_link(machine.gpus[slot], machine, event)
        return
    plan, phase, sample = job.plan, planned_phase(job.plan, name), None
    if plan and plan.levers.cards > 1:  # what one of several cards took says nothing of one alone
        return
    on_card = plan is not None and plan.device.startswith("cuda")
    gpu, gpu_bytes = measured_on(job, machine, slot)
    if plan and phase and machine and (slot < len(machine.gpus) or not on_card):
        predicted_bytes = work_bytes(plan, phase)
        sample = Sample(
            kind=kind_of(machine.gpus[slot] if on_card else None, machine, plan.request, plan.levers),
            phase=phase.name,
            predicted_bytes=predicted_bytes,
            slack_bytes=phase.slack_bytes,
            measured_bytes=0,
            network=plan.request.networks.get(phase.name),
        )
        if event.type == "error":  # work memory was at least what the budget had beside the weights
            least_bytes = predicted_bytes + max(plan.budget_bytes, phase.peak_bytes) - phase.peak_bytes + 1
            sample = sample.model_copy(update={"measured_bytes": least_bytes, "out_of_memory": True})
        else:  # bytes without the weights, which are known exactly; a CPU's process has no peak of a phase
            weights_bytes = event.weights_bytes or phase.weights_bytes
            measured: dict[str, int | float | None] = {
                "predicted_s": phase.seconds - phase.learned_s, "measured_s": took_s,
            }  # fmt: skip
            if on_card and event.peak_bytes:
                measured |= {"measured_bytes": max(0, event.peak_bytes - weights_bytes), "nvml_bytes": event.nvml_bytes}
            if on_card and event.reserved_bytes:
                held_bytes = max(0, event.reserved_bytes - weights_bytes)
                measured |= {"held_bytes": held_bytes, "reserved_bytes": event.reserved_bytes}
            sample = sample.model_copy(update=measured)
    shape = (getattr(job.planned_request, field) for field in SHAPE)
    learned = as_column(sample)
    with store.write(durable=False) as db:
        row = db.execute(
            "INSERT INTO peak (at_s, job, attempt, model, width, height, num_frames, phase, measured_bytes, measured_s,"
            " sample, gpu, gpu_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (store.now(), job.id, job.attempt, *shape, name, peak_bytes, took_s, learned, gpu, gpu_bytes),
        )
        db.execute("DELETE FROM peak WHERE id <= ?", ((row.lastrowid or 0) - KEEP_ROWS,))


def measured_on(job: QueuedJob, machine: Machine | None, slot: int) -> tuple[str, int]:
    """Name and memory of the card of a slot as rows are filed under; of a CPU its cores and 0; ("", 0) where it cannot
    be seen, and of rows of an older version that named none."""
    if machine is None:
        return "", 0
    on_card = job.plan.device.startswith("cuda") if job.plan else slot < len(machine.gpus)
    if on_card and slot >= len(machine.gpus):
        return "", 0
    name, total_bytes, *_ = provenance(machine.gpus[slot] if on_card else None, machine)
    return str(name), int(str(total_bytes))


def keep_sample(store: Store, sample: Sample) -> None:
    """Keep a sample that no job took."""
    shape = sample.kind.model_dump(include=set(SHAPE))
    with store.write() as db:
        db.execute(
            "INSERT INTO peak (at_s, job, attempt, model, width, height, num_frames, phase, sample, gpu, gpu_bytes)"
            " VALUES (?, 0, 0, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                store.now(),
                *(shape[name] for name in SHAPE),
                sample.phase,
                as_column(sample),
                sample.kind.gpu,
                sample.kind.total_bytes,
            ),
        )


def clear_samples(store: Store) -> int:
    """Forget everything that plans learned; returns how many samples there were. What phases usually take stays."""
    with store.write() as db:
        return db.execute("UPDATE peak SET sample = NULL WHERE sample IS NOT NULL").rowcount


def forget_samples(store: Store, job: int, attempt: int) -> None:
    """A neighbour's memory moved during an attempt: its peaks teach nothing."""
    with store.write(durable=False) as db:
        db.execute("UPDATE peak SET sample = NULL WHERE job = ? AND attempt = ?", (job, attempt))


def samples(store: Store) -> list[Sample]:
    """The newest samples of each card, oldest first; rows of another version of the formula are left out by
    `calibrate`."""
    return _read(_texts(store))


def history(store: Store) -> History:
    """What the newest samples teach. The same samples are the same history, so what was planned with it is remembered;
    they are read once: 50 clients may submit at once."""
    return _history_of(tuple(_texts(store)))


def _texts(store: Store) -> list[str | bytes]:
    """The newest samples of each card, oldest first. Each job asks for them: of a card that works the newest rows are
    soon found from the end, where to number all rows took five times as long."""
    rows = list[sqlite3.Row]()
    for card in store.rows("SELECT DISTINCT gpu, gpu_bytes FROM peak"):
        of_card = "SELECT id, sample FROM peak WHERE gpu = ? AND gpu_bytes = ? AND sample IS NOT NULL"
        rows += store.rows(f"{of_card} ORDER BY id DESC LIMIT ?", *card, HISTORY)
    return [row["sample"] for row in sorted(rows, key=itemgetter("id"))]


def _read(texts: Iterable[str | bytes]) -> list[Sample]:
    return [sample for text in texts if (sample := _sample(text)) is not None]


@lru_cache(2 * HISTORY)
def _sample(text: str | bytes) -> Sample | None:
    with suppress(ValidationError):  # else it was written by an older version, or is damaged
        return Sample.model_validate(parsed(text))
    return None


@lru_cache(4)
def _history_of(texts: tuple[str | bytes, ...]) -> History:
    return History(_read(texts))


def calibration_of(store: Store, job: QueuedJob, machine: Machine | None, slot: int) -> Calibration | None:
    """What measured runs say about the plan of a job on the card of a slot.

    None after an out-of-memory: then the job has no plan, and its cap is careful enough.
    """
    plan = job.plan
    if machine is None or slot >= len(machine.gpus) or plan is None or not plan.device.startswith("cuda"):
        return None
    found = history(store).calibration(provenance(machine.gpus[slot], machine))
    here = tuple([lesson for lesson in found.lessons if lesson.model == plan.request.model])
    return found._replace(lessons=here) if here else None


def usual_seconds(store: Store, job: QueuedJob, machine: Machine | None = None, slot: int = 0) -> dict[str, float]:
    """Phase -> median seconds of earlier runs of the same model and size on such a card: the watchdog's deadlines. Of a
    phase behind the decode runs of the same network count. Nothing is known of one that several cards make together."""
    if job.plan and job.plan.levers.cards > 1:
        return {}
    rows = store.rows(
        "SELECT phase, measured_s, sample FROM peak WHERE model = ? AND width = ? AND height = ? AND num_frames = ?"
        " AND gpu = ? AND gpu_bytes = ? AND measured_s IS NOT NULL ORDER BY id DESC LIMIT ?",
        *(getattr(job.planned_request, field) for field in SHAPE),
        *measured_on(job, machine, slot),
        HISTORY,
    )
    by_phase: dict[str, list[float]] = {}
    networks = job.planned_request.networks
    for row in rows:
        told = _sample(row["sample"] or "") if row["phase"] in networks else None
        if row["phase"] not in networks or (told and told.network == networks[row["phase"]]):
            by_phase.setdefault(row["phase"], []).append(row["measured_s"])
    return {phase: median(found) for phase, found in by_phase.items()}
