"""`turbodiff support-bundle`: one zip with what a bug report needs; no secrets and, unless asked, no prompts."""

import json
import platform
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from turbodiff.diagnostics.logs import RUN_LOG, STARTUP_LOG, redact
from turbodiff.gpu.probe import machine_now
from turbodiff.jobs.store import Store
from turbodiff.spec.errors import OutputError

LAST_BYTES = 2 << 20  # of each log
JOBS, WITH_EVENTS = 100, 10
PACKAGES = ("turbodiff", "torch", "triton", "diffusers", "transformers", "accelerate", "bitsandbytes", "gradio")
TEXT_FIELDS = ("prompt", "negative_prompt", "image")


def support_bundle(store: Store, logs: Path, path: Path, with_prompts: bool = False) -> Path:
    """Write the bundle and return its path.

    Args:
        logs: the folder of the two log files; earlier start-up logs come from the state folder.
        with_prompts: leave prompts and picture names in.

    Raises:
        OutputError: the file cannot be written.
    """
    hidden = [] if with_prompts else _prompts(store)
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, text in _parts(store, logs):
                for prompt in hidden:
                    text = text.replace(prompt, _hidden(prompt))
                bundle.writestr(name, redact(text))
    except OSError as error:
        raise OutputError(
            "cannot write the support bundle", code="output_unwritable", field="output", got=error
        ) from None
    return path


def _parts(store: Store, logs: Path) -> Iterator[tuple[str, str]]:
    for name in (STARTUP_LOG, RUN_LOG):
        yield name, _end_of(logs / name)
    for old in sorted((store.path.parent / "logs").glob("*.log"))[-3:]:
        yield f"earlier/{old.name}", _end_of(old)
    jobs = store.jobs(JOBS)
    yield "jobs.json", _json(jobs)
    failed = [job for job in jobs if job.state in ("failed", "parked")][:WITH_EVENTS]
    events = {job.id: [json.loads(event.line()) for _, event in store.events(job.id)] for job in failed}
    yield "events_of_failed_jobs.json", _json(events)
    facts = {row["name"]: json.loads(row["value"]) for row in store.rows("SELECT name, value FROM fact")}
    yield "facts.json", _json(facts)
    yield "machine.json", machine_now().model_dump_json(indent=1)
    yield "versions.txt", _versions()


def _json(value: Any) -> str:
    return json.dumps(to_jsonable_python(value, fallback=str), indent=1, ensure_ascii=False)


def _prompts(store: Store) -> list[str]:
    """Every private text of the known jobs, in the spellings of the logs and of JSON, the longest first."""
    found: set[str] = set()
    for job in store.jobs(1_000_000):
        for request in (job.request, job.planned_request):
            texts = [str(getattr(request, name)) for name in TEXT_FIELDS]
            found |= {
                spelling
                for text in texts
                for spelling in (text, repr(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
            }
    return sorted((text for text in found if len(text) > 2), key=len, reverse=True)


def _hidden(prompt: str) -> str:
    return f"<{len(prompt)} characters>"


def _end_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError as error:
        return f"not readable: {error.strerror}\n"


def _versions() -> str:
    lines = [f"python {sys.version}", f"platform {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines) + "\n"
