"""What a person keeps of the form: prompts that were used, named presets of all fields, lists of wildcards.

<state>/prompts.json           prompts, the newest first, each once
<state>/presets/NAME.json      {"name": ..., "fields": {...}}
<state>/wildcards/NAME.txt     one choice a line; # begins a comment
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from turbodiff.spec.encodings import UnknownEncodingError, decode
from turbodiff.spec.errors import RequestError
from turbodiff.spec.files import atomic_write, open_file, output_error

MAX_PROMPTS, MAX_PRESETS, MAX_LINES = 1000, 200, 10_000
MAX_BYTES = 4 << 20  # of any of these files
NAME = re.compile(r"[^\x00-\x1f/\\]{1,60}")
WILDCARDS = "wildcards"


class Recipes:
    """Prompts, presets and wildcards below a state folder; damaged files are passed over."""

    def __init__(self, state: Path) -> None:
        self.wildcard_folder = state / WILDCARDS
        self._prompts, self._presets = state / "prompts.json", state / "presets"
        self._lock = threading.Lock()

    def prompts(self, search: str = "", limit: int = 20) -> list[str]:
        """Prompts that were used, the newest first; every word of `search` occurs."""
        words, found = search.casefold().split(), _read(self._prompts)
        kept = [text for text in found if isinstance(text, str)] if isinstance(found, list) else []
        return [text for text in kept if all(word in text.casefold() for word in words)][:limit]

    def remember(self, prompts: Iterable[str]) -> None:
        """Put prompts first; a disk that is full costs the history, never the job."""
        with self._lock, contextlib.suppress(OSError):
            kept = dict.fromkeys([*(text for text in prompts if text.strip()), *self.prompts(limit=MAX_PROMPTS)])
            _write(self._prompts, [*kept][:MAX_PROMPTS])

    def presets(self) -> dict[str, dict[str, JsonValue]]:
        """Name -> fields of the form, by name."""
        found: dict[str, dict[str, JsonValue]] = {}
        with contextlib.suppress(OSError):
            for path in sorted(self._presets.glob("*.json"))[:MAX_PRESETS]:
                kept = _read(path)
                fields = kept.get("fields") if isinstance(kept, dict) else None
                if isinstance(fields, dict):
                    found[path.stem] = fields
        return found

    def save(self, name: str, fields: Mapping[str, JsonValue]) -> None:
        """Keep fields under a name; an older preset of that name is replaced.

        Raises:
            RequestError: no name, or too many presets.
            OutputError: the disk refused.
        """
        name = name.strip().lstrip(".")
        if not NAME.fullmatch(name) or len(name.encode()) > 200:
            raise RequestError("not a name", code="preset_name", field="preset", got=name[:60], expected="1..60")
        known = self.presets()
        if len(known) >= MAX_PRESETS and name not in known:
            raise RequestError(
                "too many presets", code="preset_many", field="preset", got=len(known), expected=MAX_PRESETS
            )
        try:
            _write(self._presets / f"{name}.json", {"name": name, "fields": dict(fields)})
        except OSError as error:
            raise output_error(self._presets, error.strerror or str(error)) from None

    def delete(self, name: str) -> None:
        """Forget a preset."""
        if name in self.presets():
            with contextlib.suppress(OSError):
                (self._presets / f"{name}.json").unlink()

    def wildcards(self) -> dict[str, list[str]]:
        """Name -> choices of every list."""
        found = {}
        with contextlib.suppress(OSError):
            for path in sorted(self.wildcard_folder.glob("*.txt"))[:MAX_PRESETS]:
                with contextlib.suppress(OSError, UnknownEncodingError), open_file(path) as file:
                    lines = decode(file.read(MAX_BYTES))[0].removeprefix("\ufeff").splitlines()[:MAX_LINES]
                    found[path.stem] = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        return found


def _read(path: Path) -> JsonValue:
    with contextlib.suppress(OSError, ValueError, RecursionError), open_file(path) as file:
        found: JsonValue = json.loads(file.read(MAX_BYTES))
        return found
    return None


def _write(path: Path, value: Sequence[str] | Mapping[str, JsonValue]) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8", "replace")
