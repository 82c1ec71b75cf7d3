"""Measured peaks and seconds per phase: what corrects the next plan (plan/calibration.py) and the stuck deadlines.

Only the supervisor records what jobs took, each phase once; `turbodiff calibrate` adds what it measured itself.
"""

from statistics import median

from pydantic import ValidationError

from turbodiff.jobs.store import Store
from turbodiff.plan.calibration import Calibration, History, Sample, kind_of, work_bytes
from turbodiff.plan.hardware import Machine
from turbodiff.spec.events import Event, PhaseEvent
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.plan import Phase, Plan

HISTORY = 300  # rows that are looked at: 50 runs of six phases
KEEP_ROWS = 3000  # ten times that: other models and sizes have a history, too
SHAPE = ("model", "width", "height", "num_frames")


def planned_phase(plan: Plan | None, name: str) -> Phase | None:
    """The plan's own row for a phase, None where it has none."""
    return next((phase for phase in plan.phases if phase.name == name), None) if plan else None


def record(
    store: Store, job: QueuedJob, event: Event, machine: Machine | None, slot: int = 0, nvml_bytes: int | None = None
) -> None:
    """Keep what a finished phase took; with a card and a prediction it also teaches the plan.

    An out-of-memory is a sample, too: the phase needed more than the budget had beside its weights.
    """
    if event.type == "phase" and event.state == "done":
        sample, phase = _sample(job, event, machine, slot, nvml_bytes), event.name
        measured = (event.peak_bytes, event.seconds)
    elif event.type == "error" and event.code == "oom":
        sample, phase = _failed(job, event.field, machine, slot), event.field
        measured = (None, None)
    else:
        return
    values = (job.id, job.attempt, *(getattr(job.planned_request, name) for name in SHAPE), phase)
    with store.write(durable=False) as db:
        row = db.execute(
            "INSERT INTO peak (at_s, job, attempt, model, width, height, num_frames, phase, measured_bytes, measured_s,"
            " sample) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                store.now(),
                *values,
                *measured,
                sample.model_dump_json() if sample else None,
            ),
        )
        db.execute("DELETE FROM peak WHERE id <= ?", ((row.lastrowid or 0) - KEEP_ROWS,))


def keep_sample(store: Store, sample: Sample) -> None:
    """Keep a sample that no job took."""
    shape = sample.kind.model_dump(include=set(SHAPE))
    with store.write() as db:
        db.execute(
            "INSERT INTO peak (at_s, job, attempt, model, width, height, num_frames, phase, sample)"
            " VALUES (?, 0, 0, ?, ?, ?, ?, ?, ?)",
            (store.now(), *(shape[name] for name in SHAPE), sample.phase, sample.model_dump_json()),
        )


def clear_samples(store: Store) -> int:
    """Forget everything that was learned about memory; returns how many samples there were. Seconds stay."""
    with store.write() as db:
        return db.execute("UPDATE peak SET sample = NULL WHERE sample IS NOT NULL").rowcount


def forget_samples(store: Store, job: int, attempt: int) -> None:
    """A neighbour's memory moved during an attempt: its peaks teach nothing."""
    with store.write(durable=False) as db:
        db.execute("UPDATE peak SET sample = NULL WHERE job = ? AND attempt = ?", (job, attempt))


def samples(store: Store) -> list[Sample]:
    """The newest samples, oldest first; rows of another version of the formula are left out by `calibrate`."""
    rows = store.rows("SELECT sample FROM peak WHERE sample IS NOT NULL ORDER BY id DESC LIMIT ?", HISTORY)
    found = []
    for row in reversed(rows):
        try:
            found.append(Sample.model_validate_json(row["sample"]))
        except ValidationError:  # written by an older version
            continue
    return found


def calibration_for(store: Store, plan: Plan, machine: Machine, slot: int | None = None) -> Calibration | None:
    """What measured runs say about a plan on its card (or on that of a slot); None without a card or a sample."""
    index = _card_index(plan) if slot is None else slot
    if index is None or index >= len(machine.gpus):
        return None
    kind = kind_of(machine.gpus[index], machine, plan.request, plan.levers)
    found = History(samples(store)).calibration(kind)
    return found if found.samples else None


def calibration_of(store: Store, job: QueuedJob, machine: Machine | None, slot: int) -> Calibration | None:
    """What measured runs say about the plan of a job on the card of a slot.

    None after an out-of-memory: then the job has no plan, and its cap is careful enough.
    """
    planned_on = _planned(job, machine, slot)
    return calibration_for(store, *planned_on, slot) if planned_on else None


def medians(rows: list[tuple[str, float]]) -> dict[str, float]:
    """Phase -> median seconds, from (phase, seconds) of earlier runs."""
    by_phase: dict[str, list[float]] = {}
    for phase, seconds in rows:
        by_phase.setdefault(phase, []).append(seconds)
    return {phase: median(found) for phase, found in by_phase.items()}


def usual_seconds(store: Store, job: QueuedJob) -> dict[str, float]:
    """Phase -> median seconds of earlier runs of the same model and size: the stuck watch's deadlines."""
    rows = store.rows(
        "SELECT phase, measured_s FROM peak WHERE model = ? AND width = ? AND height = ? AND num_frames = ?"
        " AND measured_s IS NOT NULL ORDER BY id DESC LIMIT ?",
        *(getattr(job.planned_request, name) for name in SHAPE),
        HISTORY,
    )
    return medians([(row["phase"], row["measured_s"]) for row in rows])


def _planned(job: QueuedJob, machine: Machine | None, slot: int) -> tuple[Plan, Machine] | None:
    """The plan that ran on a card, or None: no card, no plan, or a row of another version."""
    if machine is None or slot >= len(machine.gpus) or job.plan is None:
        return None
    return None if _card_index(job.plan) is None else (job.plan, machine)


def _sample(
    job: QueuedJob, event: PhaseEvent, machine: Machine | None, slot: int, nvml_bytes: int | None
) -> Sample | None:
    """Measured work memory beside the predicted one, both without the weights, which are known exactly."""
    planned_on, phase = _planned(job, machine, slot), planned_phase(job.plan, event.name)
    if planned_on is None or phase is None or not event.peak_bytes:
        return None
    plan, card = planned_on
    return Sample(
        kind=kind_of(card.gpus[slot], card, plan.request, plan.levers),
        phase=phase.name,
        predicted_bytes=work_bytes(plan, phase),
        measured_bytes=max(0, event.peak_bytes - (event.weights_bytes or phase.weights_bytes)),
        reserved_bytes=event.reserved_bytes,
        nvml_bytes=nvml_bytes,
    )


def _failed(job: QueuedJob, name: str, machine: Machine | None, slot: int) -> Sample | None:
    """What an out-of-memory says: work memory was at least what the budget had beside the weights."""
    planned_on, phase = _planned(job, machine, slot), planned_phase(job.plan, name)
    if planned_on is None or phase is None:
        return None
    plan, card = planned_on
    predicted = work_bytes(plan, phase)
    room = max(plan.budget_bytes, phase.peak_bytes) - phase.peak_bytes
    return Sample(
        kind=kind_of(card.gpus[slot], card, plan.request, plan.levers),
        phase=phase.name,
        predicted_bytes=predicted,
        measured_bytes=predicted + room + 1,
        out_of_memory=True,
    )


def _card_index(plan: Plan) -> int | None:
    kind, _, index = plan.device.partition(":")
    return int(index or 0) if kind == "cuda" else None
