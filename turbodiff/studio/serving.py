"""The people that the API serves by name: what each may see, how much of theirs may wait, when to ask again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbodiff.jobs import cards, users
from turbodiff.jobs.users import User
from turbodiff.spec.cached import CachedValue
from turbodiff.spec.errors import RequestError, TurbodiffError
from turbodiff.studio.longer_clips import after_unknown

if TYPE_CHECKING:
    from turbodiff.diagnostics.webhook import Webhook
    from turbodiff.jobs.store import Store
    from turbodiff.spec.jobs import QueuedJob
    from turbodiff.spec.plan import Plan
    from turbodiff.spec.request import Request

MOST_AT_ONCE = 100  # jobs of one submission: each is planned while its client waits
LONGEST_TTL_S = 30 * 24 * 3600
UNKNOWN_WAIT_S, LONGEST_WAIT_S = 60, 3600  # of Retry-After
METRICS_FRESH_S = 5.0
NO_JOB = {"what": "no such job", "code": "job_unknown", "field": "job", "try_instead": "turbodiff jobs list"}


class Serving:
    """Jobs by name. A `user` of "" is whoever needs no name: the page's login, or this machine; it sees all.

    Args:
        state: the state folder.
        store: opens the queue when it is first needed.
        asked: the requests that fields mean, each with its plan; see `Studio.submit_all`.
    """

    def __init__(
        self,
        state: Path,
        store: Callable[[], Store],
        asked: Callable[[Sequence[Mapping[str, Any]], bool], list[tuple[Request, Plan]]],
    ) -> None:
        self._state, self._store, self._asked = state, store, asked
        self.webhook: Webhook | None = None
        self._metrics = CachedValue(self._metrics_now, METRICS_FRESH_S)

    def tell(self, url: str, say: Callable[[str], None]) -> None:
        """Tell an address ("": none) and those of the users from now on when a job ends; see diagnostics/webhook.py."""
        from turbodiff.diagnostics.webhook import Webhook  # httpx: a shell command need not wait for it

        self.webhook = Webhook(self._state, url, say)

    def users(self) -> list[User]:
        """All who have a name."""
        return users.users(self._store())

    def add(self, user: User) -> tuple[str, User]:
        """Add a user; returns the token, which is kept nowhere. Raises RequestError: see `users.add_user`."""
        return users.add_user(self._store(), user)

    def remove(self, name: str) -> None:
        """Take a user's token away; their jobs stay. Raises RequestError: no such user."""
        users.remove_user(self._store(), name)

    def user_of(self, token: str) -> str | None:
        """Whose token this is; "" for nobody's any more, None for what is no token of a user."""
        if not users.TOKEN.fullmatch(token):
            return None
        found = users.user_of_token(self._store(), token)
        return found.name if found else ""

    def submit(self, many: Sequence[Mapping[str, Any]], user: str, ttl_s: object = None, client: str = "") -> list[int]:
        """Queue requests, all or none, and return their job ids; what still waits after `ttl_s` seconds ends then.

        Raises:
            RequestError: code queue_full: see `retry_after_s`; batch_too_large: no later try helps; bad_ttl; a job to
                go on from that is not this user's.
        """
        store, found = self._store(), users.user_named(self._store(), user)
        most = min(MOST_AT_ONCE, found.most_waiting if found else MOST_AT_ONCE)
        if not 1 <= len(many) <= most:
            raise RequestError(
                "too many jobs at once, or none", code="batch_too_large", field="batch", got=len(many),
                expected=f"1..{most}", try_instead="several batches",
            )  # fmt: skip
        is_number = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
        if ttl_s is not None and not (is_number and 1 <= float(str(ttl_s)) <= LONGEST_TTL_S):
            raise RequestError(
                "no time to wait", code="bad_ttl", field="ttl_s", got=str(ttl_s)[:40], expected=f"1..{LONGEST_TTL_S}"
            )
        asked = self._asked(many, False)
        earlier = {request.nonce for request, _ in asked}
        for request, _ in asked:
            mine = "SELECT 1 FROM job WHERE nonce = ? AND user = ?"
            if user and request.after not in ("", *earlier) and not store.rows(mine, request.after, user):
                raise after_unknown(request)
        expires_s = None if ttl_s is None else store.now() + float(str(ttl_s))
        return store.submit_all(asked, client=client, user=user, expires_s=expires_s)

    def prepare(self) -> None:
        """Do for nobody what comes before a submission is accepted. What it finds once and remembers, as which encoder
        ffmpeg has, takes as long as a hundred submissions; 50 clients may wait for the first."""
        with suppress(TurbodiffError):  # said to whoever submits
            self._asked([{"prompt": "a"}], False)
            self._store().take_in()

    def retry_after_s(self, user: str, count: int) -> int:
        """Seconds until so many more jobs of a user whose queue is full may wait: when enough of theirs will have
        started. Those beyond what the supervisor prices are counted at the mean of the others."""
        store, fleet = self._store(), cards.fleet(self._store())
        limit = users.user_named(store, user)
        waiting = store.rows("SELECT place FROM job WHERE user = ? AND state = 'queued' ORDER BY place, id", user)
        need = len(waiting) + count - (limit.most_waiting if limit else users.WAITING)
        if fleet is None or not fleet.told or not fleet.workers or not 0 < need <= len(waiting):
            return UNKNOWN_WAIT_S
        starts = fleet.starts()
        mine = sorted(starts[job.job].start_s for job in fleet.waiting if job.user == user and job.job in starts)
        wait_s = mine[need - 1] if need <= len(mine) else 0.0
        if not wait_s and starts:
            mean_s = sum(start.end_s - start.start_s for start in starts.values()) / len(starts)
            before = "SELECT count(*) AS n FROM job WHERE state = 'queued' AND place < ?"
            ahead = store.rows(before, waiting[need - 1]["place"])[0]["n"]
            wait_s = mean_s * ahead / len(fleet.workers)
        return max(1, min(LONGEST_WAIT_S, math.ceil(wait_s)))

    def job(self, number: int, user: str) -> QueuedJob:
        """One job, as far as this user may see it. Raises RequestError: there is none."""
        found = self._store().job(number)
        if user and found.user != user:
            raise RequestError(**NO_JOB, got=number)
        return found

    def jobs(self, limit: int, user: str) -> list[QueuedJob]:
        """The newest jobs that this user may see."""
        return self._store().jobs(limit, user=user)

    def owns(self, user: str, clip: Path) -> bool:
        """Whether this user may see a clip."""
        made = "SELECT 1 FROM artifact JOIN job ON job.id = artifact.job WHERE artifact.path = ? AND job.user = ?"
        return not user or bool(self._store().rows(made, str(clip), user))

    def metrics(self) -> str:
        """The queue in Prometheus' text format."""
        return self._metrics()

    def _metrics_now(self) -> str:
        from turbodiff.diagnostics.metrics import metrics_text  # for a page that is asked for them

        return metrics_text(self._store())


__all__ = ["Serving", "User"]
