"""The rows of the queue: how columns hold a job, and what is read of a row that another version or a fault left."""

import json
import zlib
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypedDict, TypeVar

from turbodiff.jobs.database import SqlValue
from turbodiff.spec.clips import Record, Sidecar, read_record
from turbodiff.spec.events import JobError

LARGEST = 1e11  # seconds since 1970, places in the queue
# of a row whose request does not unpack or parse
UNREADABLE = JobError(
    code="row_unreadable",
    field="request",
    what="the row of this job cannot be read",
    got="a damaged row",
    expected="a request",
    try_instead="submit it again",
    exit_code=2,
)
KEPT_COLUMNS = 128  # requests and plans that were read last, 40 KB each; a snapshot of the page reads 80


class JobColumns(TypedDict, total=False):
    """Columns of a job that a move to another state sets with it; see QueuedJob."""

    strikes: dict[str, int]
    overrides: dict[str, str]
    error: JobError
    plan: None
    cap_bytes: int | None
    hold_bytes: int | None


def parsed(value: SqlValue) -> Any:
    """What the JSON of a column says; None for an empty one, and for one that does not unpack or parse."""
    with suppress(ValueError, TypeError, RecursionError, zlib.error):
        return json.loads(zlib.decompress(value).decode() if isinstance(value, bytes) else str(value))
    return None


R = TypeVar("R", bound=Record)


def record_of(kind: type[R], column: SqlValue) -> R | None:
    """The record of a column, None for none and for one that cannot be read."""
    found = parsed(column)
    return read_record(kind, found) if isinstance(found, dict) else None


@lru_cache(KEPT_COLUMNS)
def asked_of(request: str | bytes, plan: str | bytes | None) -> Sidecar | None:
    """Request and plan of a row, as a sidecar holds both; None without a request."""
    asked = parsed(request)
    return read_record(Sidecar, {"request": asked, "plan": parsed(plan)}) if isinstance(asked, dict) else None
