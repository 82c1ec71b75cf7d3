"""The queue, its failures and its cards in Prometheus' text format (exposition format 0.0.4).

Everything is read from the store when it is asked for: nothing counts beside the queue, and a restart loses nothing.
Labels are the states, the models and error codes of this version, and the cards that are here: what a request says is
none.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from statistics import quantiles

from turbodiff.jobs import cards
from turbodiff.jobs.measurements import planned_phase
from turbodiff.jobs.rows import parsed, record_of
from turbodiff.jobs.store import Store
from turbodiff.spec.events import JobError
from turbodiff.spec.models import all_models
from turbodiff.spec.wording import shared_catalogue

STATES = ("queued", "running", "verifying", "done", "failed", "cancelled", "parked")
NEWEST, FAILURES = 200, 5000  # rows that are looked at
Labels = tuple[tuple[str, str], ...]


def metrics_text(store: Store) -> str:
    """Every metric of a store."""
    count = {row["state"]: row["n"] for row in store.rows("SELECT state, count(*) AS n FROM job GROUP BY state")}
    lines = _metric("jobs", "Jobs by state.", {(("state", name),): count.get(name, 0) for name in STATES})
    oldest = store.rows("SELECT min(created_s) AS s FROM job WHERE state = 'queued'")[0]["s"]
    lines += _metric("oldest_waiting_seconds", "Age of the oldest job that waits.",
                     {(): max(0.0, store.now() - oldest) if isinstance(oldest, int | float) else 0.0})  # fmt: skip
    lines += _waits(store)
    fleet = cards.fleet(store)
    if fleet is not None:
        ends = [start.start_s for start in fleet.starts().values()]
        lines += _metric("predicted_wait_seconds", "Predicted start of the last waiting job that is priced.",
                         {(): max(ends, default=0.0)})  # fmt: skip
        busy = {worker.slot: float(worker.busy_s > 0) for worker in fleet.workers}
        on: dict[Labels, float] = {
            (("slot", str(card.slot)), ("card", card.name)): busy.get(card.slot, 0.0) for card in fleet.cards
        }
        lines += _metric("card_busy", "1 for a card with a job, 0 for an idle, paused or excluded one.", on)
    return "\n".join([*lines, *_steps(store), *_peaks(store), *_failures(store), ""])


def _metric(name: str, about: str, samples: Mapping[Labels, float]) -> list[str]:
    """The lines of one gauge."""
    full = f"turbodiff_{name}"
    lines = [f"# HELP {full} {about}", f"# TYPE {full} gauge"]
    for labels, value in samples.items():
        told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
        lines.append(f"{full}{{{told}}} {value:.6g}" if told else f"{full} {value:.6g}")
    return lines


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _quantiles(values: Iterable[float]) -> dict[Labels, float]:
    found = sorted(values)
    cuts = quantiles(found, n=100, method="inclusive") if len(found) > 1 else [*found * 99]
    return {(("quantile", f"{percent / 100:g}"),): cuts[percent - 1] for percent in (50, 95, 99) if cuts}


def _waits(store: Store) -> list[str]:
    rows = store.rows(
        "SELECT created_s, started_s FROM job WHERE attempt = 1 AND started_s IS NOT NULL ORDER BY id DESC LIMIT ?",
        NEWEST,
    )
    waits = [
        max(0.0, row["started_s"] - row["created_s"]) for row in rows if _numbers(row["started_s"], row["created_s"])
    ]
    return _metric("wait_seconds", f"Time to the start, of the newest {NEWEST} jobs that started.", _quantiles(waits))


def _numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _model(name: object) -> str:
    """A model of this version; of anything else "other"."""
    return str(name) if name in {spec.name for spec in all_models()} else "other"


def _steps(store: Store) -> list[str]:
    """The last step of each of the newest jobs: one row of a job is kept."""
    rows = store.rows(
        "SELECT event.fields, peak.model FROM event JOIN peak ON peak.job = event.job WHERE event.type = 'step'"
        " AND peak.id > (SELECT coalesce(max(id), 0) FROM peak) - ? GROUP BY event.seq",
        NEWEST,
    )
    took = defaultdict[str, list[float]](list)
    for row in rows:
        step = parsed(row["fields"])
        if isinstance(step, dict) and _numbers(step.get("dt_s")):
            took[_model(row["model"])].append(step["dt_s"])
    about = f"Mean time of a denoising step, over the newest {NEWEST} measured phases."
    return _metric("step_seconds", about, {(("model", name),): sum(all_s) / len(all_s) for name, all_s in took.items()})


def _peaks(store: Store) -> list[str]:
    rows = store.rows(
        "SELECT job, model, phase, measured_bytes FROM peak WHERE measured_bytes > 0 ORDER BY id DESC LIMIT ?", NEWEST
    )
    jobs = {row["job"] for row in rows}
    known = {job.id: job for job in store.jobs(NEWEST) if job.id in jobs}
    most, ratio = dict[Labels, float](), dict[Labels, float]()
    for row in rows:
        label, job = (("model", _model(row["model"])),), known.get(row["job"])
        most[label] = max(most.get(label, 0.0), row["measured_bytes"])
        planned = planned_phase(job.plan, row["phase"]) if job else None
        if planned and planned.peak_bytes:
            ratio[label] = max(ratio.get(label, 0.0), row["measured_bytes"] / planned.peak_bytes)
    lines = _metric("peak_bytes", f"Largest measured peak of the newest {NEWEST} phases.", most)
    return lines + _metric(
        "peak_to_plan_ratio", "Largest measured peak of a phase, as a share of the planned one.", ratio
    )


def _failures(store: Store) -> list[str]:
    rows = store.rows("SELECT error FROM job WHERE state IN ('failed', 'parked') ORDER BY id DESC LIMIT ?", FAILURES)
    found = Counter[str]()
    for row in rows:
        error = record_of(JobError, row["error"])
        code = error.code if error else ""
        found[code if f"error.{code}" in shared_catalogue() else "other"] += 1
    about = f"Failed and parked jobs by error code, of the newest {FAILURES}."
    return _metric("failed_jobs", about, {(("code", code),): number for code, number in sorted(found.items())})
