"""Attempts: how the supervisor starts, notes and ends the runs of a job, each fenced by (job, attempt)."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

from turbodiff.jobs.database import SqlValue, as_column
from turbodiff.jobs.dispatch import Choice
from turbodiff.jobs.journal import remove_entry
from turbodiff.jobs.rows import UNREADABLE, JobColumns, parsed, record_of
from turbodiff.jobs.store import Store
from turbodiff.jobs.waiting import held_until
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.events import Event
from turbodiff.spec.jobs import OVER, Progress, QueuedJob, State

IN_PLACE = {"step", "progress", "preview"}  # progress is one row, replaced, so a day of work is not a million rows
NOT_KEPT = {"hello", "beat", "link", "result"}  # of the worker, or with a column of their own
HOLD_REST_S = 5.0
HOLD_COLUMNS = "id, request, CAST(hold_bytes AS INTEGER) AS hold_bytes, CAST(started_s AS REAL) AS started_s"


class Hold(NamedTuple):
    """What a waiting job may wait for: device memory (since when), the clip of another job, by its nonce, a card."""

    bytes: int | None = None
    since_s: float | None = None
    after: str = ""
    gpu: str = ""

    @classmethod
    def of(cls, job: QueuedJob) -> "Hold":
        """The hold of a job of the queue."""
        return cls(job.hold_bytes, job.started_s, job.request.after, job.request.gpu)


def claim(
    store: Store, slot: int = 0, free_bytes: int | None = None, chosen: Choice | None = None, gpu: str = ""
) -> QueuedJob | None:
    """Start the next attempt of the next waiting job that `may_start`, or None: queue empty, paused, or held back. With
    `chosen` that job alone is meant, and those that it passes by are counted with it. `gpu`: the UUID of the card.
    """
    if store.paused or held_until(store) or not store.rows("SELECT 1 FROM job WHERE state = 'queued' LIMIT 1"):
        return None
    with store.write() as db:
        rows = db.execute(
            f"SELECT {HOLD_COLUMNS} FROM job WHERE state = 'queued' AND id = coalesce(?, id)"
            " AND coalesce(expires_s > ?, 1) ORDER BY place, id",
            (chosen and chosen.job, store.now()),
        )
        row = next((row for row in rows if may_start(store, hold_of(row), free_bytes, gpu)), None)
        if row is None:
            return None
        db.execute(
            "UPDATE job SET state = 'running', attempt = attempt + 1, slot = ?, started_s = ?, ask = '',"
            " hold_bytes = NULL, progress = NULL WHERE id = ?",
            (slot, store.now(), row["id"]),
        )
        passed = [(job,) for job in chosen.passes] if chosen else []
        db.executemany("UPDATE job SET overtaken = overtaken + 1 WHERE id = ? AND state = 'queued'", passed)
    job = store.job(row["id"])
    if job.error is UNREADABLE:
        move_job(store, job.id, job.attempt, "parked", error=UNREADABLE)
        return claim(store, slot, free_bytes, chosen, gpu)
    return job


def may_start(store: Store, hold: Hold, free_bytes: int | None, gpu: str) -> bool:
    """Whether a waiting job waits for nothing but the worker of a card: the rule of `claim` and of dispatch.

    A job that continues the clip of another (`after`, a nonce) waits until that one is done. A job on hold is passed
    over until `free_bytes` (None: unknown, which holds nothing back) covers it, and for five seconds at least: a worker
    that counts otherwise must not be asked ten times a second. One that is for a card alone starts on no other.
    """
    if hold.gpu not in ("", gpu):
        return False
    if hold.bytes is not None:
        if free_bytes is not None and hold.bytes > free_bytes:
            return False
        if hold.since_s is not None and abs(store.now() - hold.since_s) < HOLD_REST_S:
            return False
    return not hold.after or bool(clip_before(store, hold.after))


def hold_of(row: sqlite3.Row) -> Hold:
    """The hold of a row, of HOLD_COLUMNS; what cannot be read waits for nobody."""
    asked = parsed(row["request"])
    after, gpu = (str(asked.get(name) or "") if isinstance(asked, dict) else "" for name in ("after", "gpu"))
    return Hold(row["hold_bytes"], row["started_s"], after, gpu)


def clip_before(store: Store, nonce: str) -> str:
    """The clip of the job of that nonce; where it failed and was run again, of the newest that is done. "" while none
    is."""
    rows = store.rows(
        "WITH RECURSIVE family (id, first) AS (SELECT id, 1 FROM job WHERE nonce = ? UNION"
        " SELECT job.id, 0 FROM job JOIN family ON job.parent = family.id)"
        " SELECT job.result FROM job JOIN family ON job.id = family.id WHERE job.state = 'done'"
        " ORDER BY family.first DESC, job.id DESC LIMIT 1",
        nonce,
    )
    result = record_of(ClipResult, rows[0]["result"]) if rows else None
    return result.path if result else ""


def move_job(
    store: Store,
    job: int,
    attempt: int,
    to: State,
    *,
    out_of: Sequence[State] = ("running", "verifying"),
    **columns: Unpack[JobColumns],
) -> bool:
    """Move an attempt to another state and set columns with it; False if that attempt is no longer current."""
    values: dict[str, SqlValue] = {name: as_column(value) for name, value in columns.items()}  # type: ignore[arg-type]
    values["state"] = to
    if to in OVER or to == "parked":
        values |= {"ended_s": store.now(), "ask": "", "progress": None}
    sets = ", ".join(f"{name} = ?" for name in values)
    marks = ",".join("?" * len(out_of))
    with store.write() as db:
        done = db.execute(
            f"UPDATE job SET {sets} WHERE id = ? AND attempt = ? AND state IN ({marks})",
            (*values.values(), job, attempt, *out_of),
        )
        if to in OVER:
            db.execute("DELETE FROM event WHERE job = ? AND type = 'preview'", (job,))
        ended = db.execute("SELECT nonce FROM job WHERE id = ?", (job,)).fetchone() if to in OVER else None
    if ended and done.rowcount == 1:
        remove_entry(store.path.parent, ended["nonce"])
    return done.rowcount == 1


def record_event(store: Store, event: Event, progress: Progress | None = None) -> bool:
    """Keep an event of a current attempt, and the progress it means; False for an earlier attempt's words."""
    if event.type in NOT_KEPT:
        return True
    if event.type == "plan":  # the one that really runs, in the job's own row
        with store.write(durable=False) as db:
            values = (as_column(event.plan), event.job, event.attempt)
            return db.execute("UPDATE job SET plan = ? WHERE id = ? AND attempt = ?", values).rowcount == 1
    how = "INSERT OR REPLACE" if event.type in IN_PLACE else "INSERT"
    with store.write(durable=False) as db:  # a power cut ends the attempt, too; its end is durable
        current = db.execute(
            "SELECT 1 FROM job WHERE id = ? AND attempt = ? AND state IN ('running', 'verifying')",
            (event.job, event.attempt),
        ).fetchone()
        if current is None:
            return False
        db.execute(
            f"{how} INTO event (job, attempt, type, t_s, at_s, fields) VALUES (?, ?, ?, ?, ?, ?)",
            (event.job, event.attempt, event.type, event.t_s, store.now(), event.model_dump_json()),
        )
        if progress is not None:
            db.execute("UPDATE job SET progress = ? WHERE id = ?", (progress.model_dump_json(), event.job))
    return True


def finish_job(store: Store, job: int, attempt: int, result: ClipResult) -> bool:
    """Done, with its clip as an artifact, in one transaction; False if the attempt is not current."""
    with store.write() as db:
        done = db.execute(
            "UPDATE job SET state = 'done', result = ?, error = NULL, progress = NULL, ask = '', ended_s = ?"
            " WHERE id = ? AND attempt = ? AND state IN ('running', 'verifying')",
            (as_column(result), store.now(), job, attempt),
        )
        if done.rowcount != 1:
            return False
        add_artifact(db, job, attempt, result, store.now())
        db.execute("DELETE FROM event WHERE job = ? AND type = 'preview'", (job,))
        nonce = db.execute("SELECT nonce FROM job WHERE id = ?", (job,)).fetchone()["nonce"]
    remove_entry(store.path.parent, nonce)
    return True


def add_artifact(db: sqlite3.Connection, job: int, attempt: int, result: ClipResult, at_s: float) -> None:
    """The clip of a `result` as a row, inside the caller's transaction."""
    path = Path(result.path)
    db.execute(
        "INSERT OR REPLACE INTO artifact (job, attempt, path, sha256, bytes, frames, width, height, fps, seconds, at_s)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            job,
            attempt,
            str(path),
            result.sha256,
            path.stat().st_size if path.exists() else 0,
            result.frames,
            result.width,
            result.height,
            result.fps,
            result.seconds,
            at_s,
        ),
    )
