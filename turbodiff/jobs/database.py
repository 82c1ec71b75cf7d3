"""The database file: tables, migrations, journal mode, and the errors a person may meet when it opens."""

import contextlib
import errno
import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from turbodiff.spec.errors import FileError, OutputError
from turbodiff.spec.files import NotAFileError, check_file, file_system, sync

DATABASE = "turbodiff.db"
LOCKED = "store_locked"  # code of the error
DAMAGED = "store_damaged"
PATIENCE_S = 5.0  # with another program that holds the database
PACK_CHARS = 300
SqlValue = str | bytes | int | float | None
# file systems whose shared memory maps or locks WAL cannot rely on (sqlite.org/wal.html; WSL's /mnt/c is 9p or drvfs)
NO_SHARED_MEMORY = {"9p", "drvfs", "nfs", "nfs4", "cifs", "smb3", "fuse.sshfs"}

# one script per schema version; `PRAGMA user_version` says how many have run
MIGRATIONS = tuple(Path(__file__).with_name(f"schema_{version}.sql").read_text("utf-8") for version in (1, 2, 3))


def as_column(value: BaseModel | dict[str, Any] | SqlValue) -> SqlValue:
    """A value as a column holds it: models and dicts as JSON, compressed where it is long.

    That keeps a job below 8 KB.
    """
    if not isinstance(value, BaseModel | dict):
        return value
    text = value.model_dump_json() if isinstance(value, BaseModel) else json.dumps(value)
    return zlib.compress(text.encode(), 9) if len(text) > PACK_CHARS else text


def open_database(path: Path) -> sqlite3.Connection:
    """A connection with every migration applied, durable after each commit.

    WAL with synchronous FULL: 0 of 276 975 acknowledged rows lost in 400 kills, 0.2 ms a commit. File systems
    without shared memory maps (9p, NFS, some /mnt/c) refuse WAL; there the journal is DELETE. A database in a folder
    that takes no file can only be read.

    Raises:
        FileError: the file is damaged or no file, or was written by a newer version; it is left as it is.
        OutputError: the folder cannot be written.
    """
    address = path.absolute().as_uri()
    try:
        read_only = path.is_file() and not os.access(path.parent, os.W_OK)
        if read_only:  # a log that was not merged must be read, too (sqlite.org/wal.html, "Read-only databases")
            address += "?mode=ro" if path.with_name(path.name + "-wal").exists() else "?immutable=1"
        if path.is_symlink() and not path.exists():
            raise NotAFileError(errno.ENOENT, "it is a link to nowhere", str(path))
        check_file(path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds prompts
        db = sqlite3.connect(address, timeout=5.0, isolation_level=None, check_same_thread=False, uri=True)
    except NotAFileError as error:
        raise damaged(path, error) from error
    except (OSError, sqlite3.OperationalError) as error:
        raise write_error(path, error) from error
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(db.close)
        try:
            db.row_factory = sqlite3.Row
            db.text_factory = _text
            db.execute("PRAGMA busy_timeout = 5000")
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > len(MIGRATIONS):
                raise FileError(
                    "the job store was written by a newer turbodiff",
                    code="store_newer",
                    field="state",
                    got=f"schema {version}",
                    expected=f"schema {len(MIGRATIONS)} or older",
                    try_instead=f"upgrade turbodiff, or another --state-dir (the file {path} was left as it is)",
                )
            if read_only:
                on_failure.pop_all()
                return db
            set_journal_mode(db, file_system(path))
            db.execute("PRAGMA synchronous = FULL")  # `Database.write` says what it wants of each transaction
            db.execute("PRAGMA foreign_keys = ON")
            if version < len(MIGRATIONS):
                db.execute("BEGIN IMMEDIATE")  # a failure closes the connection, which rolls back
                version = int(db.execute("PRAGMA user_version").fetchone()[0])  # another process may have been first
                for statement in ";".join(MIGRATIONS[version:]).split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
                db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise store_error(path, error) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite quotes what it cannot read
            raise damaged(path, error) from error
        on_failure.pop_all()
    return db


def _text(data: bytes) -> str:
    """A text of the database; what is damaged in it becomes U+FFFD."""
    return data.decode("utf-8", "replace")


def damage_of(db: sqlite3.Connection) -> str:
    """What is wrong with an open database: its pages and rows as SQLite checks them, and its tables; "" for nothing.

    Raises:
        sqlite3.DatabaseError: SQLite cannot even check it.
    """
    answer = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    if answer != "ok":
        return answer
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name"
    with contextlib.closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(";".join(MIGRATIONS))
        expected = fresh.execute(query).fetchall()
    return "" if [tuple(row) for row in db.execute(query)] == expected else "its tables are not those of a job store"


def set_journal_mode(db: sqlite3.Connection, system: str = "") -> str:
    """WAL where the file system can, DELETE elsewhere; returns the mode in force."""
    mode = ""
    if system not in NO_SHARED_MEMORY:
        try:
            mode = str(db.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if "readonly" in str(error) or "full" in str(error):
                raise
    if mode != "wal":
        mode = str(db.execute("PRAGMA journal_mode = DELETE").fetchone()[0])
    return mode


def damaged(path: Path, error: Exception) -> FileError:
    """The error for a database file that SQLite cannot read."""
    return FileError(
        f"the job store is damaged ({error})",
        code=DAMAGED,
        field="state",
        got=path,
        try_instead="start the app: it moves the file aside and restores the newest backup and every clip's sidecar",
    )


def store_error(path: Path, error: sqlite3.OperationalError) -> FileError:
    """The error for what SQLite calls operational: tables that are not as they should be are damage, all else is not
    being able to write."""
    unlike = any(words in str(error) for words in ("no such", "already exists", "malformed", "has no column"))
    return damaged(path, error) if unlike else write_error(path, error)


def write_error(path: Path, error: Exception) -> OutputError:
    """The error for a write that failed although the file is sound: disk full, read-only, locked too long."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return OutputError(
            f"another program holds the job store ({error})",
            code=LOCKED,
            field="state",
            got=path,
            try_instead="close that program, and do it again",
        )
    full = "full" in str(error)
    return OutputError(
        f"the job store cannot be written ({error})",
        code="disk_full" if full else "store_unwritable",
        field="state",
        got=path,
        try_instead="free some space, or another --state-dir" if full else "another --state-dir, one that is yours",
    )


class Database:
    """One connection to the database of a state folder: transactions, and errors in words. Safe to share between
    threads, cheap to open in each process.

    Raises:
        FileError: the database is damaged or newer than this program.
        OutputError: it cannot be written (also from every writing method: disk full, read-only).
    """

    def __init__(self, state: Path, now: Callable[[], float] = time.time) -> None:
        self.path = Path(state) / DATABASE
        self.now = now
        self._lock = threading.RLock()
        self._db = open_database(self.path)
        self._log = self.path.with_name(f"{DATABASE}-wal")
        self._is_wal = self._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        self._set: dict[str, object] = {}

    def close(self) -> None:
        """Close the connection; the store object is of no use afterwards."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def write(self, durable: bool = True, patience_s: float = PATIENCE_S) -> Iterator[sqlite3.Connection]:
        """One short transaction: committed and on disk when the block ends, rolled back if it raises.

        With `durable` False a power cut (no crash) may undo it: progress and samples are not worth an fsync each.
        `patience_s` is how long another program may hold the database.

        A commit into a log (WAL) is waited for after the database was let go, so that nobody else waits for our disk.
        What it wrote is in the log, or was synced with it on its way into the database: a checkpoint of synchronous
        NORMAL syncs the log first (sqlite.org/wal.html, "Checkpointing").
        """
        with self._lock, self._in_words():
            try:
                self._ask("busy_timeout", round(1000 * patience_s))
                self._ask("synchronous", "FULL" if durable and not self._is_wal else "NORMAL")
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            if durable and self._is_wal:
                try:
                    sync(self._log)
                except FileNotFoundError:  # the whole folder was taken away: the supervisor sees to that
                    pass
                except OSError as error:
                    raise write_error(self.path, error) from error

    def _ask(self, pragma: str, value: object) -> None:
        """Set a pragma of the connection where it is another one now."""
        if self._set.get(pragma) != value:
            self._db.execute(f"PRAGMA {pragma} = {value}")
            self._set[pragma] = value

    def rows(self, sql: str, *values: str | bytes | int | float | None) -> list[sqlite3.Row]:
        """The rows of one query."""
        with self._lock, self._in_words():
            return self._db.execute(sql, values).fetchall()

    def damage(self) -> str:
        """What is wrong with the database, "" for a sound one."""
        try:
            with self._lock, self._in_words():
                return damage_of(self._db)
        except FileError as error:
            return error.what

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise store_error(self.path, error) from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # its subclasses are our own mistakes
                raise
            raise damaged(self.path, error) from error
        except UnicodeDecodeError as error:  # of SQLite's message, which quotes what it cannot read
            raise damaged(self.path, error) from error
