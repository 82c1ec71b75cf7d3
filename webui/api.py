"""The API: named Gradio endpoints over the studio, for gradio_client, curl and agents.

    from gradio_client import Client
    client = Client("http://127.0.0.1:7860")
    job = client.predict({"prompt": "a red circle moves right on a black background", "seed": 1}, api_name="/submit")
    client.predict(job["job"], api_name="/status")

With `--mcp` agents get the same six calls as tools; nothing here restarts, deletes or reads a file of this machine.
Every answer is a JSON object; what a person would read as an error comes back as {"error": {code, field, what, ...}}.
"""

import secrets
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import gradio as gr

from turbodiff.spec.errors import RequestError, TurbodiffError
from webui import request_guard
from webui.snapshot import StudioReader
from webui.view.clips import media_url

NOT_FROM_OUTSIDE = ("image", "loras", "noise_device")  # paths on this machine are chosen on this machine
MAX_FIELDS = 40


def add(reader: StudioReader) -> None:
    """Add /estimate, /submit, /status, /cancel, /list and /result to the page that is being built."""
    for handler in (estimate, submit, status, cancel, list_jobs, result):
        name = "list" if handler is list_jobs else handler.__name__
        gr.api(_bound(handler, reader), api_name=name, queue=False)


def _bound(handler: Callable[..., dict[str, Any]], reader: StudioReader) -> Callable[..., dict[str, Any]]:
    """The handler as Gradio sees it: one argument, errors as values."""
    takes_fields = handler in (estimate, submit)

    @request_guard.handler
    def with_fields(fields: dict) -> dict:  # type: ignore[type-arg]  # Gradio reads these annotations
        return _answer(handler, reader, fields)

    @request_guard.handler
    def with_number(number: float = 0) -> dict:  # type: ignore[type-arg]
        return _answer(handler, reader, number)

    bound = with_fields if takes_fields else with_number
    bound.__name__, bound.__doc__ = handler.__name__, handler.__doc__  # what an agent sees with --mcp
    return bound


def _answer(handler: Callable[..., dict[str, Any]], reader: StudioReader, argument: Any) -> dict[str, Any]:
    try:
        return handler(reader, argument)
    except TurbodiffError as error:
        return {"error": error.fields()}


def estimate(reader: StudioReader, fields: Any) -> dict[str, Any]:
    """The plan for a request: what will run, what each phase needs, why. Changes nothing."""
    return reader.estimate(_fields(fields)).model_dump(mode="json")


def submit(reader: StudioReader, fields: Any) -> dict[str, Any]:
    """Queue a request; the same nonce gives the same job."""
    asked = _fields(fields)
    job = reader.studio.submit({"nonce": secrets.token_hex(16), **asked})
    reader.changed()
    return {"job": job}


def status(reader: StudioReader, number: Any) -> dict[str, Any]:
    """State and progress of a job."""
    job = reader.studio.job(_number(number))
    return {"job": job.id, "state": job.state, "attempt": job.attempt, "progress": job.progress, "error": job.error}


def cancel(reader: StudioReader, number: Any) -> dict[str, Any]:
    """Cancel a job."""
    state = reader.studio.cancel(_number(number))
    reader.changed()
    return {"state": state}


def list_jobs(reader: StudioReader, number: Any) -> dict[str, Any]:
    """The newest jobs, at most `number` of them (0: fifty)."""
    found = reader.studio.jobs(max(1, min(200, _number(number) or 50)))
    return {"jobs": [{"job": job.id, "state": job.state, "request": _shown(job.request)} for job in found]}


def _shown(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request without the folders of this machine: a picture by its name."""
    return {**request, "image": PurePath(str(request["image"])).name if request.get("image") else None}


def result(reader: StudioReader, number: Any) -> dict[str, Any]:
    """What came of a job, with the address of its clip on this server."""
    job = reader.studio.job(_number(number))
    made = dict(job.result or {})
    path = str(made.pop("path", ""))
    made.pop("sidecar", None)
    url = media_url(path.rsplit("/", 1)[-1].removesuffix(".mp4")) if path else None
    return {"job": job.id, "state": job.state, "result": made, "url": url, "plan": job.plan}


def _fields(fields: Any) -> dict[str, Any]:
    """The fields of a request from outside.

    Raises:
        RequestError: not an object, or a field that names files of this machine.
    """
    if not isinstance(fields, Mapping) or len(fields) > MAX_FIELDS:
        raise RequestError("a request is a JSON object", code="bad_fields", field="fields", got=type(fields).__name__)
    for name in NOT_FROM_OUTSIDE:
        if fields.get(name):
            raise RequestError(
                "not over the network", code="not_remote", field=name, try_instead="use the page for pictures"
            )
    return {str(name): value for name, value in fields.items()}


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**53 or value != int(value):
        raise RequestError("no such job", code="job_unknown", field="job", got=str(value)[:40])
    return int(value)
