"""The seed archive: every finished clip with what makes it again, rated in words or stars, searchable.

A seed alone repeats nothing: size, frames, steps, sampler, attention, weights and device belong to it, so each row
keeps the clip's whole record. Ratings go three ways at once: the store, the clip's sidecar (the truth) and
`outputs/seeds.md`, which stays up to date by itself. Lines that a person adds or rates in that file are taken over.
"""

import contextlib
import fcntl
import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbodiff.archive.clips import edit_sidecar, read_sidecar
from turbodiff.archive.seed_table import MAX_TABLE_BYTES, Row, decode_table, read_table, write_table
from turbodiff.jobs.database import as_column
from turbodiff.jobs.rows import parsed
from turbodiff.spec.clips import Sidecar, read_record
from turbodiff.spec.encodings import Encoding
from turbodiff.spec.errors import FileError, OutputError, RequestError
from turbodiff.spec.files import atomic_write, open_file
from turbodiff.spec.models import display_name_of

if TYPE_CHECKING:
    from turbodiff.jobs.store import Store

SEEDS_FILE = "seeds.md"
LOCK_FILE = "seeds.lock"  # in the state folder
WRITE_EVERY_S, AGAIN_S = 3.0, 60.0  # the second after it could not be read or written
OF_THE_TIME = 100.0
DUE = (  # the table is behind the archive; each time another value
    "INSERT INTO fact VALUES ('seeds_due', ?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
)
MAX_NOTE_CHARS = 500
ALL_ROWS = "SELECT prompt, seed, model, resolution, rating, note, raw FROM seed ORDER BY id"
KEPT = ("request", "ran", "versions", "sha256", "created")  # of a clip's sidecar


@dataclass(frozen=True)
class Seed:
    """One row of the archive; for a line that came from a file `path` is "" and `recipe` None."""

    id: int
    row: Row
    job: int | None
    path: str
    recipe: Sidecar | None  # of the clip: what KEPT names
    created_s: float


def list_seeds(store: "Store", search: str = "", limit: int = 200) -> list[Seed]:
    """The newest rows first; `search` looks in prompt, note, rating, model and seed, every word must occur."""
    columns = "prompt || ' ' || note || ' ' || rating || ' ' || model || ' ' || seed"
    literal = search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    words = [f"%{word}%" for word in literal.split()]
    where = "".join(f" AND {columns} LIKE ? ESCAPE '\\'" for _ in words)
    found = store.rows(f"SELECT * FROM seed WHERE 1{where} ORDER BY id DESC LIMIT ?", *words, limit)
    return [_seed(row) for row in found]


def find_seed(store: "Store", row: int = 0, clip: str = "") -> Seed | None:
    """The row of that number, or the newest one of the clip of that file name without its ending; None: there is none.

    However old it is: a table of 20,000 rows is read in 10 ms.
    """
    end = f"/{clip}.mp4"
    where, value = ("id = ?", row) if row else ("substr(path, -?1) = ?2", len(end))
    found = store.rows(f"SELECT * FROM seed WHERE {where} ORDER BY id DESC LIMIT 1", value, *() if row else (end,))
    return _seed(found[0]) if found else None


def archive_clip(store: "Store", job: int) -> None:
    """Add the clip of a finished job; `write_if_due` brings seeds.md up to date."""
    done = store.job(job)
    clip = Path(done.result.path if done.result else "")
    try:
        sidecar = read_sidecar(clip)
    except FileError:
        sidecar = Sidecar(request=done.request)
    add_clip(store, clip, sidecar, job)


def add_clip(store: "Store", clip: Path, sidecar: Sidecar, job: int | None = None) -> None:
    """Add a row for a clip; a clip that is known keeps its row. What ran counts, not what was asked for."""
    request = sidecar.plan.request if sidecar.plan else sidecar.request
    custom = request.resolution == "custom"
    seed = sidecar.request.seed if request.seed is None else request.seed
    cells = (
        request.prompt.strip(),
        "" if seed is None else str(seed),
        display_name_of(request.model),
        f"{request.width}x{request.height}" if custom else request.resolution,
        sidecar.rating,
        sidecar.note,
    )
    recipe = sidecar.model_dump(mode="json", include=set(KEPT))
    with store.write() as db:
        db.execute(
            "INSERT INTO seed (job, path, prompt, seed, model, resolution, rating, note, recipe, created_s)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (path) DO NOTHING",
            (job, str(clip), *cells, as_column(recipe), store.now()),
        )
        db.execute(DUE, (json.dumps(secrets.token_hex(8)), store.now()))


def rate(store: "Store", outputs: Path, seed: int, rating: str | None = None, note: str | None = None) -> Seed:
    """Rate a row and note something; None leaves a cell as it is. Also into the sidecar and seeds.md.

    Raises:
        RequestError: no such row, or more than 500 characters.
        FileError: the rating is stored, but seeds.md cannot be read or written.
    """
    found = store.rows("SELECT * FROM seed WHERE id = ?", seed)
    if not found:
        raise RequestError(
            "no such row", code="seed_unknown", field="seed", got=seed, try_instead="turbodiff seeds list"
        )
    row = _seed(found[0]).row
    cells = {"rating": row.rating if rating is None else rating, "note": row.note if note is None else note}
    for name, text in cells.items():
        if len(text) > MAX_NOTE_CHARS:
            raise RequestError("too long", code="note_long", field=name, got=len(text), expected=MAX_NOTE_CHARS)
    cells = {name: text.strip() for name, text in cells.items()}
    with store.write() as db:
        db.execute(
            "UPDATE seed SET rating = ?, note = ?, raw = '' WHERE id = ?", (cells["rating"], cells["note"], seed)
        )
    if found[0]["path"]:
        with contextlib.suppress(FileError):  # a clip that was moved away has none to write to
            edit_sidecar(Path(found[0]["path"]), {**cells})
    write_file(store, outputs)
    return _seed(store.rows("SELECT * FROM seed WHERE id = ?", seed)[0])


def export_text(store: "Store") -> str:
    """The whole archive as the table of seeds.md, oldest first."""
    return write_table(Row(*row) for row in store.rows(ALL_ROWS))


def import_file(store: "Store", outputs: Path, path: Path) -> int:
    """Take over the rows of a table; known clips get the file's rating and note. Returns how many rows it has.

    Raises:
        FileError: not readable, or no table of six columns in it.
    """
    rows = read_table(decode_table(_read(path), path.name)[0])
    if not rows:
        raise FileError(
            "no row of a seed table in this file",
            code="seeds_empty",
            field=path.name,
            expected="提示词|种子值|模型|分辨率|效果评价|备注",
            try_instead="turbodiff seeds export shows the form",
        )
    with store.write() as db:
        _take_over(db, rows, store.now())
    write_file(store, outputs)
    return len(rows)


def write_if_due(store: "Store", outputs: Path) -> bool:
    """Rewrite seeds.md where clips were added since, at most every few seconds, and a hundredth of the time where it
    has grown long: a table of 10,000 rows takes a third of a second. Whether it was.

    Raises:
        FileError: see `write_file`; the next try is in a minute.
    """
    before_s = store.fact("seeds_not_before") or 0.0
    if not store.fact("seeds_due") or store.now() < before_s <= store.now() + AGAIN_S:
        return False
    wait_s = AGAIN_S
    try:
        start_s = time.thread_time()
        write_file(store, outputs)
        wait_s = min(AGAIN_S, max(WRITE_EVERY_S, OF_THE_TIME * (time.thread_time() - start_s)))
    finally:
        store.put("seeds_not_before", store.now() + wait_s)
    return True


def write_file(store: "Store", outputs: Path) -> Path:
    """Rewrite outputs/seeds.md in its own encoding; what a person changed in it is taken over first.

    The queue is not locked meanwhile: thousands of rows take a third of a second. A lock of the file's own sees to it
    that no older table replaces a newer one.

    Raises:
        FileError: the file cannot be read without loss, and stays as it is; the archive itself is safe in the store.
        OutputError: the folder cannot be written.
    """
    path = outputs / SEEDS_FILE
    with _one_writer(store.path.with_name(LOCK_FILE)):
        due = store.rows("SELECT value FROM fact WHERE name = 'seeds_due'")
        before = _read(path) if path.is_file() else b""
        encoding = Encoding()
        if before:
            text, encoding = decode_table(before, path.name)
            if store.fact("seeds_md") != _digest(before):
                with store.write() as db:
                    _take_over(db, read_table(text), store.now())
                _replace(path.with_name(f"{SEEDS_FILE}.bak"), before)
        after = encoding.encode(export_text(store))
        if after != before:
            _replace(path, after)
        store.put("seeds_md", _digest(after))
        if due:  # unless another clip came meanwhile
            with store.write() as db:
                db.execute("DELETE FROM fact WHERE name = 'seeds_due' AND value = ?", (due[0]["value"],))
    return path


@contextlib.contextmanager
def _one_writer(lock: Path) -> Iterator[None]:
    """Hold a lock between processes; a folder that takes no file, or has no locks, does without."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(lock.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _take_over(db: sqlite3.Connection, rows: list[Row], now_s: float) -> None:
    """Add the rows that the archive does not have; a row that it has takes the file's rating and note."""
    query = "SELECT id, prompt, seed, model, resolution, rating, note FROM seed ORDER BY id DESC"
    known = {tuple(found)[1:5]: (found["id"], found["rating"], found["note"]) for found in db.execute(query)}
    for row in rows:
        if row[:4] not in known:
            added = db.execute(
                "INSERT INTO seed (prompt, seed, model, resolution, rating, note, raw, created_s)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row[:6], row.raw, now_s),
            )
            known[row[:4]] = (added.lastrowid, row.rating, row.note)
            continue
        number, old_rating, old_note = known[row[:4]]
        rating, note = row.rating or old_rating, row.note or old_note
        raw = row.raw if (rating, note) == (row.rating, row.note) else ""
        db.execute("UPDATE seed SET rating = ?, note = ?, raw = ? WHERE id = ?", (rating, note, raw, number))
        known[row[:4]] = (number, rating, note)


def _read(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(MAX_TABLE_BYTES + 1)
    except OSError as error:
        got = error.strerror or error
        raise FileError("cannot read the seed table", code="seeds_unreadable", field=path.name, got=got) from None


def _replace(path: Path, data: bytes) -> None:
    try:
        with atomic_write(path, durable=True) as part:
            part.write_bytes(data)
    except OSError as error:
        raise OutputError(
            "cannot write", code="output_unwritable", field=path.name, got=error, try_instead="another --outputs folder"
        ) from None


def _seed(row: sqlite3.Row) -> Seed:
    cells = (row[name] for name in ("prompt", "seed", "model", "resolution", "rating", "note", "raw"))
    found = parsed(row["recipe"])
    recipe = read_record(Sidecar, found) if isinstance(found, dict) else None
    return Seed(row["id"], Row(*cells), row["job"], row["path"] or "", recipe, row["created_s"])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
