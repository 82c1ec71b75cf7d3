"""What a start does before anything runs: a sound store, no leftovers, interrupted jobs adopted or back in the queue.

A damaged store is moved aside; the newest backup takes its place and the sidecars bring back every finished clip.
"""

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from turbodiff.archive import seeds
from turbodiff.archive.clips import find_clip, sidecars, sweep
from turbodiff.jobs.attempts import add_artifact, finish_job, move_job
from turbodiff.jobs.database import DATABASE
from turbodiff.jobs.store import Store, as_column
from turbodiff.spec.errors import FileError, OutputError
from turbodiff.spec.files import atomic_write
from turbodiff.supervisor.ownership import end_leftover_workers

BACKUPS = "backups"
KEEP_BACKUPS = 7
BACKUP_EVERY_S = 24 * 3600.0


@dataclass
class Report:
    """What a start found and did, in words for the log."""

    lines: list[str] = field(default_factory=list)
    requeued: int = 0
    adopted: int = 0


def recover(state: Path, outputs: Path) -> tuple[Store, Report]:
    """Open the store of a state folder as its only supervisor; call it while holding the state lock.

    Raises:
        FileError: the store was written by a newer version; nothing was touched.
        OutputError: the state folder cannot be written.
    """
    report = Report()
    gone, stayed = end_leftover_workers(state)
    if gone:
        report.lines.append(f"ended {len(gone)} leftover worker(s) of an earlier run: pid {', '.join(map(str, gone))}")
    if stayed:
        report.lines.append(f"leftover worker(s) would not end: pid {', '.join(map(str, stayed))}; the driver may hang")
    try:
        store = Store(state)
        damage = check(store)
        if damage:
            store.close()
    except FileError as error:
        if error.code != "store_damaged":
            raise
        damage = error.what
    if damage:
        store = _restore(state, outputs, report, damage)
    settle(store, outputs, report)
    removed = sweep(outputs)
    if removed:
        report.lines.append(f"removed {len(removed)} unfinished file(s) in {outputs}")
    return store, report


def settle(store: Store, outputs: Path, report: Report) -> None:
    """Jobs that ran when the last supervisor died: done if their clip is there and sound, else queued, uncharged."""
    for job in store.jobs(limit=1_000_000, states=("running", "verifying")):
        clip = find_clip(outputs, job.nonce)
        if clip is not None and finish_job(store, job.id, job.attempt, clip):
            with contextlib.suppress(FileError):  # the archive has the clip; its file is written again with the next
                seeds.archive_clip(store, outputs, job.id)
            report.adopted += 1
        elif job.ask == "cancel":
            move_job(store, job.id, job.attempt, "cancelled")
        else:
            move_job(store, job.id, job.attempt, "queued")
            report.requeued += 1
    if report.requeued or report.adopted:
        report.lines.append(f"{report.requeued} job(s) requeued, {report.adopted} finished clip(s) adopted")


def check(store: Store) -> str:
    """ "" for a sound store, else what SQLite's quick_check says."""
    try:
        answer = str(store.rows("PRAGMA quick_check(1)")[0][0])
    except FileError as error:
        return error.what
    return "" if answer == "ok" else answer


def _restore(state: Path, outputs: Path, report: Report, why: str) -> Store:
    aside = state / f"damaged-{int(time.time())}"
    aside.mkdir(parents=True, exist_ok=True)
    for path in state.glob(f"{DATABASE}*"):
        path.replace(aside / path.name)
    report.lines.append(f"the job store was damaged ({why}); moved to {aside.name}")
    for backup in sorted((state / BACKUPS).glob("*.db"), reverse=True):
        (state / DATABASE).write_bytes(backup.read_bytes())
        try:
            store = Store(state)
        except (FileError, OutputError):
            (state / DATABASE).unlink(missing_ok=True)
            continue
        if not check(store):
            report.lines.append(f"restored the backup {backup.name}")
            rebuilt = rebuild(store, outputs)
            report.lines.append(f"{rebuilt} clip(s) taken over from their sidecars")
            return store
        store.close()
        (state / DATABASE).unlink(missing_ok=True)
    store = Store(state)
    report.lines.append(f"no backup; {rebuild(store, outputs)} clip(s) taken over from their sidecars")
    return store


def rebuild(store: Store, outputs: Path) -> int:
    """Take every clip of the library that the store does not know into history and seed archive; returns how many."""
    known = {row["path"] for row in store.rows("SELECT path FROM artifact")}
    count = 0
    for clip, sidecar in sidecars(outputs):
        if str(clip) in known:
            continue
        request, result, now = sidecar.request, sidecar.result(clip), store.now()
        nonce = request.nonce or f"clip-{sidecar.sha256 or clip.name}"
        with store.write() as db:  # a job that the backup still has waiting is done; any other row stays as it is
            done = db.execute(
                "INSERT INTO job (nonce, state, place, attempt, request, plan, result, created_s, ended_s)"
                " VALUES (?, 'done', 0, 1, ?, ?, ?, ?, ?) ON CONFLICT (nonce) DO UPDATE SET"
                " state = 'done', result = excluded.result, ended_s = excluded.ended_s WHERE state = 'queued' OR ?",
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
        seeds.add_clip(store, clip, sidecar)
        count += 1
    with contextlib.suppress(FileError):
        seeds.write_file(store, outputs)
    return count


def backup(store: Store, state: Path, every_s: float = BACKUP_EVERY_S) -> Path | None:
    """A copy of the store once a day, the newest 7 kept; returns it, or None if the last one is fresh enough."""
    folder = state / BACKUPS
    copies = sorted(folder.glob("*.db"))
    if copies and time.time() - copies[-1].stat().st_mtime < every_s:
        return None
    path = folder / f"{time.strftime('%Y%m%d_%H%M%S', time.gmtime())}.db"
    with atomic_write(path) as part:
        store.rows("VACUUM INTO ?", str(part))
    for old in sorted(folder.glob("*.db"))[:-KEEP_BACKUPS]:
        old.unlink(missing_ok=True)
    return path
