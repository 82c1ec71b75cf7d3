"""The two log files in the working folder, and why writing them can never stop a job.

`webui_startup_latest.log` is one inode for ever: a start copies it to state/logs and truncates it, so that
`tail -f` follows from run to run. The supervisor is the only writer; what its children print arrives through pipes
and leaves as whole lines: `2026-11-23T00:31:07.123Z [INFO] worker j12 Loading Wan2.1-14B model... 13.5/27.0 GiB 6.1 s`.
`webui_test.log` is the run log (run_log.py).
"""

import contextlib
import fcntl
import os
import re
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

from turbodiff.spec.files import check_file, files_of, open_file
from turbodiff.spec.text import printable

STARTUP_LOG = "webui_startup_latest.log"
RUN_LOG = "webui_test.log"
MAX_BYTES = 20 << 20
KEEP_ARCHIVES = 10
RING_LINES = 2000  # what the page shows when the disk takes no more
MAX_LINE_CHARS = 4000
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

# a level that a program put in front of its own line: "[INFO] ...", "INFO: ...", "WARNING:root:..."
_LEVEL = re.compile(r"^\[?(DEBUG|INFO|WARNING|ERROR|CRITICAL)(?:\]|:(?:[\w.]+:)?)\s*")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_SECRETS = (
    re.compile(r"\b(hf_)[A-Za-z0-9]{6,}"),  # Hugging Face access tokens
    re.compile(r"(?i)(authorization:?\s*(?:basic|bearer)\s+)\S+"),
    re.compile(r"(?i)(://[^/\s:@]+:)[^@\s/]+(?=@)"),  # user:password@ in an address
    re.compile(r"(?i)((?:\b|_)(?:token|password|passwd|secret|api_?key|auth)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"),
)
_OOM = re.compile(r"(?i)out of memory|cannot allocate memory|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED")


def redact(text: str) -> str:
    """The text without access tokens, passwords and authorization headers."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


def clean(text: str) -> str:
    """One printable line: colours gone, control characters escaped, secrets redacted, at most 4 000 characters."""
    text = _ANSI.sub("", text[: 4 * MAX_LINE_CHARS])
    return redact(printable(text))[:MAX_LINE_CHARS]


def stamp(at_s: float) -> str:
    """Unix seconds as UTC with milliseconds: 2026-11-23T00:31:07.123Z."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def log_line(text: str, who: str, job: int | None = None, level: str = "INFO", at_s: float | None = None) -> str:
    """One line of the log with its newline; a level in front of `text` wins, memory failures say OOM."""
    text = text[: 4 * MAX_LINE_CHARS]
    found = _LEVEL.match(text)
    if found:
        level, text = found.group(1), text[found.end() :]
    if _OOM.search(text):
        level = level if level in ("ERROR", "CRITICAL") else "ERROR"
        text = text if "OOM" in text else f"OOM {text}"
    name = f"{who} j{job}" if job else who
    return f"{stamp(time.time() if at_s is None else at_s)} [{level}] {name} {clean(text)}\n"


class LogFile:
    """An append-only file that keeps its inode, survives deletion, and swallows every write error.

    What could not be written is counted; the last 2 000 lines are always in `ring`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ring: deque[str] = deque(maxlen=RING_LINES)
        self.lost_lines = 0
        self._fd = -1
        self._checked_s = 0.0
        self._is_held = False

    def take(self) -> bool:
        """Hold the file until it is closed; False where another supervisor holds it."""
        try:
            self._open()
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._is_held = True
        except BlockingIOError:
            self.close()
            return False
        except OSError:  # a file system without locks, or no file
            pass
        return True

    def write(self, line: str) -> None:
        """Append one whole line (its newline included) in one write."""
        self.ring.append(line.rstrip("\n"))
        try:
            self._open()
            data = line.encode("utf-8", "backslashreplace")
            if os.write(self._fd, data) != len(data):
                self.lost_lines += 1
        except OSError:
            self.lost_lines += 1
            self.close()

    def say(self, text: str, who: str = "supervisor", job: int | None = None, level: str = "INFO") -> None:
        """Append a line of our own."""
        self.write(log_line(text, who, job, level))

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def start_over(self, archive: Path | None, name: str) -> None:
        """Copy the file into the archive folder and truncate it, the inode stays. Call while holding the state lock."""
        with contextlib.suppress(OSError):
            self._open()
            if archive is not None and os.fstat(self._fd).st_size:
                archive.mkdir(parents=True, exist_ok=True)
                (archive / f"{name}.log").write_bytes(self.path.read_bytes())
                kept = (file for file in files_of(archive) if file.suffix == ".log")
                for old in sorted(kept, key=lambda file: file.stat().st_mtime)[:-KEEP_ARCHIVES]:
                    old.unlink(missing_ok=True)
            os.ftruncate(self._fd, 0)

    def cap(self, archive: Path | None, name: str) -> None:
        """Start over when the file has grown beyond 20 MB."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size > MAX_BYTES:
                self.start_over(archive, name)

    def _open(self) -> None:
        now = time.monotonic()
        if self._fd >= 0 and now - self._checked_s > 1.0:
            self._checked_s = now
            try:
                replaced = not os.path.samestat(self.path.stat(), os.fstat(self._fd))
            except OSError:
                replaced = True
            if replaced:  # or deleted, while we write
                self.close()
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            check_file(self.path)  # a pipe would wait for its reader
            self._fd = os.open(self.path, flags, 0o644)
            if self._is_held:  # a file that took the place of the one that we held
                with contextlib.suppress(OSError):
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def startup_log(working: Path, state: Path) -> LogFile:
    """The start-up log, held: in the working folder, or in the state folder where the first cannot be written or
    another app writes its own there."""
    log = LogFile(log_folder(working, state) / STARTUP_LOG)
    return log if log.take() else LogFile(state / STARTUP_LOG)


def log_folder(working: Path, state: Path) -> Path:
    """Where the logs go: the working folder, or the state folder if that cannot be written."""
    try:
        probe = working / f".turbodiff-{os.getpid()}"
        probe.touch()
        probe.unlink()
        return working
    except OSError:
        state.mkdir(parents=True, exist_ok=True)
        return state


def tail(path: Path, lines: int = 200) -> list[str]:
    """The last lines of a log, [] if there is none; reads at most 256 bytes a line from the end."""
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - max(lines, 1) * 256)
            file.seek(start)
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    found = text.splitlines()
    return (found[1:] if start else found)[-lines:]
