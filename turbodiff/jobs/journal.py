"""The journal: one small file for each accepted job until it has ended, beside the database and readable without it.

    STATE/accepted/journal.id     random text; the database that belongs to the folder holds the same
    STATE/accepted/HASH.job       64 hex digits of a SHA-256, a line end, the job as JSON; HASH is that of the nonce

The file of a job is on disk before its row is committed, and goes after the row says how the job ended. Whoever finds
the database gone, cut or older than this folder knows from it what was promised: supervisor/recovery.py.
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from turbodiff.jobs.database import write_error
from turbodiff.spec.clips import Sidecar, read_record
from turbodiff.spec.files import atomic_write, make_folder, open_file, sync
from turbodiff.spec.models import Frozen
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

JOURNAL = "accepted"
ENDING = ".job"
IDENTITY = "journal.id"
MAX_BYTES = 1 << 20  # a job with a plan and the longest prompts takes 80 KB


class Accepted(Frozen):
    """A job as it was accepted; `id` is the number that its client was told."""

    id: int
    nonce: str
    client: str = ""
    parent: int | None = None
    created_s: float
    request: Request
    plan: Plan | None = None


def entry_path(state: Path, nonce: str) -> Path:
    """The file of the job of a nonce."""
    return state / JOURNAL / (hashlib.sha256(nonce.encode("utf-8", "surrogatepass")).hexdigest()[:32] + ENDING)


def write_entry(state: Path, job: Accepted) -> None:
    """Put a job's file on disk, also through a power cut.

    Raises:
        OutputError: the folder takes no file.
    """
    path, data = entry_path(state, job.nonce), job.model_dump_json().encode()
    try:
        make_folder(path.parent, 0o700)
        with atomic_write(path, durable=True) as part:
            part.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
        sync(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def remove_entry(state: Path, nonce: str) -> None:
    """Take away the file of a job that ended; one that cannot be removed is removed at the next start."""
    with contextlib.suppress(OSError):
        entry_path(state, nonce).unlink(missing_ok=True)


def entries(state: Path) -> Iterator[tuple[Path, Accepted | None, bool]]:
    """Every file of the journal with its job, None where it cannot be read, and whether it is as it was written."""
    for path in sorted((state / JOURNAL).glob(f"*{ENDING}")):
        try:
            with open_file(path) as file:
                digest, _, data = file.read(MAX_BYTES).partition(b"\n")
        except OSError:
            yield path, None, False
            continue
        whole = hashlib.sha256(data).hexdigest().encode() == digest
        try:
            yield path, Accepted.model_validate_json(data), whole
        except ValidationError:  # of another version, or damaged
            yield path, _read_leniently(data), whole


def _read_leniently(data: bytes) -> Accepted | None:
    """The job of a file that another version wrote: what it wrote otherwise takes its default."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        found = json.loads(data)
        read = read_record(Sidecar, {"request": found["request"], "plan": found.get("plan")})
        if read is not None:
            kept = {name: found[name] for name in ("id", "nonce", "client", "parent", "created_s") if name in found}
            return Accepted(**kept, request=read.request, plan=read.plan)
    return None


def identity(state: Path) -> str:
    """The journal's own id, "" where it has none."""
    with contextlib.suppress(OSError, ValueError), open_file(state / JOURNAL / IDENTITY) as file:
        return file.read(64).decode("ascii").strip()
    return ""


def start_journal(state: Path) -> str:
    """Make the folder, whatever stands under its name, and give it an id; returns that.

    Raises:
        OutputError: the state folder takes nothing.
    """
    folder, made = state / JOURNAL, secrets.token_hex(16)
    try:
        make_folder(folder, 0o700)
        with atomic_write(folder / IDENTITY, durable=True) as part:
            part.write_text(made)
        sync(folder)
    except OSError as error:
        raise write_error(folder, error) from error
    return made
