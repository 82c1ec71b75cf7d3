"""Sentences in English and Chinese, side by side: `key = ["English", "中文"]` per TOML file.

Contents: what the page and the command line both say (plans, errors, models), and the reader of such files.
Never here: the page's own words (webui/wording), markup, decisions. Used by: cli, webui.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from turbodiff.spec.downloads import Progress
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import ModelSpec, short_path
from turbodiff.spec.numbers import gb, gib
from turbodiff.spec.plan import JsonScalar
from turbodiff.spec.text import printable

if TYPE_CHECKING:
    from turbodiff.spec.events import Notice
    from turbodiff.spec.models import FoundFile, PassedOver
    from turbodiff.spec.plan import Fit, Reason

LANGUAGES = ("en", "zh")
COMMAND = re.compile(r"--[\w-]+([ =]\S+)?|(turbodiff|pip|systemctl|journalctl|export|unset) .+|scripts/\w+|\w+=\S+")
PROSE = re.compile(r"[A-Za-z]+ [a-z]{2,} [a-z]{2,}|\bat (least|most)\b|\bor \d+ to\b")  # English, which is no value
Sentences = Mapping[str, tuple[str, str]]


def read_sentences(folder: Path) -> dict[str, tuple[str, str]]:
    """Every sentence of a folder as "file.key" -> (English, Chinese)."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*.toml")):
        for key, pair in tomllib.loads(path.read_text("utf-8")).items():
            english, chinese = pair
            found[f"{path.stem}.{key}"] = (english, chinese)
    return found


@cache
def shared_catalogue() -> Sentences:
    """The sentences of this room."""
    return read_sentences(Path(__file__).parent)


def language_of(name: str) -> str:
    """The language that a tag such as "zh-CN" or "en_US" asks for, or a list of them as browsers write it
    ("de,zh;q=0.5,en;q=0.2", RFC 9110 12.5.4): of those that we speak the one with the highest q; else English."""
    best, chosen = 0.0, "en"
    for entry in name[:1000].split(","):
        tag, *parameters = (part.strip().lower() for part in entry.split(";"))
        primary = re.split(r"[-_.@]", tag)[0]  # "zh-Hans-CN" (RFC 5646), "zh_CN.UTF-8@pinyin" (POSIX); "zhx" is another
        spoken = primary if primary in LANGUAGES else "en" if tag == "*" else ""
        weights = [part[2:] for part in parameters if part.startswith("q=")]
        try:
            weight = float(weights[0]) if weights else 1.0
        except ValueError:
            continue
        if spoken and best < weight <= 1:
            best, chosen = weight, spoken
    return chosen


def shell_language() -> str:
    """The language that this process's environment asks for: LANGUAGE, a list, where the locale is not C; then the most
    specific variable of the locale (GNU gettext manual, Locale Environment Variables)."""
    locale = next(filter(None, (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    listed = os.environ.get("LANGUAGE", "").replace(":", ",") if locale not in ("C", "POSIX") else ""
    return language_of(listed or locale)


@dataclass(frozen=True)
class Words:
    """The sentences in one language; call it with a key and the numbers of the sentence."""

    lang: str

    @property
    def sentences(self) -> Sentences:
        """Where the keys are looked up."""
        return shared_catalogue()

    def __call__(self, key: str, **numbers: object) -> str:
        """The sentence of `key`; a missing key or number is a mistake in the program."""
        return self.sentences[key][LANGUAGES.index(self.lang)].format(**numbers)

    def or_else(self, key: str, fallback: str, **numbers: object) -> str:
        """The sentence of `key`, else `fallback`: for keys that come from another room or an older job."""
        if key not in self.sentences:
            return fallback
        try:
            return self(key, **numbers)
        except (KeyError, IndexError, ValueError):  # written by another version, with other numbers
            return fallback

    def reason(self, key: str, numbers: Mapping[str, JsonScalar]) -> str:
        """Why a plan looks as it does, from its key and numbers; bytes and seconds are worded by their names."""
        spoken = dict(numbers)
        for name, value in numbers.items():
            if isinstance(value, str):
                known = self.or_else(f"value.{name}_{value}", self.kind(value))
                spoken[name] = self.or_else(f"phase.{value}", known)
            elif value is None or isinstance(value, bool):
                continue
            elif name == "bytes" or name.endswith("_bytes"):
                spoken[name] = self.gib(value)
            elif name.endswith("_s") or re.match(r"seconds(_|$)", name):
                spoken[name] = self.seconds(value)
            elif isinstance(value, float):
                spoken[name] = float(f"{value:.4g}")  # no unit: a factor, a share, a boundary
        return self.or_else(f"reason.{key}", key, **spoken)

    def error(self, fields: Mapping[str, object]) -> str:
        """What went wrong, from the fields of an error event (turbodiff/spec/errors.py)."""
        code, what = str(fields.get("code")), str(fields.get("what", ""))
        got = self.kind(str(fields.get("got", "")))
        if code == f"bad_{fields.get('field')}":  # a field of a request without a sentence of its own
            unknown = self("error.bad_value", field=fields.get("field"), got=got)
        else:
            unknown = what if self.lang == "en" and what else self("error.other", code=code)
        return self.or_else(f"error.{code}", unknown, **{"expected": "", "field": "", **fields, "got": got})

    def kind(self, got: str) -> str:
        """What was got in place of what was expected: a kind of file in this language, anything else as it is."""
        return self.or_else(f"kind.{got}", got)

    def error_line(self, error: TurbodiffError, key: str = "") -> str:
        """An error as a shell says it in one line: in English its own words; else the page's sentence with those of its
        values that it leaves out, and of what it says to try the commands, which are of no language. `key`: of the
        sentence around it."""
        if key:
            return self(key, said=self.error_line(error))
        if self.lang == "en":
            return printable(str(error))
        fields = error.fields()
        fields["got"] = self.kind(fields["got"])
        said = self.error(fields)
        parts = [said if not error.field or error.field in said else f"{error.field}：{said}"]
        told = [name for name in ("got", "expected") if fields[name] not in said and not PROSE.search(fields[name])]
        parts += [self(f"error.{name}", **fields) for name in told]
        commands = [part for part in re.split(r",? or |, | and |; ", error.try_instead) if COMMAND.fullmatch(part)]
        parts += [self("error.try", commands=self("unit.or").join(commands))] if commands else []
        return printable(" ".join(parts))

    def say(self, reason: "Reason") -> str:
        """A reason of a plan."""
        return self.reason(reason.key, reason.numbers)

    def takes(self, files: "Sequence[FoundFile]", fit: "Fit") -> str:
        """Which networks on this disk a clip is made with, and how it would run."""
        return self("fit.takes", files=", ".join(short_path(file.path) for file in files), fit=self.fit(fit))

    def model(self, spec: ModelSpec) -> str:
        """What a model is for."""
        return self.or_else(f"model.{spec.name.replace('.', '_').replace('-', '_')}", spec.about)

    def passed_over(self, file: "PassedOver") -> str:
        """Why no model uses a file, with its path."""
        why = self.error({"field": file.path, **file.model_dump(include={"code", "what", "got", "expected"})})
        return why if file.path in why else f"{file.path}: {why}"

    def notice(self, said: "Notice") -> str:
        """What changed beside a running job, in words; in English the worker's own where there are none."""
        spoken: dict[str, object] = {}
        for name, value in said.numbers.items():
            if isinstance(value, str):
                spoken[name] = self.or_else(f"notice.cause_{value}", self.or_else(f"phase.{value}", value))
            elif value is None:
                spoken[name] = "?"
            elif name.endswith("_bytes"):
                spoken[name] = self.gib(value)
            else:
                spoken[name] = self.seconds(value) if name.endswith("_s") else value
        own = said.text if self.lang == "en" else ""
        return self.or_else(f"notice.{said.key}", own or self("notice.other"), **spoken)

    def fates(self, jobs: Mapping[int, str]) -> list[str]:
        """Where the jobs are that ran when the worker was replaced or the app was stopped."""
        return [self(f"fate.{state}", job=job) for job, state in jobs.items()]

    def fit(self, fit: "Fit") -> str:
        """How a model's clip would run with some files, before they are downloaded."""
        if fit.mark == "no":
            return self("fit.no", need=self.gib(fit.need_bytes), short=self.gib(fit.need_bytes - fit.have_bytes))
        lowered = [self.or_else(f"fit.{change.field}", "", to=change.to_value) for change in fit.changes]
        told = {"time": self.predicted(fit.seconds), "frames": fit.frames, "size": fit.size}
        return self(f"fit.{fit.mark}", **told, changes=", ".join(filter(None, lowered)))

    def download(self, progress: Progress) -> str:
        """How far a download is: bytes, speed, time that is left, which file."""
        done, total, speed = gb(progress.done_bytes), gb(progress.total_bytes), progress.bytes_per_s
        if not progress.total_bytes:
            return self("download.asking", host=progress.host or "?")
        if progress.checking:
            return self("download.checking", done=done, total=total, file=progress.file)
        if progress.left_s is None:
            return self("download.waiting", done=done, total=total, host=progress.host)
        left, file = self.seconds(progress.left_s), f"{progress.file} ({progress.files_done + 1}/{progress.files})"
        return self("download.line", done=done, total=total, speed=f"{speed / 1e6:.1f} MB", left=left, file=file)

    def download_notice(self, progress: Progress) -> str:
        """What a person should know of a download that goes on: another server, a file from its start; or ""."""
        why = self.or_else(f"download.why_{progress.left_code.removeprefix('download_')}", progress.left_code)
        left = {"host": progress.left_host, "why": why, "other": progress.host}
        parts = [self("download.other_server", **left)] if progress.left_host else []
        parts += [self("download.starts_over")] if progress.starts_over else []
        return " ".join(parts)

    def gib(self, n_bytes: float) -> str:
        """Bytes as "11.2 GiB", small ones as MiB."""
        return gib(n_bytes)

    def predicted(self, value_s: float) -> str:
        """A duration that is not known yet, never below a second: nobody can promise less."""
        return self.seconds(max(1.0, value_s))

    def seconds(self, value_s: float) -> str:
        """A duration: "0.4 s", "41 s", "3 min 20 s" and the same in Chinese."""
        if value_s < 120:
            short = f"{value_s:.0f}" if value_s >= 10 else f"{value_s:.1f}"
            return self("unit.s", n="< 0.1" if 0 != value_s < 0.05 else short)
        if value_s < 7200 and value_s % 60 < 1:
            return self("unit.min", m=int(value_s // 60))
        if value_s < 7200:
            return self("unit.min_s", m=int(value_s // 60), s=int(value_s % 60))
        return self("unit.h_min", h=int(value_s // 3600), m=int(value_s % 3600 // 60))
