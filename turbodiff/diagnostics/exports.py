"""Exports that the page asked for: one process each, its file in <state>/exports under a name that says what was asked.

The same question finds the same file. What is a day old is removed when the next one is asked for, and the oldest
where all of them take more than 8 GiB.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from turbodiff.diagnostics.background_tasks import background_task, start_task
from turbodiff.spec.errors import RequestError
from turbodiff.spec.exports import FORMATS, Export
from turbodiff.spec.files import STEM_BYTES, cut_name, files_of

EXPORT = (sys.executable, "-P", "-m", "turbodiff.cli", "export")
KEY = re.compile(r"\w[\w.-]{0,200}")
NOT_IN_KEY = re.compile(r"[^\w.-]|^[.-]")
KEPT_S = 86_400.0
MAX_AT_ONCE = 4
MAX_BYTES = 8 << 30  # of all exports that wait to be fetched


@dataclass(frozen=True)
class Exporting:
    """How an export is doing; `name` is its file's."""

    name: str
    state: Literal["running", "done", "failed"]
    share: float = 0.0
    error: Mapping[str, str] = field(default_factory=dict)
    media_type: str = ""
    size_bytes: int = 0


class Exports:
    """The exports of a state folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def start(self, clip: Path, asked: Export) -> str:
        """Begin an export, or find it begun or done; returns the name of its file.

        Raises:
            TurbodiffError: four run already, or no process could be started.
        """
        digest = hashlib.blake2b(f"{clip}{clip.stat().st_mtime_ns}{asked}".encode(), digest_size=4).hexdigest()
        stem = cut_name(NOT_IN_KEY.sub("_", clip.stem), STEM_BYTES)
        name = f"{stem}.{digest}{FORMATS[asked.format].suffix}"
        with self._lock:  # of many who ask at once four begin, too
            self._sweep()
            target = self._folder / name
            if not target.exists():
                if sum(one.state == "running" for one in self.newest(20)) >= MAX_AT_ONCE:
                    raise RequestError(
                        "too many exports run already", code="export_busy", field="export", got=MAX_AT_ONCE,
                        try_instead="wait until one is done",
                    )  # fmt: skip
                flags = {
                    "--format": asked.format, "--quality": asked.quality, "--fps": asked.fps,
                    "--upscale": asked.upscale, "--from": asked.start_s, "--to": asked.end_s, "--output": target,
                }  # fmt: skip
                told = [str(part) for pair in flags.items() for part in pair]
                start_task(self._folder, name, (*EXPORT, str(clip), *told, "--json"))
        return name

    def of(self, name: str) -> Exporting | None:
        """The export of that file name; None for one that nobody asked for."""
        if not KEY.fullmatch(name):
            return None
        path, task = self._folder / name, background_task(self._folder, name)
        with contextlib.suppress(OSError):
            kinds = [kind for kind in FORMATS.values() if name.endswith(kind.suffix)]
            if kinds:
                return Exporting(name, "done", 1.0, media_type=kinds[-1].media_type, size_bytes=path.stat().st_size)
        if not task.running and not (self._folder / f"{name}.pid").exists():
            return None
        share, error = 0.0, dict[str, str]()
        for line in task.lines:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict):
                    done, refused = said.get("done"), said.get("error")
                    share = done if isinstance(done, float) and 0 <= done <= 1 else share
                    error = (
                        {str(key): str(value) for key, value in refused.items()} if isinstance(refused, dict) else error
                    )
        return Exporting(name, "running" if task.running else "failed", share, error)

    def file(self, name: str) -> Path | None:
        """The finished file of an export."""
        found = self.of(name)
        return self._folder / name if found and found.state == "done" else None

    def newest(self, limit: int = 6) -> list[Exporting]:
        """The exports that were asked for last."""
        with contextlib.suppress(OSError):
            begun = sorted(self._folder.glob("*.pid"), key=lambda path: path.stat().st_mtime, reverse=True)
            return [found for path in begun[:limit] if (found := self.of(path.stem))]
        return []

    def _sweep(self) -> None:
        """Remove what is a day old, and the oldest files beyond `MAX_BYTES`: anybody may ask for ever another piece."""
        total_bytes, endings = 0, tuple(kind.suffix for kind in FORMATS.values())
        found = list[tuple[os.stat_result, Path]]()
        with contextlib.suppress(OSError):
            found = [(path.lstat(), path) for path in files_of(self._folder)]
        for stat, path in sorted(found, key=lambda pair: -pair[0].st_mtime):
            made = path.name.endswith(endings) and not path.name.startswith(".")
            total_bytes += stat.st_size if made else 0
            if time.time() - stat.st_mtime > KEPT_S or (made and total_bytes > MAX_BYTES):
                with contextlib.suppress(OSError):
                    path.unlink()
