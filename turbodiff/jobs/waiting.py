"""What people change of the jobs that wait: order, what they ask for, when they may start, all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbodiff.jobs.database import as_column
from turbodiff.jobs.journal import Accepted, remove_entry, write_entry
from turbodiff.spec.events import JobError

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store
    from turbodiff.spec.jobs import Where
    from turbodiff.spec.plan import Plan
    from turbodiff.spec.request import Request

EXPIRED = JobError(
    code="job_expired", field="ttl_s", what="this job waited longer than it may", got="a job that waits",
    expected="a start before its time was over", try_instead="submit it again, with a longer ttl_s or none",
)  # fmt: skip
LONGEST_HOLD_S = 25 * 3600.0  # a time of the next day, over a change to winter time; a clock set back holds no longer


def move(store: Store, job: int, where: Where | int) -> None:
    """Move a waiting job in the queue, or to before another one of that number; any other job stays as it is."""
    order = [row["id"] for row in store.rows("SELECT id FROM job WHERE state = 'queued' ORDER BY place, id")]
    if job not in order or (isinstance(where, int) and where not in order):
        return
    at = order.index(job)
    order.remove(job)
    if isinstance(where, int):
        to = order.index(where) if where != job else at
    else:
        to = {"first": 0, "up": max(at - 1, 0), "down": at + 1, "last": len(order)}[where]
    order.insert(to, job)
    with store.write() as db:
        places = sorted(row["place"] for row in db.execute("SELECT place FROM job WHERE state = 'queued'"))
        for place, moved in zip(places, order, strict=False):
            db.execute("UPDATE job SET place = ? WHERE id = ? AND state = 'queued'", (place, moved))


def replace(store: Store, job: int, request: Request, plan: Plan | None) -> bool:
    """Let a waiting job ask for something else, in its place and under its nonce; False where it waits no more.

    Raises:
        OutputError: the disk refused; the job asks for what it did.
    """
    with store.write() as db:
        row = db.execute("SELECT nonce FROM job WHERE id = ? AND state = 'queued'", (job,)).fetchone()
        if row is None:
            return False
        db.execute(
            "UPDATE job SET request = ?, plan = ?, strikes = '{}', overrides = '{}', cap_bytes = NULL,"
            " hold_bytes = NULL WHERE id = ?",
            (as_column(request.model_copy(update={"nonce": row["nonce"]})), as_column(plan), job),
        )
        # what an earlier attempt left was made by another plan
        (store.path.parent / "latents" / f"{job}.safetensors").unlink(missing_ok=True)
        write_entry(store.path.parent, Accepted.of(store.job(job)))
    return True


def clear(store: Store) -> int:
    """Cancel every job that waits; what runs goes on. Returns how many."""
    store.take_in()
    with store.write() as db:
        gone = db.execute(
            "UPDATE job SET state = 'cancelled', ended_s = ? WHERE state = 'queued' RETURNING nonce", (store.now(),)
        ).fetchall()
    for row in gone:
        remove_entry(store.path.parent, row["nonce"])
    return len(gone)


def expire(store: Store) -> list[int]:
    """End the jobs that still wait although their time is over: failed, with EXPIRED; returns their numbers."""
    late = "state = 'queued' AND expires_s <= ?"
    if not store.rows(f"SELECT 1 FROM job WHERE {late} LIMIT 1", store.now()):
        return []
    with store.write() as db:
        gone = db.execute(
            f"UPDATE job SET state = 'failed', error = ?, ended_s = ? WHERE {late} RETURNING id, nonce",
            (as_column(EXPIRED), store.now(), store.now()),
        ).fetchall()
    for row in gone:
        remove_entry(store.path.parent, row["nonce"])
    return [row["id"] for row in gone]


def drop(store: Store, job: int) -> int:
    """Cancel a waiting job and those that wait to go on from its clip; returns how many."""
    nonces, count = set[str](), 0
    for other in sorted(store.queue(), key=lambda one: one.id):
        if other.id == job or other.request.after in nonces:
            nonces.add(other.nonce)
            count += store.cancel(other.id) == "cancelled"
    return count


def held_until(store: Store) -> float:
    """Unix seconds before which no job starts, 0 for none."""
    until_s = store.fact("held_until_s")
    is_ahead = isinstance(until_s, int | float) and 0 < until_s - store.now() <= LONGEST_HOLD_S
    return float(until_s) if is_ahead else 0.0
