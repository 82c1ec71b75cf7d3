"""The queue on disk. Every process of the app reads and writes it; only the supervisor starts and ends attempts.

    submit -> queued -> running -> verifying -> done
                 ^          |           |
                 |__________|___________|-> failed | cancelled | parked (needs a person)

A row is acknowledged when its commit is on disk. Every move that a worker causes is fenced by (job, attempt): the
words of an earlier attempt change nothing. Done, failed and cancelled never change again; order is by place, then id,
never by the clock.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from turbodiff.jobs.database import DATABASE, damage_of, damaged, open_database, store_error
from turbodiff.jobs.journal import Accepted, remove_entry, write_entry
from turbodiff.jobs.rows import LARGEST, UNREADABLE, SqlValue, as_column, asked_of, parsed, record_of
from turbodiff.spec.clips import UNKNOWN_REQUEST, ClipResult, Sidecar, read_record
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.events import Event, JobError, make_event
from turbodiff.spec.jobs import Outcome, Progress, QueuedJob, State, Where
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

MAX_QUEUED_PER_CLIENT = 20  # one browser cannot fill the queue for everybody


class Store:
    """The database of one state folder; safe to share between threads, cheap to open in each process.

    Raises:
        FileError: the database is damaged or newer than this program.
        OutputError: it cannot be written (also from every writing method: disk full, read-only).
    """

    def __init__(self, state: Path, now: Callable[[], float] = time.time) -> None:
        self.path = Path(state) / DATABASE
        self.now = now
        self._lock = threading.RLock()
        self._db = open_database(self.path)

    def close(self) -> None:
        """Close the connection; the store object is of no use afterwards."""
        with self._lock:
            self._db.close()

    @contextmanager
    def write(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One short transaction: committed and on disk when the block ends, rolled back if it raises.

        With `durable` False a power cut (no crash) may undo it: progress and samples are not worth an fsync each.
        """
        with self._lock, self._in_words():
            try:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def rows(self, sql: str, *values: SqlValue) -> list[sqlite3.Row]:
        """The rows of one query."""
        with self._lock, self._in_words():
            return self._db.execute(sql, values).fetchall()

    def damage(self) -> str:
        """What is wrong with the database, "" for a sound one."""
        try:
            with self._lock, self._in_words():
                return damage_of(self._db)
        except FileError as error:
            return error.what

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise store_error(self.path, error) from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # its subclasses are our own mistakes
                raise
            raise damaged(self.path, error) from error

    # --- people: submit, look, cancel, reorder -------------------------------------------------------------------

    def submit(self, request: Request, plan: Plan | None = None, *, client: str = "", parent: int | None = None) -> int:
        """Put a job in the queue and return its id; see `submit_all`."""
        return self.submit_all([(request, plan)], client=client, parent=parent)[0]

    def submit_all(
        self, asked: Sequence[tuple[Request, Plan | None]], *, client: str = "", parent: int | None = None
    ) -> list[int]:
        """Put jobs in the queue, all or none, and return their ids; a nonce that is known returns the job it made.

        Raises:
            RequestError: this client already has 20 jobs waiting.
            OutputError: the disk refused; nothing is queued.
        """
        made: list[int] = []
        written: list[str] = []
        try:
            with self.write() as db:
                for request, plan in asked:
                    nonce = request.nonce or secrets.token_hex(16)
                    known = db.execute("SELECT id FROM job WHERE nonce = ?", (nonce,)).fetchone()
                    if known:
                        made.append(int(known["id"]))
                        continue
                    _check_share(db, client)
                    request = request.model_copy(update={"nonce": nonce})
                    cursor = db.execute(
                        "INSERT INTO job (nonce, client, state, place, request, plan, parent, created_s)"
                        " VALUES (?, ?, 'queued', 0, ?, ?, ?, ?)",
                        (nonce, client, as_column(request), as_column(plan), parent, self.now()),
                    )
                    made.append(cursor.lastrowid or 0)
                    db.execute("UPDATE job SET place = id WHERE id = ?", (made[-1],))
                    row = db.execute("SELECT * FROM job WHERE id = ?", (made[-1],)).fetchone()
                    written.append(nonce)
                    write_entry(self.path.parent, accepted_of(as_job(row)))
        except BaseException:  # else the next start would queue what was refused
            for nonce in written:
                remove_entry(self.path.parent, nonce)
            raise
        return made

    def restore(self, entry: Accepted) -> None:
        """Put an accepted job that this database lacks back into the queue, under its number if that is free."""
        with self.write() as db:
            cursor = db.execute(
                "INSERT INTO job (id, nonce, client, state, place, request, plan, parent, created_s) VALUES"
                " (CASE WHEN ?1 > 0 AND NOT EXISTS (SELECT 1 FROM job WHERE id = ?1) THEN ?1 END,"
                " ?2, ?3, 'queued', 0, ?4, ?5, ?6, ?7)",
                (
                    entry.id,
                    entry.nonce,
                    entry.client,
                    as_column(entry.request),
                    as_column(entry.plan),
                    entry.parent,
                    entry.created_s,
                ),
            )
            db.execute("UPDATE job SET place = id WHERE id = ?", (cursor.lastrowid,))

    def job(self, job: int) -> QueuedJob:
        """One job.

        Raises:
            RequestError: there is no such job.
        """
        found = self.rows("SELECT * FROM job WHERE id = ?", job)
        if not found:
            raise RequestError(
                "no such job", code="job_unknown", field="job", got=job, try_instead="turbodiff jobs list"
            )
        return as_job(found[0])

    def jobs(self, limit: int = 50, states: Sequence[State] = ()) -> list[QueuedJob]:
        """The newest jobs first; with `states`, only those."""
        marks = ",".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        return [as_job(row) for row in self.rows(f"SELECT * FROM job {where} ORDER BY id DESC LIMIT ?", *states, limit)]

    def overview(self, limit: int = 80) -> tuple[list[QueuedJob], int]:
        """What a page shows of the queue, the newest first, and how many jobs wait in all.

        That is all that runs, what runs next and what came last, at most `limit` of each of the two.
        """
        running = "SELECT id FROM job WHERE state IN ('running', 'verifying')"
        first = "SELECT id FROM (SELECT id FROM job WHERE state = 'queued' ORDER BY place, id LIMIT ?1)"
        last = "SELECT id FROM (SELECT id FROM job WHERE state != 'queued' ORDER BY id DESC LIMIT ?1)"
        rows = self.rows(
            f"SELECT * FROM job WHERE id IN ({running} UNION {first} UNION {last}) ORDER BY id DESC", limit
        )
        waiting = self.rows("SELECT count(*) AS n FROM job WHERE state = 'queued'")[0]["n"]
        return [as_job(row) for row in rows], int(waiting)

    def queue(self) -> list[QueuedJob]:
        """The waiting jobs in the order they will run."""
        return [as_job(row) for row in self.rows("SELECT * FROM job WHERE state = 'queued' ORDER BY place, id")]

    def events(self, job: int, after: int = 0) -> list[tuple[int, Event]]:
        """The events of a job with their sequence numbers, oldest first; only those behind `after`.

        Rows that another version wrote and that cannot be read are left out.
        """
        found = []
        for row in self.rows("SELECT * FROM event WHERE job = ? AND seq > ? ORDER BY seq", job, after):
            envelope = {name: row[name] for name in ("job", "attempt", "t_s")}
            with suppress(ValueError, TypeError):
                found.append((row["seq"], make_event(row["type"], parsed(row["fields"]), **envelope)))
        return found

    def cancel(self, job: int) -> State:
        """Cancel: a waiting job at once, a running one at its next step; over stays over. Returns the state now."""
        with self.write() as db:
            db.execute(
                "UPDATE job SET state = 'cancelled', ended_s = ? WHERE id = ? AND state IN ('queued', 'parked')",
                (self.now(), job),
            )
            db.execute("UPDATE job SET ask = 'cancel' WHERE id = ? AND state = 'running'", (job,))
        now = self.job(job)
        if now.over:
            remove_entry(self.path.parent, now.nonce)
        return now.state

    def stop_and_decode(self, job: int) -> None:
        """Ask a running job to stop stepping and turn what it has into a clip."""
        with self.write() as db:
            db.execute("UPDATE job SET ask = 'stop_and_decode' WHERE id = ? AND state = 'running' AND ask = ''", (job,))

    def retry(self, job: int, request: Request | None = None, plan: Plan | None = None) -> int:
        """Run a job again, perhaps with another request; returns the id of the row that will run.

        A parked job goes back to the queue itself; one that is over keeps its row and gets a child.

        Raises:
            RequestError: the job is unknown, or still waiting or running.
        """
        old = self.job(job)
        if not old.over and old.state != "parked":
            raise RequestError(
                f"job {job} is {old.state}",
                code="job_not_over",
                field="job",
                got=old.state,
                try_instead=f"turbodiff jobs cancel {job}",
            )
        if old.error is UNREADABLE and request is None:
            raise RequestError(**UNREADABLE.model_dump(exclude={"exit_code"}))
        asked = request or old.request
        if old.over:
            return self.submit(asked.model_copy(update={"nonce": ""}), plan, client=old.client, parent=job)
        kept = as_column(asked.model_copy(update={"nonce": old.nonce}))
        clean = "error = NULL, ended_s = NULL, strikes = '{}', overrides = '{}', cap_bytes = NULL, hold_bytes = NULL"
        with self.write() as db:
            db.execute(
                f"UPDATE job SET state = 'queued', request = ?, plan = ?, ask = '', {clean}"
                " WHERE id = ? AND state = 'parked'",
                (kept, as_column(plan), job),
            )
            row = db.execute("SELECT * FROM job WHERE id = ?", (job,)).fetchone()
            write_entry(self.path.parent, accepted_of(as_job(row)))
        return job

    def duplicate(self, job: int) -> int:
        """The same request once more, as a new job at the end of the queue."""
        old = self.job(job)
        if old.error is UNREADABLE:
            raise RequestError(**UNREADABLE.model_dump(exclude={"exit_code"}))
        return self.submit(old.request.model_copy(update={"nonce": ""}), client=old.client, parent=job)

    def move(self, job: int, where: Where) -> None:
        """Move a waiting job in the queue; any other job stays as it is."""
        order = [row["id"] for row in self.rows("SELECT id FROM job WHERE state = 'queued' ORDER BY place, id")]
        if job not in order:
            return
        at = order.index(job)
        to = {"first": 0, "up": max(at - 1, 0), "down": at + 1, "last": len(order)}[where]
        order.remove(job)
        order.insert(to, job)
        with self.write() as db:
            places = sorted(row["place"] for row in db.execute("SELECT place FROM job WHERE state = 'queued'"))
            for place, moved in zip(places, order, strict=False):
                db.execute("UPDATE job SET place = ? WHERE id = ? AND state = 'queued'", (place, moved))

    @property
    def paused(self) -> bool:
        """Whether a person paused the queue."""
        return bool(self.fact("paused"))

    def delete(self, job: int) -> bool:
        """Forget a job that is not waiting or running; its clip stays on disk. True if a row went."""
        with self.write() as db:
            marks = "('done', 'failed', 'cancelled', 'parked')"
            gone = db.execute(f"DELETE FROM job WHERE id = ? AND state IN {marks} RETURNING nonce", (job,)).fetchall()
        for row in gone:
            remove_entry(self.path.parent, row["nonce"])
        return bool(gone)

    # --- controls and facts --------------------------------------------------------------------------------------

    def ask(self, what: str, by: str = "") -> int:
        """Ask the supervisor for something ("restart", "stop"); returns a control id to watch with `outcome`."""
        with self.write() as db:
            cursor = db.execute(
                "INSERT INTO control (what, fields, asked_by, at_s) VALUES (?, '{}', ?, ?)", (what, by, self.now())
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def take_controls(self) -> list[tuple[int, str]]:
        """What has been asked and not been taken (id, what), oldest first; each is handed out once."""
        if not self.rows("SELECT 1 FROM control WHERE taken_s IS NULL LIMIT 1"):
            return []
        with self.write() as db:
            found = db.execute("SELECT id, what FROM control WHERE taken_s IS NULL ORDER BY id").fetchall()
            db.execute("UPDATE control SET taken_s = ? WHERE taken_s IS NULL", (self.now(),))
        return [(row["id"], row["what"]) for row in found]

    def answer(self, control: int, outcome: Outcome) -> None:
        """What came of a control."""
        with self.write() as db:
            values = (outcome.model_dump_json(exclude_unset=True), control)
            db.execute("UPDATE control SET outcome = ? WHERE id = ?", values)

    def outcome(self, control: int) -> Outcome | None:
        """What came of a control, or None while it is under way."""
        found = self.rows("SELECT outcome FROM control WHERE id = ? AND outcome IS NOT NULL", control)
        return Outcome.model_validate(parsed(found[0]["outcome"]) or {}) if found else None

    def put(self, name: str, value: object, durable: bool = True) -> None:
        """Keep one small fact (probe sample, supervisor status, pause) under its name."""
        with self.write(durable) as db:
            db.execute(
                "INSERT INTO fact VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value,"
                " at_s = excluded.at_s",
                (name, json.dumps(value), self.now()),
            )

    def fact(self, name: str) -> Any:
        """The fact of that name, or None."""
        found = self.rows("SELECT value FROM fact WHERE name = ?", name)
        return parsed(found[0]["value"]) if found else None


def _check_share(db: sqlite3.Connection, client: str) -> None:
    """Refuse a job of a client who has too many waiting; "": the person's own."""
    mine = "SELECT count(*) FROM job WHERE client = ? AND state = 'queued'"
    waiting = db.execute(mine, (client,)).fetchone()[0] if client else 0
    if waiting >= MAX_QUEUED_PER_CLIENT:
        raise RequestError(
            "too many jobs of yours are waiting",
            code="queue_full",
            field="job",
            got=waiting,
            expected=f"at most {MAX_QUEUED_PER_CLIENT}",
            try_instead="wait for one to finish, or cancel one",
        )


def accepted_of(job: QueuedJob) -> Accepted:
    """What the journal keeps of a job of the queue."""
    return Accepted(
        id=job.id, nonce=job.nonce, client=job.client, parent=job.parent, created_s=job.created_s, request=job.request,
        plan=job.plan,
    )  # fmt: skip


def as_job(row: sqlite3.Row) -> QueuedJob:
    """The job of one row; what another version wrote differently, or a disk damaged, takes its default.

    A row whose request is lost has the error UNREADABLE.
    """
    values = dict(row)
    read = asked_of(values["request"], values["plan"])
    for name, kind in (("overrides", str), ("strikes", int)):
        found = parsed(values[name])
        values[name] = {k: v for k, v in found.items() if isinstance(v, kind)} if isinstance(found, dict) else {}
    values["error"], values["result"] = record_of(JobError, values["error"]), record_of(ClipResult, values["result"])
    if read is None:
        read = read_record(Sidecar, {"request": dict(UNKNOWN_REQUEST)})
        assert read is not None
        values["error"] = UNREADABLE
    progress = parsed(values["progress"])
    values["progress"] = None
    with suppress(ValueError):
        values["progress"] = Progress.model_validate(progress) if progress else None
    for name in ("place", "created_s", "started_s", "ended_s"):
        number = values[name]
        if not isinstance(number, int | float) or not abs(number) < LARGEST:
            values[name] = None if name in ("started_s", "ended_s") else 0.0
    for name in ("attempt", "slot", "cap_bytes", "hold_bytes", "parent"):
        if not isinstance(values[name], int):
            values[name] = 0 if name in ("attempt", "slot") else None
    values |= {name: str(values[name]) for name in ("nonce", "client", "ask")}
    values["request"], values["plan"] = read.request, read.plan
    return QueuedJob(**values)
