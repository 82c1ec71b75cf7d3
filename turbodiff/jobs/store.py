"""The queue on disk. Every process of the app reads and writes it; only the supervisor starts and ends attempts.

    submit -> queued -> running -> verifying -> done
                 ^          |           |
                 |__________|___________|-> failed | cancelled | parked (needs a person)

A row is acknowledged when its commit is on disk. Every move that a worker causes is fenced by (job, attempt): the
words of an earlier attempt change nothing. Done, failed and cancelled never change again; order is by place, then id,
never by the clock.
"""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from turbodiff.jobs import journal
from turbodiff.jobs.acceptance import Acceptance, Asker, insert_job
from turbodiff.jobs.database import Database, as_column
from turbodiff.jobs.journal import Accepted, remove_entry, write_entry
from turbodiff.jobs.rows import LARGEST, UNREADABLE, asked_of, parsed, record_of
from turbodiff.spec.clips import UNKNOWN_REQUEST, ClipResult, Sidecar, read_record
from turbodiff.spec.errors import RequestError
from turbodiff.spec.events import Event, JobError, make_event
from turbodiff.spec.jobs import Outcome, Progress, QueuedJob, State
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request


class Store(Database):
    """The jobs of one state folder, and what people ask of the supervisor."""

    _acceptance: Acceptance | None = None

    def close(self) -> None:
        """Close the connections; the store object is of no use afterwards."""
        with self._lock:
            if self._acceptance is not None:
                self._acceptance.close()
        super().close()

    # --- people: submit, look, cancel; more in waiting.py -------------------------------------------------------------

    def submit(
        self, request: Request, plan: Plan | None = None, *, client: str = "", user: str = "", parent: int | None = None
    ) -> int:
        """Put a job in the queue and return its id; see `submit_all`."""
        return self.submit_all([(request, plan)], client=client, user=user, parent=parent)[0]

    def submit_all(
        self,
        asked: Sequence[tuple[Request, Plan | None]],
        *,
        client: str = "",
        user: str = "",
        parent: int | None = None,
        expires_s: float | None = None,
    ) -> list[int]:
        """Put jobs in the queue, all or none, and return their ids; a nonce that is known returns the job it made. What
        still waits at `expires_s` (Unix seconds) ends then.

        Where another program holds the database, they are accepted into the journal alone, under the ids that the
        database will give them; see `take_in`. Threads that ask at the same time share one wait for the disk.

        Raises:
            RequestError: this user, or this client without a name, already has as many jobs waiting as may wait; a
                nonce is another user's.
            OutputError: the disk refused; nothing is queued.
        """
        return self._accepting().submit_all(asked, Asker(client, user, parent, expires_s))

    def take_in(self) -> list[int]:
        """Give rows to the jobs that were accepted while another program held the database; returns their ids."""
        return self._accepting().take_in()

    def _accepting(self) -> Acceptance:
        with self._lock:
            self._acceptance = self._acceptance or Acceptance(self.path.parent, self.now)
            return self._acceptance

    def restore(self, entry: Accepted) -> None:
        """Put an accepted job that this database lacks back into the queue, under its number if that is free."""
        with self.write() as db:
            insert_job(db, entry)

    def job(self, job: int) -> QueuedJob:
        """One job.

        Raises:
            RequestError: there is no such job.
        """
        found = [as_job(row) for row in self.rows("SELECT * FROM job WHERE id = ?", job)]
        found = found or [waiting for waiting in self._put_off_jobs() if waiting.id == job]
        if not found:
            raise RequestError(
                "no such job", code="job_unknown", field="job", got=job, try_instead="turbodiff jobs list"
            )
        return found[0]

    def jobs(self, limit: int = 50, states: Sequence[State] = (), user: str = "") -> list[QueuedJob]:
        """The newest jobs first; with `states`, only those; with `user`, only of that one."""
        tests, values = ["1"], [*states, *([user] if user else [])]
        tests += [f"state IN ({','.join('?' * len(states))})"] if states else []
        tests += ["user = ?"] if user else []
        query = f"SELECT * FROM job WHERE {' AND '.join(tests)} ORDER BY id DESC LIMIT ?"
        return [as_job(row) for row in self.rows(query, *values, limit)]

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
        put_off = self._put_off_jobs()
        return [*reversed(put_off), *map(as_job, rows)], int(waiting) + len(put_off)

    def _put_off_jobs(self) -> list[QueuedJob]:
        """The jobs that were accepted and still lack their rows, see `take_in`."""
        waiting = journal.waiting_jobs(self.path.parent)
        return [
            QueuedJob(
                **{name: getattr(entry, name) for name in Accepted.model_fields}, state="queued", place=entry.id,
                attempt=0, slot=0, overrides={}, strikes={}, cap_bytes=None, hold_bytes=None, ask="", progress=None,
                error=None, result=None, started_s=None, ended_s=None,
            )
            for entry in waiting if not self.rows("SELECT 1 FROM job WHERE nonce = ?", entry.nonce)
        ]  # fmt: skip

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
            return self.submit(
                asked.model_copy(update={"nonce": ""}), plan, client=old.client, user=old.user, parent=job
            )
        kept = as_column(asked.model_copy(update={"nonce": old.nonce}))
        clean = "error = NULL, ended_s = NULL, strikes = '{}', overrides = '{}', cap_bytes = NULL, hold_bytes = NULL"
        with self.write() as db:
            db.execute(
                f"UPDATE job SET state = 'queued', request = ?, plan = ?, ask = '', expires_s = NULL, {clean}"
                " WHERE id = ? AND state = 'parked'",
                (kept, as_column(plan), job),
            )
            row = db.execute("SELECT * FROM job WHERE id = ?", (job,)).fetchone()
            write_entry(self.path.parent, Accepted.of(as_job(row)))
        return job

    def duplicate(self, job: int) -> int:
        """The same request once more, as a new job at the end of the queue."""
        old = self.job(job)
        if old.error is UNREADABLE:
            raise RequestError(**UNREADABLE.model_dump(exclude={"exit_code"}))
        return self.submit(old.request.model_copy(update={"nonce": ""}), client=old.client, user=old.user, parent=job)

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
    for name in ("place", "created_s", "started_s", "ended_s", "expires_s"):
        number = values[name]
        if not isinstance(number, int | float) or not abs(number) < LARGEST:
            values[name] = 0.0 if name in ("place", "created_s") else None
    for name in ("attempt", "slot", "overtaken", "cap_bytes", "hold_bytes", "parent"):
        if not isinstance(values[name], int):
            values[name] = 0 if name in ("attempt", "slot", "overtaken") else None
    values |= {name: str(values[name]) for name in ("nonce", "client", "ask", "user")}
    values["request"], values["plan"] = read.request, read.plan
    return QueuedJob(**values)
