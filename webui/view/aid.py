"""First aid, from the status bar on every tab: restart, who holds the memory, retry smaller: the guide's three."""

from dataclasses import dataclass

from webui.view import Snapshot
from webui.view.jobs import Failure, failure
from webui.view.system import HOST_LINE, Holder, holder
from webui.wording import Words

SHOWN = 5


@dataclass(frozen=True)
class Aid:
    """What the three steps show; `failed` is the newest job that memory stopped."""

    holders: tuple[Holder, ...]
    host_line: str
    failed: Failure | None


def aid(snapshot: Snapshot, words: Words) -> Aid:
    """The three steps for this snapshot."""
    stopped = (failure(job, words) for job in snapshot.jobs[:20] if job.state in ("failed", "parked"))
    return Aid(largest(snapshot, words), host_line(snapshot), next((one for one in stopped if one.memory), None))


def largest(snapshot: Snapshot, words: Words) -> tuple[Holder, ...]:
    """The holders of most memory, ours included."""
    rows = sorted((row for card in snapshot.holders for row in card.rows), key=lambda row: -(row.bytes or 0))
    return tuple(holder(row, words) for row in rows[:SHOWN])


def host_line(snapshot: Snapshot) -> str:
    """The line that lists holders on the host, where they cannot be seen from here."""
    return HOST_LINE if not snapshot.holders or any(not card.listed for card in snapshot.holders) else ""
