"""Measured peaks and seconds per phase: what corrects the next plan (plan/calibration.py) and the stuck deadlines."""

from typing import Any

from pydantic import ValidationError

from turbodiff.jobs.store import Job, Store
from turbodiff.jobs.stuck import usual_seconds as medians
from turbodiff.plan.calibration import Calibration, Kind, Sample, calibrate
from turbodiff.plan.candidates import INT8_BELOW_BYTES
from turbodiff.plan.machine import Machine
from turbodiff.spec.events import Event
from turbodiff.spec.request import Request

HISTORY = 300  # rows that are looked at: 50 runs of six phases


def planned(job: Job | None, phase: str) -> dict[str, Any]:
    """The plan's own row for a phase, {} without a plan."""
    phases = (job.plan or {}).get("phases", ()) if job else ()
    return next((dict(row) for row in phases if row["name"] == phase), {})


def planned_bytes(job: Job | None, event: Event) -> int | None:
    """The predicted peak of the phase that an event is about."""
    return planned(job, str(event.fields.get("name", ""))).get("peak_bytes") if event.type == "phase" else None


def record(store: Store, job: Job | None, event: Event, machine: Machine | None, slot: int = 0) -> None:
    """Keep what a finished phase took; with a card and a prediction it also teaches the plan."""
    if job is None or event.type != "phase" or event.fields.get("state") != "done":
        return
    phase, ran = str(event.fields["name"]), _ran(job)
    sample = _sample(job, phase, int(event.fields.get("peak_bytes") or 0), machine, slot)
    with store.write(durable=False) as db:
        db.execute(
            "INSERT INTO peak (at_s, job, attempt, model, width, height, num_frames, phase, measured_bytes, measured_s,"
            " sample) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                store.now(),
                job.id,
                job.attempt,
                *(ran[name] for name in ("model", "width", "height", "num_frames")),
                phase,
                event.fields.get("peak_bytes"),
                event.fields.get("seconds"),
                sample.model_dump_json() if sample else None,
            ),
        )


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


def calibration_for(store: Store, request: Request, machine: Machine, slot: int = 0) -> Calibration | None:
    """What measured runs say about this request on this card; None without a card."""
    if slot >= len(machine.gpus):
        return None
    fields = request.model_dump(mode="json")
    if request.quant_linear == "auto":
        below = (machine.gpus[slot].total_bytes or 0) < INT8_BELOW_BYTES
        fields["quant_linear"] = "on" if below else "off"
    return calibrate(samples(store), _kind(fields, "whole", machine, slot))


def usual_seconds(store: Store, job: Job) -> dict[str, float]:
    """Phase -> median seconds of earlier runs of the same model and size: the stuck watch's deadlines."""
    ran = _ran(job)
    rows = store.rows(
        "SELECT phase, measured_s FROM peak WHERE model = ? AND width = ? AND height = ? AND num_frames = ?"
        " AND measured_s IS NOT NULL ORDER BY id DESC LIMIT ?",
        *(ran[name] for name in ("model", "width", "height", "num_frames")),
        HISTORY,
    )
    return medians([(row["phase"], row["measured_s"]) for row in rows])


def _ran(job: Job) -> dict[str, Any]:
    return dict((job.plan or {}).get("request") or job.request)


def _sample(job: Job, phase: str, peak_bytes: int, machine: Machine | None, slot: int) -> Sample | None:
    """Measured work memory beside the predicted one: both without the weights, which are known exactly."""
    expected = planned(job, phase)
    if not expected or not peak_bytes or machine is None or slot >= len(machine.gpus):
        return None
    vae = str(((job.plan or {}).get("levers") or {}).get("vae", "whole"))
    return Sample(
        kind=_kind(_ran(job), vae, machine, slot),
        phase=phase,
        predicted_bytes=expected["activations_bytes"] + expected["workspace_bytes"],
        measured_bytes=max(0, peak_bytes - expected["weights_bytes"]),
    )


def _kind(ran: dict[str, Any], vae: str, machine: Machine, slot: int) -> Kind:
    gpu = machine.gpus[slot]
    return Kind(
        gpu=gpu.name,
        total_bytes=gpu.total_bytes or 0,
        torch=machine.torch or "",
        cudnn=machine.cudnn or "",
        driver=machine.driver or "",
        attention=ran["attention"],
        model=ran["model"],
        int8=ran["quant_linear"] == "on",
        vae=vae,
        **{name: ran[name] for name in ("width", "height", "num_frames")},
    )
