"""The journal: one small file for each accepted job until it has ended, beside the database and readable without it.

    STATE/accepted/journal.id     random text; the database that belongs to the folder holds the same
    STATE/accepted/HASH.job       for each job that came with it two lines: SHA-256 of the second and HASH, in hex; the
                                  job as JSON. HASH is that of the nonce, and says which of them is meant
    STATE/accepted/waiting/HASH   empty: another program held the database when this job was accepted

The file of a job is on disk before its row is committed, and goes after the row says how the job ended. Whoever finds
the database gone, cut or older than this folder knows from it what was promised: supervisor/recovery.py. A job that
waits for the database gets its row, under the number that its client was told, with the next that gets one.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from turbodiff.jobs.database import write_error
from turbodiff.spec.clips import Sidecar, read_record
from turbodiff.spec.files import atomic_write, make_folder, open_file, sync
from turbodiff.spec.models import Frozen
from turbodiff.spec.plan import Plan
from turbodiff.spec.request import Request

if TYPE_CHECKING:
    from turbodiff.spec.jobs import QueuedJob

JOURNAL = "accepted"
ENDING = ".job"
IDENTITY = "journal.id"
WAITING = "waiting"
MAX_BYTES = 1 << 20  # a job with a plan and the longest prompts takes 80 KB
NUMBERING_S = 5.0
KEPT = ("id", "nonce", "client", "parent", "created_s", "user", "expires_s")  # beside request and plan
LARGEST_ID = 2**53 - 1  # what a browser's numbers hold exactly


class Accepted(Frozen):
    """A job as it was accepted; `id` is the number that its client was told."""

    id: int = Field(ge=0, le=LARGEST_ID)
    nonce: str
    client: str = ""
    parent: int | None = Field(default=None, le=LARGEST_ID)
    created_s: float = Field(allow_inf_nan=False)
    user: str = ""
    expires_s: float | None = Field(default=None, allow_inf_nan=False)
    request: Request
    plan: Plan | None = None

    @classmethod
    def of(cls, job: "QueuedJob") -> "Accepted":
        """What the journal keeps of a job of the queue."""
        return cls(**{name: getattr(job, name) for name in cls.model_fields})


def entry_path(state: Path, nonce: str) -> Path:
    """The file of the job of a nonce."""
    return state / JOURNAL / (hashlib.sha256(nonce.encode("utf-8", "surrogatepass")).hexdigest()[:32] + ENDING)


def write_entry(state: Path, job: Accepted) -> None:
    """Put a job's file on disk, also through a power cut.

    Raises:
        OutputError: the folder takes no file.
    """
    write_entries(state, [job])


def write_entries(state: Path, jobs: Sequence[Accepted]) -> None:
    """Put the files of jobs on disk, also through a power cut; those that come together are one file under a name for
    each. 40 of them take 7 ms so, and 29 ms as files of their own that are synced at once (ext4 on a virtio disk).

    Raises:
        OutputError: the folder takes one of the files not; others may be there.
    """
    folder, together, held_bytes = state / JOURNAL, list[tuple[Path, bytes]](), 0
    try:
        make_folder(folder, 0o700, ours=True, link=False)
        for job in jobs:
            path, data = entry_path(state, job.nonce), job.model_dump_json().encode()
            record = f"{hashlib.sha256(data).hexdigest()} {path.stem}\n".encode() + data + b"\n"
            if held_bytes + len(record) > MAX_BYTES:
                _write(together)
                together, held_bytes = [], 0
            together.append((path, record))
            held_bytes += len(record)
        _write(together)
        sync(folder)
    except OSError as error:
        raise write_error(folder, error) from error


def _write(records: Sequence[tuple[Path, bytes]]) -> None:
    """Write records to a file under the name of each."""
    if not records:
        return
    (first, _), *others = records
    with atomic_write(first, durable=True) as part:
        part.write_bytes(b"".join(record for _, record in records))
    for path, record in others:
        try:
            os.link(first, path)
        except OSError:  # a file system without such links, or the name is taken
            _write([(path, record)])


def remove_entry(state: Path, nonce: str) -> None:
    """Take away the file of a job that ended; one that cannot be removed is removed at the next start."""
    with contextlib.suppress(OSError):
        if not _is_elsewhere(state):
            entry_path(state, nonce).unlink(missing_ok=True)


def write_waiting(state: Path, job: Accepted) -> None:
    """Put a job's file on disk, and the mark that its row is still to be made.

    Raises:
        OutputError: the folder takes no file.
    """
    mark = state / JOURNAL / WAITING / entry_path(state, job.nonce).stem
    write_entry(state, job)
    try:
        make_folder(mark.parent, 0o700, ours=True, link=False)
        mark.touch(0o600)
        sync(mark.parent)
    except OSError as error:
        remove_entry(state, job.nonce)
        raise write_error(mark, error) from error


def waiting_jobs(state: Path) -> list[Accepted]:
    """The jobs that wait for their rows, by number."""
    found = list[Accepted]()
    with contextlib.suppress(OSError):
        if _is_elsewhere(state) or (state / JOURNAL / WAITING).is_symlink():
            return []
        with os.scandir(state / JOURNAL / WAITING) as listed:
            marks = list(listed)
        for mark in marks:
            job, whole = _read_entry(path := state / JOURNAL / f"{mark.name}{ENDING}")
            found += [job] if job is not None and whole else []
            if not os.path.lexists(path):  # cancelled meanwhile, or refused
                Path(mark).unlink(missing_ok=True)
    return sorted(found, key=lambda job: job.id)


def forget_waiting(state: Path, nonce: str) -> None:
    """Take away the mark of a job that has its row."""
    with contextlib.suppress(OSError):
        (state / JOURNAL / WAITING / entry_path(state, nonce).stem).unlink(missing_ok=True)


@contextlib.contextmanager
def numbering(state: Path) -> Iterator[None]:
    """While one process numbers jobs, no other does: else two clients are told the same number. One that holds this for
    longer than five seconds is stopped or hangs, and is not waited for."""
    with contextlib.ExitStack() as on_end:
        with contextlib.suppress(OSError):  # a file system without locks
            make_folder(state / JOURNAL, 0o700, ours=True, link=False)
            descriptor = os.open(state / JOURNAL, os.O_RDONLY | os.O_CLOEXEC)
            on_end.callback(os.close, descriptor)
            end_s = time.monotonic() + NUMBERING_S
            while time.monotonic() < end_s:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.005)
        yield


def entries(state: Path) -> Iterator[tuple[Path, Accepted | None, bool]]:
    """Every file of the journal with its job, None where it cannot be read, and whether it is as it was written."""
    for path in sorted((state / JOURNAL).glob(f"*{ENDING}") if not _is_elsewhere(state) else ()):
        yield path, *_read_entry(path)


def _is_elsewhere(state: Path) -> bool:
    """Whether the folder is a link: what it leads to is another's; the next job that comes makes a folder of ours."""
    return (state / JOURNAL).is_symlink()


def _read_entry(path: Path) -> tuple[Accepted | None, bool]:
    try:
        with open_file(path) as file:
            content = file.read(MAX_BYTES)
    except OSError:
        return None, False
    digest, _, data = content.partition(b"\n")  # as version 0.1 wrote it, and where the name is damaged
    name = f" {path.stem}\n".encode()
    if (at := content.find(name)) >= 0:
        digest, data = content[:at][-64:], content[at + len(name) :].partition(b"\n")[0]
    whole = hashlib.sha256(data).hexdigest().encode() == digest
    try:
        return Accepted.model_validate_json(data), whole
    except ValidationError:  # of another version, or damaged
        return _read_leniently(data), whole


def _read_leniently(data: bytes) -> Accepted | None:
    """The job of a file that another version wrote: what it wrote otherwise takes its default."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        found = json.loads(data)
        if not isinstance(found, dict) or not isinstance(found.get("request"), dict):
            return None
        read = read_record(Sidecar, {"request": found["request"], "plan": found.get("plan")})
        if read is not None:
            kept = {name: found[name] for name in KEPT if name in found}
            json.dumps(kept, ensure_ascii=False).encode()  # half of a surrogate pair is no text for the database
            return Accepted(**kept, request=read.request, plan=read.plan)
    return None


def identity(state: Path) -> str:
    """The journal's own id, "" where it has none."""
    if _is_elsewhere(state):
        return ""
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
        make_folder(folder, 0o700, ours=True, link=False)
        with atomic_write(folder / IDENTITY, durable=True) as part:
            part.write_text(made)
        sync(folder)
    except OSError as error:
        raise write_error(folder, error) from error
    return made
