"""The jobs that wait, as people change them: order, what they ask for, the time before which none starts."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from turbodiff.jobs import waiting
from turbodiff.spec.errors import RequestError

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store
    from turbodiff.spec.jobs import QueuedJob, Where
    from turbodiff.spec.plan import Plan
    from turbodiff.spec.request import Request

CLOCK = re.compile(r"([01]?\d|2[0-3])[:：.]([0-5]\d)")


class Waiting:
    """The waiting part of the queue.

    Args:
        store: opens the queue when it is first needed.
        planned: the request that fields mean, with its plan; see `Studio.submit_all`.
    """

    def __init__(
        self, store: Callable[[], Store], planned: Callable[[Mapping[str, Any], bool], tuple[Request, Plan | None]]
    ) -> None:
        self._store, self._planned = store, planned

    def move(self, job: int, where: Where | int) -> None:
        """Move a waiting job, or to before another one; any other job stays where it is."""
        waiting.move(self._store(), job, where)

    def replace(self, job: QueuedJob, fields: Mapping[str, Any], anyway: bool = False) -> bool:
        """Let a waiting job make what these fields say, in its place; what waits for its clip goes on waiting. False
        where it waits no more: nothing is changed.

        Raises:
            TurbodiffError: the fields cannot be honoured, or another segment of its clip has another size; the job asks
                for what it did.
        """
        kept = {"nonce": job.nonce, **({"after": job.request.after} if job.request.after else {})}
        request, plan = self._planned({**fields, **kept}, anyway)
        before, now = (one.request if one else asked for one, asked in ((job.plan, job.request), (plan, request)))
        if (before.width, before.height, before.fps) != (now.width, now.height, now.fps) and (
            job.request.after or any(other.request.after == job.nonce for other in self._store().queue())
        ):
            raise RequestError(
                "segments of one clip have one size", code="segment_size", field="size",
                got=f"{now.width}x{now.height}, {now.fps} fps",
                expected=f"{before.width}x{before.height}, {before.fps} fps",
            )  # fmt: skip
        return waiting.replace(self._store(), job.id, request, plan)

    def drop(self, job: int) -> int:
        """Cancel a waiting job and those that wait to go on from its clip; returns how many."""
        return waiting.drop(self._store(), job)

    def pause(self) -> None:
        """Start no further job; what runs goes on."""
        self._store().put("paused", True)

    def resume(self) -> None:
        """Start jobs again."""
        self._store().put("paused", False)

    def clear(self) -> int:
        """Cancel every job that waits; returns how many."""
        return waiting.clear(self._store())

    def hold(self, clock: str) -> float:
        """Start no job before a time of the day, "23:00" by the clock of this machine, kept over restarts; "" starts
        them again. Returns Unix seconds, 0 for no hold.

        Raises:
            RequestError: not a time of the day.
        """
        found, now = CLOCK.fullmatch(clock.strip()), datetime.datetime.fromtimestamp(self._store().now())
        if clock.strip() and found is None:
            raise RequestError(
                "not a time of the day", code="bad_clock", field="hold", got=clock[:40], expected="00:00..23:59",
                try_instead="23:00",
            )  # fmt: skip
        until_s = 0.0
        if found:
            until = now.replace(hour=int(found[1]), minute=int(found[2]), second=0, microsecond=0)
            until_s = (until if until > now else until + datetime.timedelta(days=1)).timestamp()
        self._store().put("held_until_s", until_s)
        return until_s

    @property
    def held_until_s(self) -> float:
        """Unix seconds before which no job starts, 0 for none."""
        return waiting.held_until(self._store())
