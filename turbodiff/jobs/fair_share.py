"""In which order the waiting jobs of several users run: one of each in turn, and each user's own as they came.

A job gets its place in the queue when it is accepted, by start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996):
behind the last waiting job of its user, or where the queue has got to, by one step of that user. With steps of 1 for
everybody the places go round; a user with a share of 2 has steps of 1/2, and two jobs in each round. Places are all
that decides afterwards: the claim, dispatch, page and shell read the same order, and what a person moves stays moved.

A user cannot save up turns: a new job never stands before where the queue has got to, nor before the job that is next.
Nobody starves: that point moves on with each start, so that only so many jobs of others as their shares allow can come
before one that waits.
"""

import sqlite3
from collections.abc import Callable

# where the queue has got to: the last place that was given a card, or the first that waits where that is further on
REACHED = " UNION ALL ".join(
    [
        *(f"SELECT max(place) AS place FROM job WHERE state = '{state}'" for state in ("running", "verifying", "done")),
        "SELECT min(place) FROM job WHERE state = 'queued'",
    ]
)


def next_place(reached: float, last: float | None, share: int = 1) -> float:
    """The place of a user's next job.

    Args:
        reached: where the queue has got to.
        last: the place of the last job of this user that waits; None for none.
        share: how many jobs of this user run in one round.
    """
    return max(reached, reached if last is None else last) + 1 / share


def place_for(rows: Callable[..., list[sqlite3.Row]], user: str) -> float:
    """The place of a job that this user ("": whoever has no name) submits now; `rows`: of a query and its values."""
    reached = rows(f"SELECT coalesce(max(place), 0) FROM ({REACHED})")[0][0]
    last = rows("SELECT max(place) FROM job WHERE user = ? AND state = 'queued'", user)[0][0]
    share = rows("SELECT share FROM api_user WHERE name = ?", user)
    return next_place(reached, last, share[0][0] if share else 1)
