"""`turbodiff support-bundle`: one zip with what a bug report needs; no secrets and, unless asked, no prompts."""

import json
import platform
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from pydantic_core import to_jsonable_python

from turbodiff.diagnostics.logs import RUN_LOG, STARTUP_LOG, redact
from turbodiff.gpu.probe import machine_now
from turbodiff.jobs.store import Store
from turbodiff.spec.errors import OutputError
from turbodiff.spec.files import atomic_write, check_file, open_file

LAST_BYTES = 2 << 20  # of each log
JOBS, WITH_EVENTS = 100, 10
PACKAGES = ("turbodiff", "torch", "triton", "diffusers", "transformers", "accelerate", "bitsandbytes", "gradio")


def support_bundle(store: Store, logs: Path, path: Path, with_prompts: bool = False) -> Path:
    """Write the bundle and return its path.

    Args:
        logs: the folder of the two log files; earlier start-up logs come from the state folder.
        with_prompts: leave prompts and picture names in.

    Raises:
        OutputError: the file cannot be written.
    """
    private: set[str] = set()  # every prompt and picture name of the known jobs, as logs and JSON spell them
    for job in () if with_prompts else store.jobs(1_000_000):
        for request in (job.request, job.planned_request):
            for text in (request.prompt, request.negative_prompt, request.image):
                private |= {text, repr(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    hidden = sorted((text for text in private if len(text) > 2), key=len, reverse=True)
    try:
        check_file(path)
        path.parent.stat()  # a folder with a typing error is not made
        with atomic_write(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, text in _parts(store, logs):
                for prompt in hidden:
                    text = text.replace(prompt, f"<{len(prompt)} characters>")
                bundle.writestr(name, redact(text))
    except OSError as error:
        got = f"{path}: {error.strerror or error}"
        raise OutputError(
            "cannot write the support bundle", code="output_unwritable", field="output", got=got
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
    facts = {row["name"]: store.fact(row["name"]) for row in store.rows("SELECT name FROM fact")}
    yield "facts.json", _json(facts)
    yield "machine.json", machine_now().model_dump_json(indent=1)
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
