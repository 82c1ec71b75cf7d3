"""The index of the library: one row a clip in SQLite, so that 10,000 of them are searched in milliseconds.

Sidecars are the truth; the index is made from them alone, may be deleted at any time, and a damaged one is made anew.
A folder is read again when something in it got or lost a name; every minute each file is looked at, for sidecars that a
person edits in place. Where the state folder takes no file, the index lives in memory.
"""

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from turbodiff.archive import trash
from turbodiff.archive.clips import created_at, day_folders, edit_sidecar, read_sidecar, sidecar_path, sidecar_text
from turbodiff.spec.clips import Sidecar, clip_id, rating_parts, read_record
from turbodiff.spec.errors import FileError, RequestError

T = TypeVar("T")
INDEX, VERSION = "clips.db", 1
SCHEMA = """
CREATE TABLE clip (
  path TEXT PRIMARY KEY, folder TEXT, name TEXT, batch TEXT, state TEXT, created_s REAL, bytes INTEGER, poster INTEGER,
  kind TEXT, prompt TEXT, model TEXT, seed INTEGER, width INTEGER, height INTEGER, num_frames INTEGER, fps INTEGER,
  rating TEXT, stars INTEGER, note TEXT, starred INTEGER, tags TEXT, family TEXT, words TEXT);
CREATE INDEX clip_order ON clip (batch, created_s, path);
CREATE INDEX clip_size ON clip (batch, bytes);
CREATE INDEX clip_folder ON clip (folder, state);
CREATE INDEX clip_name ON clip (name);
CREATE INDEX clip_family ON clip (family, seed);
CREATE TABLE folder (path TEXT PRIMARY KEY, mtime_ns INTEGER);
"""
ORDERS: dict[str, str] = {
    "newest": "created_s DESC, path DESC", "oldest": "created_s, path", "rating": "stars DESC, created_s DESC, path",
    "largest": "bytes DESC, path", "prompt": "prompt COLLATE NOCASE, path", "seed": "seed, path",
}  # fmt: skip
ONLY: dict[str, str] = {
    "all": "batch = ''", "starred": "batch = '' AND starred", "rated": "batch = '' AND stars >= 4",
    "unrated": "batch = '' AND rating = ''", "t2v": "batch = '' AND kind = 't2v'",
    "i2v": "batch = '' AND kind = 'i2v'", "trash": "batch != ''",
}  # fmt: skip
IN_LIBRARY, IN_TRASH = "+batch = ''", "+batch != ''"  # "+": SQLite shall look up the few names, not all of a batch
SHOWN = (
    "path, name, batch, created_s, bytes, poster, kind, prompt, model, seed, width, height, num_frames, fps, rating,"
    " note, starred, tags"
)
ROW = f"INSERT OR REPLACE INTO clip VALUES ({', '.join('?' * 23)})"
NEEDED = ("request", "created", "rating", "note", "starred", "tags", "ran", "versions")  # of a sidecar: not its plan
TERM = re.compile(r'(?:(seed|model|tag|rating|note|种子|模型|标签|评分|备注)[:：])?(?:["“”]([^"“”]*)["“”]|(\S+))', re.I)
COLUMNS = {"种子": "seed", "模型": "model", "标签": "tag", "评分": "rating", "备注": "note"}
SETTLED_NS = 2_000_000_000  # a folder that changed within two seconds may change again within one tick of its clock
BATCH = 100  # sidecars that are read between two writes
WHOLE_S = 60.0  # between two looks at every file
MAX_TERMS, MAX_PROMPT, MAX_WORDS = 16, 2000, 8000  # characters that the index keeps of a prompt, and of all words
MAX_TAGS, MAX_TAG_CHARS, MAX_NOTE_CHARS = 20, 40, 500


@dataclass(frozen=True)
class Entry:
    """A clip as the index knows it; `batch` is its deletion, "" for a clip that is in the library."""

    path: Path
    name: str
    batch: str
    created_s: float
    size_bytes: int
    poster: bool
    kind: str
    prompt: str
    model: str
    seed: int | None
    width: int
    height: int
    num_frames: int
    fps: int
    rating: str
    note: str
    starred: bool
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """Some clips of an answer, how many there are in all, and what library and trash take of the disk."""

    entries: tuple[Entry, ...] = ()
    total: int = 0
    clips: int = 0
    size_bytes: int = 0
    trashed: int = 0
    trash_bytes: int = 0
    reading: bool = False  # sidecars are being read now


def tags_of(text: str) -> tuple[str, ...]:
    """The tags that a person typed, between blanks or commas, each once."""
    words = dict.fromkeys(word[:MAX_TAG_CHARS] for word in re.split(r"[\s,，、;；#]+", text) if word)
    return tuple(words)[:MAX_TAGS]


class ClipIndex:
    """The clips of an `outputs` folder, found by their index in the `state` folder; safe for several threads."""

    def __init__(self, outputs: Path, state: Path) -> None:
        self.outputs = outputs
        self._place = state / INDEX
        self._db: sqlite3.Connection | None = None
        self._answers: dict[object, Found] = {}
        self._lock = threading.RLock()
        self._refreshing = threading.Lock()
        self._read_s = self._whole_s = float("-inf")

    # --- what is there ---------------------------------------------------------------------------------------------

    def find(self, text: str = "", only: str = "all", order: str = "newest", limit: int = 60, offset: int = 0) -> Found:
        """Clips that hold every word of `text`, which may be `seed:42`, `model:14b`, `tag:cat`, `rating:4` or "a b"."""
        where, terms = _condition(text, only)

        def ask(db: sqlite3.Connection) -> Found:
            # others' writes change the one number, our own the other: the same question has the same answer until then
            version = (db.execute("PRAGMA data_version").fetchone()[0], db.total_changes, self._refreshing.locked())
            key = (text, only, order, limit, offset, version)
            if key in self._answers:
                return self._answers[key]
            sizes = db.execute("SELECT batch != '', count(*), sum(bytes) FROM clip GROUP BY batch != ''").fetchall()
            (clips, size_bytes), (trashed, trash_bytes) = (
                next(((row[1], row[2]) for row in sizes if row[0] == side), (0, 0)) for side in (0, 1)
            )
            total = int(db.execute(f"SELECT count(*) FROM clip WHERE {where}", terms).fetchone()[0])
            query = f"SELECT {SHOWN} FROM clip WHERE {where} ORDER BY {ORDERS.get(order, ORDERS['newest'])}"
            rows = db.execute(f"{query} LIMIT ? OFFSET ?", (*terms, limit, max(0, offset))).fetchall()
            entries = tuple(self._entry(row) for row in rows)
            answer = Found(entries, total, clips, size_bytes, trashed, trash_bytes, version[2])
            self._answers = {key: answer, **dict(list(self._answers.items())[:8])}
            return answer

        return self._run(ask)

    def entry(self, name: str) -> Entry | None:
        """The clip of the library of that id."""
        return next(iter(self._entries([name], IN_LIBRARY)), None)

    def same_but_seed(self, name: str) -> list[Entry]:
        """Clips that differ from one in nothing but the seed, that one first, each seed once."""
        asked = f"SELECT {SHOWN} FROM clip WHERE {IN_LIBRARY} AND family = ? ORDER BY name != ?, created_s DESC"
        family = f"SELECT family FROM clip WHERE {IN_LIBRARY} AND name = ?"

        def ask(db: sqlite3.Connection) -> list[Entry]:
            own = db.execute(family, (name,)).fetchone()
            rows = db.execute(asked, (own["family"], name)).fetchall() if own and own["family"] else []
            by_seed: dict[int | None, Entry] = {}
            for row in rows:
                by_seed.setdefault(row["seed"], self._entry(row))
            return list(by_seed.values())

        return self._run(ask)

    # --- what a person does with clips -----------------------------------------------------------------------------

    def edit(self, names: Collection[str], **cells: str | bool | tuple[str, ...]) -> int:
        """Write `rating`, `note`, `starred` or `tags` into the sidecars of clips; returns how many there were.

        Raises:
            RequestError: more than 500 characters.
            FileError: a sidecar cannot be written.
        """
        for name, value in cells.items():
            if isinstance(value, str) and len(value) > MAX_NOTE_CHARS:
                raise RequestError("too long", code="note_long", field=name, got=len(value), expected=MAX_NOTE_CHARS)
        said: dict[str, JsonValue] = {name: list(one) if isinstance(one, tuple) else one for name, one in cells.items()}
        found = self._entries(names, IN_LIBRARY)
        for entry in found:
            edit_sidecar(entry.path, said)
        self.refresh()
        return len(found)

    def delete(self, names: Collection[str]) -> str:
        """Move clips to the trash; returns the batch that `restore` takes, "" where there was none of them.

        Raises:
            OutputError: the disk refused; the others are in the trash.
        """
        found = self._entries(names, IN_LIBRARY)
        try:
            paths = [entry.path for entry in found if entry.path.is_file()]
            return trash.move_to_trash(self.outputs, paths, datetime.now(UTC)) if paths else ""
        finally:
            self.refresh()

    def restore(self, names: Collection[str] = (), batch: str = "") -> int:
        """Take clips, or all of one deletion, out of the trash; returns how many.

        Raises:
            OutputError: the disk refused; the others are back.
        """
        try:
            return len(trash.restore(self.outputs, [entry.path for entry in self._in_trash(names, batch)]))
        finally:
            self.refresh()

    def erase(self, names: Collection[str]) -> int:
        """Remove clips of the trash for ever; returns how many.

        Raises:
            FileError: the disk refused.
        """
        found = self._in_trash(names, "")
        try:
            trash.erase(entry.path for entry in found)
            return len(found)
        finally:
            self.refresh()

    def _in_trash(self, names: Collection[str], batch: str) -> list[Entry]:
        if not batch:
            return self._entries(names, IN_TRASH)
        return self._real("batch != '' AND batch = ?", batch)

    def _entries(self, names: Collection[str], where: str) -> list[Entry]:
        return self._real(f"name IN (SELECT value FROM json_each(?)) AND {where}", json.dumps(list(names)))

    def _real(self, where: str, value: str) -> list[Entry]:
        """The clips of an answer that lie where the index says; a folder that a link replaced leads elsewhere."""
        query = f"SELECT {SHOWN} FROM clip WHERE {where}"
        found = self._run(lambda db: [self._entry(row) for row in db.execute(query, (value,))])
        outputs, folders = self.outputs.resolve(), {entry.path.parent for entry in found}
        real = {folder for folder in folders if folder.resolve() == outputs / folder.relative_to(self.outputs)}
        return [entry for entry in found if entry.path.parent in real]

    def _entry(self, row: sqlite3.Row) -> Entry:
        facts = {name: row[name] for name in row.keys() if name not in ("path", "bytes", "tags")}  # noqa: SIM118
        facts |= {"poster": bool(row["poster"]), "starred": bool(row["starred"]), "tags": tuple(row["tags"].split())}
        return Entry(path=self.outputs / row["path"], size_bytes=row["bytes"], **facts)

    # --- how the index follows the files -------------------------------------------------------------------------

    def refresh_soon(self, fresh_s: float = 3.0) -> None:
        """Look for changes in a thread of its own, unless that was done a moment ago."""
        if time.monotonic() - self._read_s > fresh_s and not self._refreshing.locked():
            threading.Thread(target=self.refresh, daemon=True).start()

    def refresh(self) -> None:
        """Bring the index in line with the files; new folders first, so that a first look shows new clips at once."""
        with self._refreshing:
            now_s = time.monotonic()
            whole = now_s - self._whole_s > WHOLE_S
            known = self._run(lambda db: {row["path"]: row["mtime_ns"] for row in db.execute("SELECT * FROM folder")})
            if whole:
                trash.purge(self.outputs, datetime.now(UTC))
            folders = {folder.relative_to(self.outputs).as_posix(): folder for folder in day_folders(self.outputs)}
            folders |= {path.relative_to(self.outputs).as_posix(): path for path in trash.trash_folders(self.outputs)}
            for key, folder in sorted(folders.items(), reverse=True):
                with contextlib.suppress(OSError):  # a folder that just went
                    changed_ns = folder.stat().st_mtime_ns
                    if not whole and known.get(key) == changed_ns:
                        continue
                    self._read_folder(folder, key)
                    kept = changed_ns if time.time_ns() - changed_ns > SETTLED_NS else 0
                    self._write("INSERT OR REPLACE INTO folder VALUES (?, ?)", [(key, kept)])
            gone = [(key,) for key in known.keys() - folders.keys()]
            self._write("DELETE FROM clip WHERE folder = ?", gone)
            self._write("DELETE FROM folder WHERE path = ?", gone)
            self._read_s, self._whole_s = time.monotonic(), now_s if whole else self._whole_s

    def _read_folder(self, folder: Path, key: str) -> None:
        with os.scandir(folder) as listed:
            plain = (entry for entry in listed if entry.is_file(follow_symlinks=False))
            files = {entry.name: entry.stat(follow_symlinks=False) for entry in plain}
        query = "SELECT path, state FROM clip WHERE folder = ?"
        known = self._run(lambda db: {row["path"]: row["state"] for row in db.execute(query, (key,))})
        changed = []
        shown = (name for name in files if name.endswith(".mp4") and clip_id(name.removesuffix(".mp4")))
        for name in sorted(shown, reverse=True):
            parts = [files.get(name + end) for end in ("", ".json", ".jpg")]
            state = " ".join(f"{part.st_size}.{part.st_mtime_ns}" if part else "-" for part in parts)
            if known.pop(f"{key}/{name}", None) != state:
                changed.append((name, (state, sum(part.st_size for part in parts if part), parts[2] is not None)))
        self._write("DELETE FROM clip WHERE path = ?", [(path,) for path in known])
        for start in range(0, len(changed), BATCH):
            part = changed[start : start + BATCH]
            self._write(ROW, [_row(folder / name, key, *facts) for name, facts in part])

    def _write(self, statement: str, rows: Iterable[Sequence[object]]) -> None:
        values = list(rows)  # asked for once, also where the index is made anew in between

        def write(db: sqlite3.Connection) -> None:
            with db:
                db.executemany(statement, values)

        self._run(write)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Work on the index; one that is damaged is made anew, one that cannot be written moves into memory."""
        with self._lock:
            for _ in range(2):
                try:
                    return work(self._opened())
                except (sqlite3.Error, UnicodeDecodeError, OSError) as error:
                    # what is beside the point, such as a full disk, leaves the file to others
                    sound = isinstance(error, sqlite3.OperationalError | OSError) and "no such" not in str(error)
                    self._forget(remove=not sound)
            self._place = Path(":memory:")
            return work(self._opened())

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            in_memory = str(self._place) == ":memory:"
            if not in_memory:
                self._place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            db = self._db = sqlite3.connect(self._place, timeout=5.0, check_same_thread=False)
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA synchronous = OFF")  # what a power cut damages is made anew
            stamp = int.from_bytes(hashlib.blake2b(f"{VERSION} {self.outputs}".encode(), digest_size=3).digest())
            if db.execute("PRAGMA user_version").fetchone()[0] != stamp:  # an older one, or of another folder
                with db:
                    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                        db.execute(f'DROP TABLE "{name}"')
                    for statement in SCHEMA.strip().split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {stamp}")
                self._whole_s = self._read_s = float("-inf")
        return self._db

    def _forget(self, remove: bool) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        self._db, self._answers, self._whole_s, self._read_s = None, {}, float("-inf"), float("-inf")
        if remove:
            with contextlib.suppress(OSError):
                self._place.unlink(missing_ok=True)


def _condition(text: str, only: str) -> tuple[str, list[str | int]]:
    """The SQL condition of a search and its values."""
    where, terms = ONLY.get(only, ONLY["all"]), list[str | int]()
    for column, phrase, word in TERM.findall(text)[:MAX_TERMS]:
        said = (phrase or word).casefold()
        match column := COLUMNS.get(column, column.casefold()):
            case "seed" if said.isdecimal():
                clause, value = "seed = CAST(? AS INTEGER)", said[:18]
            case "rating" if said.strip("★").isdecimal() or not said.strip("★"):
                clause, value = "stars >= CAST(? AS INTEGER)", said[:2] if said.isdecimal() else str(len(said))
            case "tag":
                clause, value = "instr(' ' || lower(tags) || ' ', ?) > 0", f" {said} "
            case "model" | "note":
                clause, value = f"instr(lower({column}), ?) > 0", said
            case _:
                clause, value = "instr(words, ?) > 0", f"{column}:{said}" if column else said
        where, terms = f"{where} AND {clause}", [*terms, value]
    return where, terms


def _row(clip: Path, folder: str, state: str, size_bytes: int, poster: bool) -> tuple[object, ...]:
    """What the index holds of a clip, from its sidecar, which may say anything; of one that says nothing its name."""
    found, batch = _record(clip), clip.parent.parent.name if folder.startswith(trash.TRASH) else ""
    made = created_at(clip)
    created_s = made.timestamp() if made else clip.stat().st_mtime
    place = (f"{folder}/{clip.name}", folder, clip_id(clip.stem), batch, state, created_s, size_bytes, poster)
    if found is None:
        return (*place, "", "", "", None, 0, 0, 0, 0, "", 0, "", False, "", "", clip.stem.casefold())
    request, tags = found.request, tags_of(" ".join(found.tags[: 2 * MAX_TAGS]))
    stars = rating_parts(found.rating)[0].count("★")
    own = request.model_dump_json(exclude={"seed", "nonce"})
    family = hashlib.blake2b(own.encode("utf-8", "replace"), digest_size=8).hexdigest() if request.model else ""
    said = (
        request.prompt[:MAX_PROMPT], found.rating, found.note, *tags, clip.stem, request.model, request.kind,
        f"{request.width}x{request.height}", request.resolution, request.aspect, f"{request.num_frames}", request.seed,
        request.sampler, f"{request.steps}", request.negative_prompt[:MAX_PROMPT], found.ran.attention,
        found.ran.device_name, *(Path(lora.path).name for lora in request.loras), *found.ran.weights.values(),
    )  # fmt: skip
    words = " ".join(str(word) for word in said if word not in ("", None)).casefold()[:MAX_WORDS]
    shape = (request.width, request.height, request.num_frames, request.fps)
    cells = (found.rating[:MAX_NOTE_CHARS], min(stars, 5), found.note[:MAX_NOTE_CHARS], found.starred, " ".join(tags))
    return (
        *place, request.kind, request.prompt[:MAX_PROMPT], request.model, request.seed, *shape, *cells, family, words
    )  # fmt: skip


def _record(clip: Path) -> Sidecar | None:
    """What a clip's sidecar says but for its plan, which is long and not searched; else what its tags say."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        document = json.loads(sidecar_text(sidecar_path(clip)))
        if isinstance(document, dict):
            found = read_record(Sidecar, {name: document[name] for name in NEEDED if name in document})
            if found is not None:
                return found
    with contextlib.suppress(FileError):
        return read_sidecar(clip)
    return None
