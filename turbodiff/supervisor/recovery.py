"""What a start does before anything runs: a sound store, no leftovers, interrupted jobs adopted or back in the queue.

A damaged store is moved aside; the newest backup takes its place, the journal (jobs/journal.py) brings back every job
that was accepted and has not ended, and the sidecars bring back every finished clip. A store that is sound but older
than the journal is treated alike: a job without a file in the journal has ended, and never runs again by itself.
"""

import contextlib
import secrets
import shutil
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path

from turbodiff.archive import seeds
from turbodiff.archive.clips import find_clip, sidecars, sweep
from turbodiff.archive.grid_sheets import sweep_notes
from turbodiff.jobs import journal
from turbodiff.jobs.attempts import add_artifact, finish_job, move_job
from turbodiff.jobs.database import DAMAGED, DATABASE, LOCKED, as_column
from turbodiff.jobs.journal import Accepted, remove_entry
from turbodiff.jobs.rows import UNREADABLE
from turbodiff.jobs.store import Store
from turbodiff.spec.clips import Sidecar
from turbodiff.spec.errors import FileError, OutputError
from turbodiff.spec.events import JobError
from turbodiff.spec.files import atomic_write, files_of, make_folder, open_file, sha256_of
from turbodiff.spec.jobs import Recovered, State
from turbodiff.supervisor.ownership import end_leftover_workers

BACKUPS = "backups"
KEEP_BACKUPS = 7
BACKUP_EVERY_S = 24 * 3600.0
HELD_S, LOOK_S, SAID_S = 60.0, 0.5, 10.0  # how long a held database is waited for, and from when on it is said
FOLDER_LOST = "folder_lost"  # the fact by which the last run says that its state folder was removed
ALL = 1_000_000  # jobs, more than a store holds
OPEN: tuple[State, ...] = ("queued", "running", "verifying", "parked")


@dataclass
class Report:
    """What a start found and did, in words for the log, and in numbers for the page."""

    lines: list[str] = field(default_factory=list)
    requeued: int = 0
    adopted: int = 0
    damage: str = ""  # of the store
    restored: int = 0  # jobs that only the journal knew
    mended: int = 0  # jobs whose request was read from the journal
    clips: int = 0  # taken over from their sidecars
    parked: int = 0  # jobs of which it cannot be told what became


def recover(state: Path, outputs: Path, patience_s: float = HELD_S) -> tuple[Store, Report]:
    """Open the store of a state folder as its only supervisor; call it while holding the state lock.

    A database that another program holds, as a backup does, is waited for.

    Raises:
        FileError: the store was written by a newer version; nothing was touched.
        OutputError: the state folder cannot be written, or the database was held for longer than `patience_s`.
    """
    start_s = time.monotonic()
    while True:
        try:
            store, report = _recover(state, outputs)
        except OutputError as error:
            if error.code != LOCKED or time.monotonic() - start_s > patience_s:
                raise
            time.sleep(LOOK_S)
            continue
        waited_s = time.monotonic() - start_s
        if waited_s > SAID_S:
            report.lines.insert(0, f"opening the job store took {waited_s:.0f} s")
        return store, report


def _recover(state: Path, outputs: Path) -> tuple[Store, Report]:
    report = Report()
    gone, stayed = end_leftover_workers(state)
    if gone:
        report.lines.append(f"ended {len(gone)} leftover worker(s) of an earlier run: pid {', '.join(map(str, gone))}")
    if stayed:
        report.lines.append(f"leftover worker(s) would not end: pid {', '.join(map(str, stayed))}; the driver may hang")
    try:
        store = Store(state)
        report.damage = store.damage()
        if report.damage:
            store.close()
    except FileError as error:
        if error.code != DAMAGED:
            raise
        report.damage = error.what
    if report.damage:
        store = _restore(state, report)
    ended = _reconcile(store, state, outputs, report)
    settle(store, outputs, report)
    _park_ended(store, ended, report)
    removed = sweep(outputs)
    sweep_notes(state)
    if removed:
        report.lines.append(f"removed {len(removed)} unfinished file(s) in {outputs}")
    told = Recovered(
        damaged=bool(report.damage), restored=report.restored, mended=report.mended, clips=report.clips,
        parked=report.parked, folder_lost=bool(store.fact(FOLDER_LOST)),
    )  # fmt: skip
    store.put(FOLDER_LOST, False)
    store.put("recovered", told.model_dump() if any(told.model_dump().values()) else None)
    return store, report


def settle(store: Store, outputs: Path, report: Report) -> None:
    """Jobs that ran when the last supervisor died: done if their clip is there and sound, else queued, uncharged."""
    for job in store.jobs(limit=ALL, states=("running", "verifying")):
        clip = find_clip(outputs, job.nonce)
        if clip is not None and finish_job(store, job.id, job.attempt, clip):
            seeds.archive_clip(store, job.id)
            report.adopted += 1
        elif job.ask == "cancel":
            move_job(store, job.id, job.attempt, "cancelled")
        else:
            move_job(store, job.id, job.attempt, "queued")
            report.requeued += 1
    if report.requeued or report.adopted:
        report.lines.append(f"{report.requeued} job(s) requeued, {report.adopted} finished clip(s) adopted")


def _reconcile(store: Store, state: Path, outputs: Path, report: Report) -> set[str]:
    """Bring store, journal and sidecars together; returns the nonces of waiting jobs that ended after this store."""
    store.take_in()
    here, known = journal.identity(state), store.fact("journal")
    same, older = bool(here) and here == known, bool(here) and here != known
    waiting = {job.nonce: job for job in store.jobs(limit=ALL, states=OPEN)}
    found: set[str] = set()
    lost: list[Accepted] = []
    damaged: set[str] = set()
    for path, entry, whole in journal.entries(state):
        if entry is None or not whole:
            bad = path.rename(path.with_suffix(".damaged"))
            known_nonces = (row["nonce"] for row in store.rows("SELECT nonce FROM job"))
            nonce = next((nonce for nonce in known_nonces if journal.entry_path(state, nonce) == path), "")
            damaged.add(nonce)
            if not nonce:
                report.lines.append(f"the file of an accepted job is damaged: {bad}")
                _park_unread(store, entry, f"journal-{path.stem}")
                report.parked += 1
            continue
        row = store.rows("SELECT id, state FROM job WHERE nonce = ?", entry.nonce)
        if not row:
            lost.append(entry)
        elif (job := waiting.get(entry.nonce)) is None:
            path.unlink(missing_ok=True)
            continue
        elif job.error is UNREADABLE or job.request != entry.request:
            with store.write() as db:
                values = (as_column(entry.request), as_column(entry.plan), job.id)
                db.execute("UPDATE job SET request = ?, plan = ? WHERE id = ?", values)
            report.mended += 1
            report.lines.append(f"job {job.id}: its row was damaged, what was asked comes from the journal")
        found.add(entry.nonce)
    for entry in sorted(lost, key=lambda entry: (entry.created_s, entry.id)):
        store.restore(entry)
    report.restored = len(lost)
    ended = set(waiting) - found - damaged if same else set[str]()
    if report.damage or older or lost or ended:
        report.clips = rebuild(store, outputs, report)
        report.lines.append(f"{report.clips} clip(s) taken over from their sidecars")
    if lost:
        left = len([job for job in store.jobs(limit=ALL, states=OPEN) if job.nonce in {entry.nonce for entry in lost}])
        report.restored = left
        report.lines.append(f"{left} accepted job(s) that the store did not have are back from the journal")
    for job in store.jobs(limit=ALL, states=OPEN):
        if job.nonce not in found | ended and job.error is not UNREADABLE:
            journal.write_entry(state, Accepted.of(job))
    if not same:
        store.put("journal", here or journal.start_journal(state))
    return ended


def _park_ended(store: Store, ended: set[str], report: Report) -> None:
    """Park the jobs that wait in an older store although they ended: another run would be one too many."""
    for job in store.jobs(limit=ALL, states=("queued", "parked")):
        if job.nonce in ended:
            journal.write_entry(store.path.parent, Accepted.of(job))
        if job.state == "parked":
            continue
        if job.nonce in ended:
            error = JobError(
                code="job_ended", field="job", what="this job ended, but the store that said how was lost",
                got="a store older than the journal", expected="", try_instead=f"turbodiff jobs retry {job.id}",
            )  # fmt: skip
            move_job(store, job.id, job.attempt, "parked", out_of=("queued",), error=error)
            report.parked += 1
            report.lines.append(f"job {job.id} ended after this store was saved: parked, retry runs it again")
        elif job.error is UNREADABLE:
            move_job(store, job.id, job.attempt, "parked", out_of=("queued",), error=UNREADABLE)
            report.parked += 1
            report.lines.append(f"job {job.id}: its row cannot be read; parked")


def _park_unread(store: Store, entry: Accepted | None, nonce: str) -> None:
    """Put a job whose file in the journal is damaged, and that no row knows, into the queue's list, parked."""
    request = as_column(entry.request) if entry else "null"
    with store.write() as db:
        db.execute(
            "INSERT INTO job (nonce, state, place, request, error, created_s, ended_s)"
            " VALUES (?, 'parked', 0, ?, ?, ?, ?) ON CONFLICT (nonce) DO NOTHING",
            (nonce, request, as_column(UNREADABLE), store.now(), store.now()),
        )


def _restore(state: Path, report: Report) -> Store:
    aside = state / f"damaged-{time.time():.0f}-{secrets.token_hex(2)}"
    aside.mkdir(parents=True)
    for path in state.glob(f"{DATABASE}*"):
        path.replace(aside / path.name)
    report.lines.append(f"the job store was damaged ({report.damage}); moved to {aside.name}")
    for backup in sorted((state / BACKUPS).glob("*.db"), reverse=True):
        try:
            with open_file(backup) as file, (state / DATABASE).open("wb") as copy:
                shutil.copyfileobj(file, copy)
            store = Store(state)
        except (OSError, FileError):
            (state / DATABASE).unlink(missing_ok=True)
            continue
        if not store.damage():
            report.lines.append(f"restored the backup {backup.name}")
            return store
        store.close()
        (state / DATABASE).unlink(missing_ok=True)
    report.lines.append("no backup")
    return Store(state)


def rebuild(store: Store, outputs: Path, report: Report | None = None) -> int:
    """Take every clip of the library that the store does not know into history and seed archive; returns how many.

    A clip that cannot be taken over is passed over, and said in `report`.
    """
    known = {row["path"] for row in store.rows("SELECT path FROM artifact")}
    count = 0
    for clip, sidecar in sidecars(outputs):
        if str(clip) in known:
            continue
        try:
            _take_over(store, clip, sidecar)
            count += 1
        except (FileError, OSError, ValueError, OverflowError, sqlite3.Error) as error:
            if report is not None:
                report.lines.append(f"{clip} is left out of the history: {error}")
    with contextlib.suppress(FileError):
        seeds.write_file(store, outputs)
    return count


def _take_over(store: Store, clip: Path, sidecar: Sidecar) -> None:
    """Take one clip into history and seed archive; a job that waits for it is done if the file is whole."""
    request, result, now = sidecar.request, sidecar.result(clip), store.now()
    nonce = request.nonce or f"clip-{sidecar.sha256 or clip.name}"
    waits = store.rows("SELECT 1 FROM job WHERE nonce = ? AND state IN ('queued', 'running', 'verifying')", nonce)
    if waits and sha256_of(clip) != sidecar.sha256:
        return
    with store.write() as db:  # any other row stays as it is
        done = db.execute(
            "INSERT INTO job (nonce, state, place, attempt, request, plan, result, created_s, ended_s)"
            " VALUES (?, 'done', 0, 1, ?, ?, ?, ?, ?) ON CONFLICT (nonce) DO UPDATE SET"
            " state = 'done', result = excluded.result, error = NULL, ended_s = excluded.ended_s"
            " WHERE state IN ('queued', 'running', 'verifying') OR ?",
            (
                nonce,
                as_column(request),
                as_column(sidecar.plan),
                as_column(result),
                clip.stat().st_mtime,
                now,
                not request.nonce,
            ),
        )
        db.execute("UPDATE job SET place = id WHERE place = 0")
        if done.rowcount:
            job = db.execute("SELECT id, attempt FROM job WHERE nonce = ?", (nonce,)).fetchone()
            add_artifact(db, job["id"], job["attempt"], result, now)
    if waits:
        remove_entry(store.path.parent, nonce)
    seeds.add_clip(store, clip, sidecar)


def backup(store: Store, state: Path, every_s: float = BACKUP_EVERY_S) -> Path | None:
    """A copy of the store once a day, the newest 7 kept; returns it, or None if the last one is fresh enough."""
    folder = state / BACKUPS
    copies = sorted(folder.glob("*.db"))
    if copies and time.time() - copies[-1].stat().st_mtime < every_s:
        return None
    make_folder(folder, 0o700, ours=True)
    path = folder / f"{time.strftime('%Y%m%d_%H%M%S', time.gmtime())}.db"
    with atomic_write(path) as part:
        store.rows("VACUUM INTO ?", str(part))
    for old in sorted(one for one in files_of(folder) if one.suffix == ".db")[:-KEEP_BACKUPS]:
        old.unlink(missing_ok=True)
    return path
