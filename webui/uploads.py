"""Uploads take a bounded place: what no form needs any more goes, and beyond the bound none is taken.

Gradio keeps what a browser sends below the state folder and forgets after a restart what it kept. A picture that a job
uses was copied away when the job was queued (snapshot.py), so that everything here may go an hour after its last use.
"""

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from webui.wording import Words, language_of

MAX_BYTES = 1 << 30
MAX_FILES = 2000
NEEDED_S = 3600.0  # a form that stands open for longer asks for its picture again
SWEEP_S = 600.0
RESERVED_BYTES = 25 << 20  # of an upload that tells no length


class Kept(NamedTuple):
    """One file: when it was last used, its size, where it lies."""

    used_s: float
    nbytes: int
    path: Path


def kept_files(folder: Path) -> list[Kept]:
    """Every file below a folder, the longest unused first; none where a link leads elsewhere."""
    found = []
    for place, _, names in () if folder.is_symlink() else os.walk(folder):
        for path in (Path(place, name) for name in names):
            with contextlib.suppress(OSError):
                stat = path.lstat()
                found.append(Kept(stat.st_mtime, stat.st_size, path))
    return sorted(found)


def make_room(folder: Path, wanted_bytes: int = 0) -> bool:
    """Remove what nobody used for an hour; whether there is room then."""
    now_s, files = time.time(), kept_files(folder)
    n_files, total_bytes = len(files), wanted_bytes + sum(file.nbytes for file in files)
    for file in files:
        if now_s - file.used_s < NEEDED_S:
            break
        with contextlib.suppress(OSError):
            file.path.unlink(missing_ok=True)
            n_files, total_bytes = n_files - 1, total_bytes - file.nbytes
            file.path.parent.rmdir()  # Gradio makes one for each file; any other is not empty
    return n_files < MAX_FILES and total_bytes <= MAX_BYTES


def sweep_until(stopped: threading.Event, folder: Path) -> None:
    """Every ten minutes remove what nobody used for an hour, also where nobody uploads anything."""
    while not stopped.wait(SWEEP_S):
        with contextlib.suppress(OSError):
            make_room(folder)


class UploadQuota:
    """ASGI middleware that takes an upload only where there is room for it; uploads under way count, too."""

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self.app, self.folder = app, folder
        self._coming_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith("/upload"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        nbytes = int(length) if length.isdecimal() and len(length) < 16 else RESERVED_BYTES
        self._coming_bytes += nbytes
        try:
            if await to_thread.run_sync(make_room, self.folder, self._coming_bytes):
                return await self.app(scope, receive, send)
            words = Words(language_of(headers.get("accept-language", "")))
            return await PlainTextResponse(words("server.uploads_full"), 507)(scope, receive, send)
        finally:
            self._coming_bytes -= nbytes
