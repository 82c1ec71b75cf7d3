"""Sends inputs through a door in a child that an audit hook watches: what it may not do ends the test.

Neither time nor memory nor an error that is not meant for a person may get beyond the door, nor may a file outside the
test's own folder be touched, a host be asked, a program be started or a pickle's name be looked up (PEP 578; Python's
table of audit events). What a library does in C without Python is not seen: the picture decoder has no right to write.
"""

import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from turbodiff.spec.errors import TurbodiffError

CPU_S, MEMORY_KIB = 2.0, 200 << 10
WRITES = frozenset(
    f"os.{name}"
    for name in (
        "mkdir",
        "rename",
        "remove",
        "rmdir",
        "link",
        "symlink",
        "truncate",
        "chmod",
        "chown",
        "utime",
        "mkfifo",
    )
)
CALLS = frozenset(
    ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname")
)
PROGRAMS = frozenset(("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"))
PICKLES = frozenset(("pickle.find_class", "marshal.loads", "marshal.load"))


class Forbidden(BaseException):
    """Something that no input may cause; no `except Exception` of the program swallows it."""


class Watch:
    """The audit hook; it judges while `on`.

    Args:
        own: the folder that may be written.
    """

    def __init__(self, own: Path) -> None:
        self.own, self.on, self.seen = own.resolve(), False, list[str]()

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Judge one event."""
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            kinds = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            paths = [path] if (any(letter in mode for letter in "wax+") if mode else (flags or 0) & kinds) else []
        elif event in WRITES:
            paths = [arg for arg in args if isinstance(arg, str | bytes | os.PathLike)]
        elif event in CALLS | PROGRAMS or (event in PICKLES and not _imports()):
            self._refuse(event, args)
        else:
            return
        for path in (os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)):
            found = Path(os.path.realpath(path))
            if path != os.devnull and self.own not in (found, *found.parents):
                self._refuse(event, args)

    def _refuse(self, event: str, args: tuple[Any, ...]) -> None:
        self.seen.append(f"{event}{args!r:.300}")
        raise Forbidden(self.seen[-1])


def _imports() -> bool:
    """Whether Python itself loads a module, which reads marshalled code."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def through(
    door: str, inputs: Iterable[object], enter: Callable[[Any], object], own: Path, memory_kib: int = MEMORY_KIB
) -> dict[str, Any]:
    """Send each input through a door, in a child; returns the counts.

    Raises:
        AssertionError: an input was worse than refused.
    """
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        found: dict[str, Any] = {"failed": "the child ended"}
        try:
            os.close(reads)
            found = _examine(door, inputs, enter, own, memory_kib)
        except BaseException:  # noqa: BLE001  whatever was raised: a child that goes on would run all tests after this
            found = {"failed": traceback.format_exc()[-4000:]}
        finally:
            os.write(writes, json.dumps(found).encode()[:60_000])
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    counts: dict[str, Any] = json.loads(data or b'{"failed": "the child was killed"}')
    assert "failed" not in counts, f"{door}: {counts['failed']}"
    return counts


def _examine(
    door: str, inputs: Iterable[object], enter: Callable[[Any], object], own: Path, memory_kib: int
) -> dict[str, Any]:
    watch = Watch(own)
    sys.addaudithook(watch)
    outcomes, slowest_s, most_kib, first_kib = Counter[str](), 0.0, 0, memory()["RssAnon"]
    for number, given in enumerate(inputs):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (proc(5))
        before_kib, start = memory()["VmRSS"], time.process_time()
        watch.on = True
        try:
            enter(given)
            outcomes["taken"] += 1
        except TurbodiffError as error:
            assert error.code and len(str(error)) < 20_000, f"input {number}: {error.code}"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"input {number}: {error!r:.500}") from error
        finally:
            watch.on = False
        assert not watch.seen, f"input {number}: {watch.seen}"  # also where a C caller ate the exception
        slowest_s = max(slowest_s, time.process_time() - start)
        assert slowest_s < CPU_S, f"input {number} took {slowest_s:.1f} s"
        most_kib = max(most_kib, memory()["VmHWM"] - before_kib)
        assert most_kib < memory_kib, f"input {number}: {most_kib >> 10} MiB"
    kept_kib = memory()["RssAnon"] - first_kib
    assert kept_kib < memory_kib, f"{kept_kib >> 10} MiB stay"
    return {"door": door, **outcomes, "slowest_s": slowest_s, "most_kib": most_kib, "kept_kib": kept_kib}


def memory() -> dict[str, int]:
    """What this process holds, in KiB, by the names of proc(5)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) for line in lines if line[0].startswith(("Vm", "Rss"))}


def told(counts: dict[str, Any]) -> str:
    """The counts as a line that CI prints."""
    taken, refused = counts.get("taken", 0), counts.get("refused", 0)
    return (
        f"{counts['door']}: {taken + refused} inputs: {taken} taken, {refused} refused, 0 uncaught, 0 writes outside,"
        f" 0 calls out; at most {counts['slowest_s']:.3f} s and {counts['most_kib'] >> 10} MiB each"
    )
