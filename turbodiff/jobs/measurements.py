"""Measured peaks and seconds per phase: what corrects the next plan (plan/calibration.py) and the stuck deadlines.

Only the supervisor records what jobs took, each phase once; `turbodiff calibrate` adds what it measured itself.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from pydantic import ValidationError

from turbodiff.jobs.store import Job, Store
from turbodiff.plan.calibration import Calibration, Sample, calibrate, kind_of, work_bytes
from turbodiff.plan.hardware import Machine
from turbodiff.spec.events import Event
from turbodiff.spec.plan import Plan

HISTORY = 300  # rows that are looked at: 50 runs of six phases
KEEP_ROWS = 3000  # ten times that: other models and sizes have a history, too
SHAPE = ("model", "width", "height", "num_frames")


def planned(job: Job | None, phase: str) -> dict[str, Any]:
    """The plan's own row for a phase, {} without a plan."""
    phases = (job.plan or {}).get("phases", ()) if job else ()
    return next((dict(row) for row in phases if row["name"] == phase), {})


def planned_bytes(job: Job | None, event: Event) -> int | None:
    """The predicted peak of the phase that an event is about."""
    return planned(job, str(event.fields.get("name", ""))).get("peak_bytes") if event.type == "phase" else None


def record(
    store: Store, job: Job | None, event: Event, machine: Machine | None, slot: int = 0, nvml_bytes: int | None = None
) -> None:
    """Keep what a finished phase took; with a card and a prediction it also teaches the plan.

    An out-of-memory is a sample, too: the phase needed more than the budget had beside its weights.
    """
    if job is None:
        return
    if event.type == "phase" and event.fields.get("state") == "done":
        sample = _sample(job, event, machine, slot, nvml_bytes)
        _insert(store, job, str(event.fields["name"]), event.fields, sample)
    elif event.type == "error" and event.fields.get("code") == "oom":
        _insert(store, job, str(event.fields.get("field", "")), {}, _failed(job, event, machine, slot))


def _insert(store: Store, job: Job, phase: str, measured: Mapping[str, Any], sample: Sample | None) -> None:
    ran = _ran(job)
    values = (job.id, job.attempt, *(ran[name] for name in SHAPE), phase)
    with store.write(durable=False) as db:
        row = db.execute(
            "INSERT INTO peak (at_s, job, attempt, model, width, height, num_frames, phase, measured_bytes, measured_s,"
            " sample) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                store.now(),
                *values,
                measured.get("peak_bytes"),
                measured.get("seconds"),
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
    found = calibrate(samples(store), kind_of(machine.gpus[index], machine, plan.request, plan.levers))
    return found if found.samples else None


def calibration_of(store: Store, job: Job, machine: Machine | None, slot: int) -> Calibration | None:
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


def usual_seconds(store: Store, job: Job) -> dict[str, float]:
    """Phase -> median seconds of earlier runs of the same model and size: the stuck watch's deadlines."""
    ran = _ran(job)
    rows = store.rows(
        "SELECT phase, measured_s FROM peak WHERE model = ? AND width = ? AND height = ? AND num_frames = ?"
        " AND measured_s IS NOT NULL ORDER BY id DESC LIMIT ?",
        *(ran[name] for name in SHAPE),
        HISTORY,
    )
    return medians([(row["phase"], row["measured_s"]) for row in rows])


def _ran(job: Job) -> dict[str, Any]:
    return dict((job.plan or {}).get("request") or job.request)


def _planned(job: Job, machine: Machine | None, slot: int) -> tuple[Plan, Machine] | None:
    """The plan that ran on a card, or None: no card, no plan, or a row of another version."""
    if machine is None or slot >= len(machine.gpus) or not job.plan:
        return None
    try:
        plan = Plan.model_validate(job.plan)
    except ValidationError:
        return None
    return None if _card_index(plan) is None else (plan, machine)


def _sample(job: Job, event: Event, machine: Machine | None, slot: int, nvml_bytes: int | None) -> Sample | None:
    """Measured work memory beside the predicted one, both without the weights, which are known exactly."""
    planned_on, fields = _planned(job, machine, slot), event.fields
    if planned_on is None or not fields.get("peak_bytes"):
        return None
    plan, card = planned_on
    phase = next((phase for phase in plan.phases if phase.name == fields["name"]), None)
    if phase is None:
        return None
    return Sample(
        kind=kind_of(card.gpus[slot], card, plan.request, plan.levers),
        phase=phase.name,
        predicted_bytes=work_bytes(plan, phase),
        measured_bytes=max(0, fields["peak_bytes"] - (fields.get("weights_bytes") or phase.weights_bytes)),
        reserved_bytes=fields.get("reserved_bytes"),
        nvml_bytes=nvml_bytes,
    )


def _failed(job: Job, event: Event, machine: Machine | None, slot: int) -> Sample | None:
    """What an out-of-memory says: work memory was at least what the budget had beside the weights."""
    planned_on = _planned(job, machine, slot)
    phase = next((p for p in planned_on[0].phases if p.name == event.fields.get("field")), None) if planned_on else None
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
