"""How jobs come into the queue: those who ask at the same time share one transaction and one wait for the disk.

    submit_all -> waits with the others -> rows, then their files in the journal, then the commit -> ids

Every one is answered after its own file, the folder and its row are on disk. A submission is all or nothing; what is
refused of one, or fails with it, is refused to it alone.
"""

import secrets
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from turbodiff.jobs import journal
from turbodiff.jobs.database import LOCKED, PATIENCE_S, Database, as_column
from turbodiff.jobs.fair_share import place_for
from turbodiff.jobs.journal import Accepted, remove_entry
from turbodiff.jobs.users import WAITING, user_named
from turbodiff.spec.errors import OutputError, RequestError
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

MAX_QUEUED_PER_CLIENT = 500  # another machine's script that went wild cannot fill the queue, nor the disk
HELD_PATIENCE_S = 0.2  # with one that is known to hold it: each group of that minute would wait as long
Asked = Sequence[tuple[Request, Plan | None]]


class Asker(NamedTuple):
    """Who asks for jobs, and until when (Unix seconds) they may wait.

    Args:
        client: the address of another machine, "" for this one.
        user: the name of who asks, "" for whoever has none.
        parent: the job that is run again.
    """

    client: str = ""
    user: str = ""
    parent: int | None = None
    expires_s: float | None = None

    @property
    def counted_by(self) -> tuple[str, str]:
        """The column of the queue, and its value, by which waiting jobs are counted for a share."""
        return ("user", self.user) if self.user else ("client", self.client)

    def accepted(self, number: int, now_s: float, request: Request, plan: Plan | None) -> Accepted:
        """One of the jobs, as the journal keeps it."""
        return Accepted(id=number, nonce=request.nonce, created_s=now_s, request=request, plan=plan, **self._asdict())


class Submission(NamedTuple):
    """Jobs that somebody asks for, all or none; `ids` is what is told, or the error."""

    asked: Asked
    asker: Asker
    ids: Future[list[int]]


class Acceptance(Database):
    """Takes jobs in. It has a connection of its own: what others read meanwhile waits for no disk, and sees no row
    before it is committed."""

    def __init__(self, state: Path, now: Callable[[], float]) -> None:
        super().__init__(state, now)
        self._waiting: deque[Submission] = deque()
        self._committer = ThreadPoolExecutor(1, "accept")  # one group at a time; the next gathers meanwhile

    def close(self) -> None:
        """Answer who waits, then close the connection."""
        self._committer.shutdown()
        super().close()

    def submit_all(self, asked: Asked, asker: Asker) -> list[int]:
        """The ids of jobs that are now in the queue; see `Store.submit_all`."""
        named = [(request.model_copy(update={"nonce": request.nonce or secrets.token_hex(16)}), plan)
                 for request, plan in asked]  # fmt: skip
        mine = Submission(named, asker, Future())
        self._waiting.append(mine)
        self._committer.submit(self._accept_waiting)
        return mine.ids.result()

    def _accept_waiting(self) -> None:
        """Accept all who wait by now, together."""
        group = list[Submission]()
        with suppress(IndexError):
            while True:
                group.append(self._waiting.popleft())
        left = [group] if group else []
        while left:
            group = left.pop()
            try:
                told = self._accept(group)
            except BaseException as error:  # noqa: BLE001  whatever it is, it is told to the one it belongs to
                if len(group) == 1:
                    group[0].ids.set_exception(error)
                else:
                    left += [[one] for one in reversed(group)]
                continue
            for one, ids in zip(group, told, strict=True):
                if isinstance(ids, RequestError):
                    one.ids.set_exception(ids)
                else:
                    one.ids.set_result(ids)

    def _accept(self, group: list[Submission]) -> list[list[int] | RequestError]:
        """What is told to each of a group.

        Raises:
            OutputError: the disk refused; nothing of the group is queued.
        """
        with journal.numbering(self.path.parent):
            patience_s = HELD_PATIENCE_S if journal.waiting_jobs(self.path.parent) else PATIENCE_S
            try:
                self.take_in(patience_s)
                return self._insert(group, patience_s)
            except OutputError as error:
                if error.code != LOCKED:
                    raise
            return [self._put_off(one) for one in group]

    def _insert(self, group: list[Submission], patience_s: float) -> list[list[int] | RequestError]:
        told: list[list[int] | RequestError] = []
        entries: list[Accepted] = []
        try:
            with self.write(patience_s=patience_s) as db:
                for one in group:
                    db.execute("SAVEPOINT submission")
                    try:
                        ids, new = self._rows_of(db, one)
                        told.append(ids)
                        entries += new
                    except RequestError as error:
                        db.execute("ROLLBACK TO submission")
                        told.append(error)
                    db.execute("RELEASE submission")
                journal.write_entries(self.path.parent, entries)
        except BaseException:  # else the next start would queue what was refused
            for entry in entries:
                remove_entry(self.path.parent, entry.nonce)
            raise
        return told

    def _rows_of(self, db: sqlite3.Connection, one: Submission) -> tuple[list[int], list[Accepted]]:
        """The ids of a submission's jobs, and those of them that had no row before; a nonce that is known has one."""
        ids, new, asker = list[int](), list[Accepted](), one.asker
        column, name = asker.counted_by
        for request, plan in one.asked:
            known = db.execute("SELECT id, user FROM job WHERE nonce = ?", (request.nonce,)).fetchone()
            if known:
                ids.append(_same_user(known["id"], known["user"], asker))
                continue
            if name:  # this machine has no share, and need not count 10,000 jobs at each submit
                mine = f"SELECT count(*) FROM job WHERE {column} = ? AND state = 'queued'"
                check_share(name, db.execute(mine, (name,)).fetchone()[0], self._most(asker))
            asked = asker.accepted(0, self.now(), request, plan)
            ids.append(insert_job(db, asked))
            new.append(asked.model_copy(update={"id": ids[-1]}))
        return ids, new

    def _most(self, asker: Asker) -> int:
        """How many jobs of whoever asks may wait."""
        user = user_named(self, asker.user)
        return user.most_waiting if user else WAITING if asker.user else MAX_QUEUED_PER_CLIENT

    def _put_off(self, one: Submission) -> list[int] | RequestError:
        """Accept jobs into the journal alone. The marks are read before the database's last number: what gets its row
        in between is counted twice, not never."""
        state, ids, written, asker = self.path.parent, list[int](), list[str](), one.asker
        entries = journal.waiting_jobs(state)
        waiting = {entry.nonce: (entry.id, entry.user) for entry in entries}
        column, name = asker.counted_by
        mine = sum(getattr(entry, column) == name for entry in entries)
        mine += self.rows(f"SELECT count(*) AS n FROM job WHERE {column} = ? AND state = 'queued'", name)[0]["n"]
        last = self.rows("SELECT max(seq) AS id FROM sqlite_sequence WHERE name = 'job'")[0]["id"] or 0
        number = max([last, *(entry.id for entry in entries)])
        try:
            for request, plan in one.asked:
                row = self.rows("SELECT id, user FROM job WHERE nonce = ?", request.nonce)
                known = (row[0]["id"], row[0]["user"]) if row else waiting.get(request.nonce)
                if known is None:
                    check_share(name, mine, self._most(asker))
                    number, mine = number + 1, mine + 1
                    written.append(request.nonce)
                    waiting[request.nonce] = number, asker.user
                    journal.write_waiting(state, asker.accepted(number, self.now(), request, plan))
                ids.append(number if known is None else _same_user(known[0], known[1], asker))
        except BaseException as error:
            for nonce in written:
                journal.forget_waiting(state, nonce)
                remove_entry(state, nonce)
            if isinstance(error, RequestError):
                return error
            raise
        return ids

    def take_in(self, patience_s: float = PATIENCE_S) -> list[int]:
        """Give rows to the jobs that were accepted while another program held the database; returns their ids."""
        if not (waiting := journal.waiting_jobs(self.path.parent)):
            return []
        with self.write(patience_s=patience_s) as db:
            known = {entry.nonce for entry in waiting
                     if db.execute("SELECT 1 FROM job WHERE nonce = ?", (entry.nonce,)).fetchone()}  # fmt: skip
            made = [insert_job(db, entry) for entry in waiting if entry.nonce not in known]
        for entry in waiting:
            journal.forget_waiting(self.path.parent, entry.nonce)
        return made


def insert_job(db: sqlite3.Connection, entry: Accepted) -> int:
    """The id of the row that an accepted job gets: its own where that is free, the next one where it is 0."""
    values = (entry.id, entry.nonce, entry.client, as_column(entry.request), as_column(entry.plan))
    place = place_for(lambda sql, *values: db.execute(sql, values).fetchall(), entry.user)
    cursor = db.execute(
        "INSERT INTO job (id, nonce, client, state, place, request, plan, parent, created_s, user, expires_s) VALUES"
        " (CASE WHEN ?1 > 0 AND NOT EXISTS (SELECT 1 FROM job WHERE id = ?1) THEN ?1 END,"
        " ?2, ?3, 'queued', ?9, ?4, ?5, ?6, ?7, ?8, ?10)",
        (*values, entry.parent, entry.created_s, entry.user, place, entry.expires_s),
    )
    return cursor.lastrowid or 0


def _same_user(job: int, user: str, asker: Asker) -> int:
    """The job that a nonce made.

    Raises:
        RequestError: it made one of another user.
    """
    if asker.user and user != asker.user:
        raise RequestError("this nonce is another user's", code="nonce_taken", field="nonce", try_instead="another one")
    return job


def check_share(name: str, waiting: int, most: int) -> None:
    """Refuse a job of a client or user who has too many waiting; "": the person's own.

    Raises:
        RequestError: code queue_full.
    """
    if name and waiting >= most:
        raise RequestError(
            "too many jobs of yours are waiting", code="queue_full", field="job", got=waiting,
            expected=f"at most {most}", try_instead="wait for one to finish, or cancel one",
        )  # fmt: skip
