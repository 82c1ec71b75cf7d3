"""What a person keeps of the form: prompts that were used, named presets of all fields, lists of wildcards.

<state>/prompts.json           prompts, the newest first, each once
<state>/presets/NAME.json      {"name": ..., "fields": {...}}
<state>/wildcards/NAME.txt     one choice a line; # begins a comment
"""

import contextlib
import itertools
import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from pydantic import JsonValue

from turbodiff.spec.encodings import UnknownEncodingError, decode
from turbodiff.spec.errors import RequestError
from turbodiff.spec.files import atomic_write, open_file, output_error
from turbodiff.spec.text import whole

MAX_PROMPTS, MAX_PRESETS, MAX_LINES = 1000, 200, 10_000
MAX_BYTES = 4 << 20  # of the prompts
MAX_LIST_BYTES = MAX_PRESET_BYTES = 1 << 20  # of one of these files
NAME = re.compile(r"[^\x00-\x1f/\\\ud800-\udfff]{1,60}")
LIST_NAME = re.compile(r"[\w-]{1,60}")  # what a prompt can name, see prompt/wildcards.py
WILDCARDS, PRESETS = "wildcards", "presets"


class Recipes:
    """Prompts, presets and wildcards below a state folder; damaged files are passed over."""

    def __init__(self, state: Path) -> None:
        self.wildcard_folder = state / WILDCARDS
        self._prompts, self._presets = state / "prompts.json", state / PRESETS
        self._lock = threading.Lock()

    def prompts(self, search: str = "", limit: int = 20) -> list[str]:
        """Prompts that were used, the newest first; every word of `search` occurs."""
        words, found = search.casefold().split(), _read(self._prompts)
        kept = [whole(text) for text in found if isinstance(text, str)] if isinstance(found, list) else []
        return [text for text in kept if all(word in text.casefold() for word in words)][:limit]

    def remember(self, prompts: Iterable[str]) -> None:
        """Put prompts first; a disk that is full costs the history, never the job."""
        with self._lock, contextlib.suppress(OSError):
            kept = dict.fromkeys([*(text for text in prompts if text.strip()), *self.prompts(limit=MAX_PROMPTS)])
            _write(self._prompts, _within(MAX_BYTES, [*kept][:MAX_PROMPTS]))

    def presets(self) -> dict[str, dict[str, JsonValue]]:
        """Name -> fields of the form, by name."""
        found: dict[str, dict[str, JsonValue]] = {}
        with contextlib.suppress(OSError):
            for path in [path for path in sorted(self._presets.glob("*.json")) if NAME.fullmatch(path.stem)]:
                kept = _read(path) if len(found) < MAX_PRESETS else None
                fields = kept.get("fields") if isinstance(kept, dict) else None
                if isinstance(fields, dict):
                    found[path.stem] = {name: value for name, value in fields.items() if _is_of_form(value)}
        return found

    def save(self, many: Mapping[str, Mapping[str, JsonValue]]) -> None:
        """Keep fields under their names, all or none; an older preset of a name is replaced.

        Raises:
            RequestError: not a name, too many presets, or one of more than a megabyte.
            OutputError: the disk refused.
        """
        named = {name.strip().lstrip("."): fields for name, fields in many.items()}
        for name, fields in named.items():
            if not NAME.fullmatch(name) or len(name.encode()) > 200:
                raise RequestError("not a name", code="preset_name", field="preset", got=name[:60], expected="1..60")
            if len(_text({"name": name, "fields": dict(fields)}).encode("utf-8", "replace")) > MAX_PRESET_BYTES:
                raise RequestError("too long", code="preset_file", field="preset", got=name)
        if len(known := {*self.presets(), *named}) > MAX_PRESETS:
            raise RequestError(
                "too many presets", code="preset_many", field="preset", got=len(known), expected=MAX_PRESETS
            )
        try:
            for name, fields in named.items():
                _write(self._presets / f"{name}.json", {"name": name, "fields": dict(fields)})
        except OSError as error:
            raise output_error(self._presets, error.strerror or str(error)) from None

    def delete(self, name: str) -> None:
        """Forget a preset."""
        if name in self.presets():
            with contextlib.suppress(OSError):
                (self._presets / f"{name}.json").unlink()

    def wildcards(self) -> "Wildcards":
        """Name -> choices of every list; a list is read when it is asked for."""
        return Wildcards(self.wildcard_folder)


class Wildcards(Mapping[str, Sequence[str]]):
    """The lists of a folder; one that cannot be read has no choices."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __iter__(self) -> Iterator[str]:
        """The names of the lists, of at most `MAX_PRESETS`."""
        with contextlib.suppress(OSError):
            names = sorted(path.stem for path in self._folder.glob("*.txt"))
            yield from [name for name in names if LIST_NAME.fullmatch(name)][:MAX_PRESETS]

    def __len__(self) -> int:
        """How many lists there are."""
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Sequence[str]:
        """The choices of a list. Raises KeyError: there is none of that name."""
        path = self._folder / f"{name}.txt"
        with contextlib.suppress(OSError):
            if LIST_NAME.fullmatch(name):
                return _lines(path, _state(path))
        raise KeyError(name)


def _is_of_form(value: JsonValue) -> bool:
    """Whether a field of the form can hold a value: text, a number, or a list of texts; JSON knows no NaN."""
    if isinstance(value, list):
        return all(isinstance(part, str) for part in value)
    return not isinstance(value, dict) and value not in (math.inf, -math.inf) and value == value


def _within(limit_bytes: int, prompts: Sequence[str]) -> list[str]:
    """As many prompts, from the first on, as a file of that size holds."""
    sizes = itertools.accumulate(len(_text([prompt]).encode("utf-8", "replace")) for prompt in prompts)
    return [prompt for prompt, size in zip(prompts, sizes, strict=True) if size <= limit_bytes]


def _state(path: Path) -> tuple[int, int, int]:
    """What changes with a file. Raises OSError: there is none."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=64)
def _lines(path: Path, _state: tuple[int, int, int]) -> Sequence[str]:
    with contextlib.suppress(OSError, UnknownEncodingError), open_file(path) as file:
        lines = decode(file.read(MAX_LIST_BYTES))[0].removeprefix("\ufeff").splitlines()[:MAX_LINES]
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return ()


def _read(path: Path) -> JsonValue:
    with contextlib.suppress(OSError):
        return _read_once(path, _state(path))
    return None


@lru_cache(maxsize=2 * MAX_PRESETS)  # the page asks every second
def _read_once(path: Path, state: tuple[int, int, int]) -> JsonValue:
    limit_bytes = MAX_PRESET_BYTES if path.parent.name == PRESETS else MAX_BYTES
    with contextlib.suppress(OSError, ValueError, RecursionError), open_file(path) as file:
        if state[1] <= limit_bytes:
            found: JsonValue = json.loads(file.read(limit_bytes))
            return found
    return None


def _text(value: Sequence[str] | Mapping[str, JsonValue]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)


def _write(path: Path, value: Sequence[str] | Mapping[str, JsonValue]) -> None:
    with atomic_write(path) as part:
        part.write_text(_text(value), "utf-8", "replace")
