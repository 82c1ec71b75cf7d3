"""The bytes of one file over HTTP: several ranges at once, into a partial file that outlives its process.

huggingface_hub reads in parallel, too, where hf-xet is installed. But in every version since 1.0 each try begins a
temporary file with a random name and removes it when it ends (2.4: file_download.py, `_download_to_tmp_and_move`;
its issues 4196 and 3648), and hf-xet takes no part of a file (`hf_xet` 1.8 downloads from byte 0); nor does it serve
mirrors and ModelScope. A download of hours must survive its process, so the ranges are read here.
"""

import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from turbodiff.spec.files import atomic_write, open_file
from turbodiff.weights.sources import TIMEOUT_S, Remote

if TYPE_CHECKING:
    import httpx

CONNECTIONS = 4  # at once; hubs count more as abuse
SEGMENT_BYTES = 64 << 20  # of one request
TICK_S = 0.25  # between two looks at what came
SAVE_S = 2.0  # between two writes of the list of ranges: what a power cut may cost
# A range is told by this header, not by status 206: ModelScope answers 200 (modelscope_hub, issue 50)
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

Range = tuple[int, int]  # first byte, byte behind the last


class RangeIgnored(ConnectionError):
    """The server sends the whole file where a range was asked for."""


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges without overlaps, in order; empty ones are left out."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


class Part:
    """A partial file beside its target, named by its checksum, and the list of the ranges that it holds.

    The list is written when the bytes are on the disk, so it never counts what is not there. A file without a list
    is a prefix: what older versions left.
    """

    def __init__(self, target: Path, remote: Remote) -> None:
        self.path = target.with_name(f".{target.name}.{remote.etag[:16]}.part")
        self.list_path = self.path.with_suffix(".ranges")
        self.nbytes = remote.nbytes
        self.lock = threading.Lock()
        end = min(self.path.stat().st_size, self.nbytes) if self.path.exists() else 0
        try:
            with open_file(self.list_path) as file:
                listed = json.loads(file.read())
            self.done = merged((max(0, int(first)), min(int(last), end)) for first, last in listed)
        except FileNotFoundError:
            self.done = merged([(0, end)])
        except (OSError, ValueError, TypeError, OverflowError, RecursionError):
            self.done = []

    @property
    def done_bytes(self) -> int:
        """How much is there."""
        return sum(end - start for start, end in self.done)

    def missing(self) -> list[Range]:
        """What is not there, in pieces of one request each."""
        edges = [0, *(edge for span in self.done for edge in span), self.nbytes]
        gaps = [gap for gap in zip(edges[::2], edges[1::2], strict=True) if gap[0] < gap[1]]
        return [(at, min(at + SEGMENT_BYTES, end)) for start, end in gaps for at in range(start, end, SEGMENT_BYTES)]

    def write(self, file: BinaryIO, at: int, data: bytes, stop: threading.Event) -> bool:
        """Put bytes in their place; False when this must not go on, and the file may be closed.

        Raises:
            OSError: the disk refused.
        """
        with self.lock:
            if stop.is_set():
                return False
            end = at + len(data)
            while at < end:
                wrote = os.pwrite(file.fileno(), data[len(data) - (end - at) :], at)
                self.done = merged([*self.done, (at, at + wrote)])
                at += wrote
        return True

    def save(self, file: BinaryIO) -> None:
        """Write the list of what is on the disk for sure.

        Raises:
            OSError: the disk refused.
        """
        with self.lock:
            done = list(self.done)
        os.fdatasync(file.fileno())
        with atomic_write(self.list_path) as part:
            part.write_text(json.dumps(done), "utf-8")

    def discard(self) -> None:
        """Remove the partial file and its list."""
        self.list_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def receive(
    remote: Remote, part: Part, headers: Mapping[str, str], connections: int = CONNECTIONS
) -> Generator[int, None, None]:
    """Fill `part` with what is missing; yield the bytes that are there, every TICK_S and at the end.

    `connections` at once; 0: the server ignores ranges, so one connection from the first byte.

    Raises:
        RangeIgnored: call again with no connections.
        ConnectionError: the connection broke, or the server refused; what came is kept.
        OSError: the disk refused.
    """
    import httpx

    whole = connections == 0
    part.done = [] if whole else part.done
    waiting = deque([(0, part.nbytes)] if whole else part.missing())
    stop, errors = threading.Event(), list[Exception]()

    with (
        part.path.open("r+b") as file,
        httpx.Client(timeout=TIMEOUT_S, follow_redirects=True, headers=dict(headers)) as client,
    ):

        def read() -> None:
            try:
                while waiting and not stop.is_set():
                    _read_range(client, remote, part, file, waiting.popleft(), stop, whole)
            except (httpx.HTTPError, OSError) as error:
                errors.append(error)
            except (IndexError, ValueError, RuntimeError):  # another took the last piece; the client was closed
                return

        part.save(file)
        readers = [threading.Thread(target=read, daemon=True) for _ in range(min(connections or 1, len(waiting)))]
        saved_s = time.monotonic()
        try:
            for reader in readers:
                reader.start()
            while living := [reader for reader in readers if reader.is_alive()]:
                living[0].join(TICK_S)
                yield part.done_bytes
                if time.monotonic() - saved_s > SAVE_S:
                    part.save(file)
                    saved_s = time.monotonic()
        finally:
            with part.lock:  # after this nothing more is written
                stop.set()
            part.save(file)
    yield part.done_bytes
    # the disk's word counts before the server's
    errors.sort(
        key=lambda error: (isinstance(error, ConnectionError | httpx.HTTPError), not isinstance(error, RangeIgnored))
    )
    for error in errors:
        if isinstance(error, OSError):
            raise error
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    if part.done_bytes < part.nbytes:
        raise ConnectionError(f"the connection ended after {part.done_bytes} of {part.nbytes} bytes")


def _read_range(
    client: "httpx.Client", remote: Remote, part: Part, file: BinaryIO, span: Range, stop: threading.Event, whole: bool
) -> None:
    """Read one range into its place.

    Raises:
        RangeIgnored, ConnectionError, httpx.HTTPError, OSError: as `receive`.
    """
    at, end = span
    asked = {"Accept-Encoding": "identity"} | ({} if whole else {"Range": f"bytes={at}-{end - 1}"})
    with client.stream("GET", remote.location, headers=asked) as answer:
        answer.raise_for_status()
        told = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if told and (int(told[1]) != at or told[3] not in ("*", str(part.nbytes))):
            raise ConnectionError(f"bytes {told[1]} of {told[3]} came, {at} of {part.nbytes} were asked for")
        if not told and span != (0, part.nbytes):
            raise RangeIgnored("the server ignores ranges")
        for chunk in answer.iter_raw():
            data = chunk[: end - at]  # a server that sends more is cut short
            if not part.write(file, at, data, stop):
                return
            at += len(data)
            if at >= end:
                return
    raise ConnectionError(f"the connection ended {end - at} bytes early")
