"""`turbodiff support-bundle`: one zip with what a bug report needs; no secrets and, unless asked, no prompts."""

import json
import platform
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from turbodiff.archive.clips import sidecars
from turbodiff.diagnostics.logs import RUN_LOG, STARTUP_LOG, redact
from turbodiff.diagnostics.privacy import OwnTexts
from turbodiff.gpu.probe import machine_now
from turbodiff.jobs.journal import entries
from turbodiff.jobs.rows import parsed
from turbodiff.jobs.store import Store
from turbodiff.spec.errors import OutputError
from turbodiff.spec.files import atomic_write, check_file, open_file

LAST_BYTES = 2 << 20  # of each log
JOBS, WITH_EVENTS = 100, 10
NEWEST = 2000  # jobs, rows and clips whose texts are looked for: the ends of logs know no older ones
PACKAGES = ("turbodiff", "torch", "triton", "diffusers", "transformers", "accelerate", "bitsandbytes", "gradio")


def support_bundle(store: Store, logs: Path, outputs: Path, path: Path, with_prompts: bool = False) -> Path:
    """Write the bundle and return its path.

    Args:
        logs: the folder of the two log files; earlier start-up logs come from the state folder.
        outputs: the library, whose clips know the prompts that a lost queue knew.
        with_prompts: leave prompts and picture names in.

    Raises:
        OutputError: the file cannot be written.
    """
    own = None if with_prompts else OwnTexts(_own_texts(store, outputs))
    try:
        check_file(path)
        path.parent.stat()  # a folder with a typing error is not made
        with atomic_write(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, found in _parts(store, logs):
                if isinstance(found, str):
                    text = "\n".join(map(own.without, found.split("\n"))) if own else found
                else:
                    text = _json(own.without_values(to_jsonable_python(found, fallback=str)) if own else found)
                bundle.writestr(name, redact(text))
    except OSError as error:
        got = f"{path}: {error.strerror or error}"
        raise OutputError(
            "cannot write the support bundle", code="output_unwritable", field="output", got=got
        ) from None
    return path


def _own_texts(store: Store, outputs: Path) -> Iterator[str]:
    """Prompts, notes and picture names of the queue, the journal, the seed archive and the library."""
    requests: list[Any] = [entry.request.model_dump() for _, entry, _ in entries(store.path.parent) if entry]
    for row in store.rows("SELECT request, plan FROM job ORDER BY id DESC LIMIT ?", NEWEST):
        plan = parsed(row["plan"])
        requests += [parsed(row["request"]), plan.get("request") if isinstance(plan, dict) else None]
    requests += [sidecar.request.model_dump() for _, sidecar in islice(sidecars(outputs), NEWEST)]
    for row in store.rows("SELECT prompt, note, rating FROM seed ORDER BY id DESC LIMIT ?", NEWEST):
        yield from map(str, row)
    for request in requests:
        if isinstance(request, dict):
            yield from (str(request.get(name) or "") for name in ("prompt", "negative_prompt"))
            yield from (Path(str(request.get(name) or "")).name for name in ("image", "end_image"))


def _parts(store: Store, logs: Path) -> Iterator[tuple[str, object]]:
    """Each file of the bundle: a text, or a value for JSON."""
    for name in (STARTUP_LOG, RUN_LOG):
        yield name, _end_of(logs / name)
    for old in sorted((store.path.parent / "logs").glob("*.log"))[-3:]:
        yield f"earlier/{old.name}", _end_of(old)
    jobs = store.jobs(JOBS)
    yield "jobs.json", jobs
    failed = [job for job in jobs if job.state in ("failed", "parked")][:WITH_EVENTS]
    yield (
        "events_of_failed_jobs.json",
        {str(job.id): [json.loads(event.line()) for _, event in store.events(job.id)] for job in failed},
    )
    yield "facts.json", {row["name"]: store.fact(row["name"]) for row in store.rows("SELECT name FROM fact")}
    yield "machine.json", machine_now().model_dump(mode="json")
    versions = [f"python {sys.version}", f"platform {platform.platform()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    yield "versions.txt", "\n".join(versions) + "\n"


def _json(value: object) -> str:
    return json.dumps(to_jsonable_python(value, fallback=str), indent=1, ensure_ascii=False)


def _end_of(path: Path) -> str:
    try:
        with open_file(path) as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError as error:
        return f"not readable: {error.strerror}\n"
