"""The API: named Gradio endpoints over the studio, for gradio_client, curl and agents.

    from gradio_client import Client
    client = Client("http://127.0.0.1:7860")
    job = client.predict({"prompt": "a red circle moves right on a black background", "seed": 1}, api_name="/submit")
    client.predict(job["job"], api_name="/status")

A named user sends `Authorization: Bearer TOKEN` and posts to /gradio_api/run/NAME alone; they see their own jobs.
With `--mcp` agents get the same seven calls as tools; nothing here restarts, deletes or reads a file of this machine.
Every answer is a JSON object; what a person would read as an error comes back as {"error": {code, field, what, ...}}.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from gradio.data_classes import PredictBody
from gradio.events import api
from gradio.routes import ORJSONResponse
from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.routing import Route

from turbodiff.spec.clips import clip_id
from turbodiff.spec.errors import RequestError, TurbodiffError
from turbodiff.spec.exports import Export, make_export
from turbodiff.spec.grids import axis_of, grid_requests
from turbodiff.spec.jobs import QueuedJob
from turbodiff.spec.request import Request
from webui import request_guard
from webui.api_types import TEXT, checked, fields_taken
from webui.panels.export import export_url
from webui.panels.stage import media_url
from webui.proxies import ASKING, USER
from webui.snapshot import ClipView, StudioReader, no_such_clip

NOT_FROM_OUTSIDE = ("image", "end_image", "loras", "noise_device")  # paths on this machine are chosen on this machine
RETRY = "retry_after_s"  # of an error: when to ask again
MAX_FIELDS = 48
JSON_KIND = re.compile(r"application/([^/]+\+)?json")  # none that another site can send unasked
OF_REQUEST, OF_EXPORT = fields_taken(Request), {"clip": TEXT, **fields_taken(Export)}
DEFAULT_JOBS, MAX_JOBS = 50, 200  # of one list
if TYPE_CHECKING:
    Json = dict[str, Any]
else:
    Json = dict  # Gradio reads the endpoints' annotations; what it shows in /gradio_api/info stays as it was


def endpoint(method: Callable[..., Json]) -> Callable[..., Json]:
    """An endpoint as Gradio sees it: what a person would read as an error is a value."""

    @request_guard.handler
    @wraps(method)
    def answered(self: "Endpoints", argument: object = 0) -> Json:
        try:
            return method(self, argument)
        except TurbodiffError as error:
            return {"error": error.fields()}

    return answered


class Endpoints:
    """The seven calls. Their names, arguments and first lines are what gradio_client and an agent see."""

    def __init__(self, reader: StudioReader) -> None:
        self.reader = reader
        calls = (self.estimate, self.submit, self.status, self.cancel, self.list_jobs, self.result, self.export)
        self.calls = {call.__name__.removesuffix("_jobs"): call for call in calls}

    @endpoint
    def estimate(self, fields: Json) -> Json:
        """The plan for a request: what will run, what each phase needs, why. Changes nothing."""
        return self.reader.estimate(self._checked_fields(fields)).model_dump(mode="json")

    @endpoint
    def submit(self, fields: Json) -> Json:
        """Queue a request; the same nonce gives the same job. {"batch": [...]} queues several, all or none; {"grid":
        {"rows": ["seed", [1, 2]], "columns": ["steps", [2, 4]]}} one for each pair of values."""
        asked, user, serving = _object(fields), USER.get(), self.reader.studio.serving
        ttl_s, batch, grid = asked.pop("ttl_s", None), asked.pop("batch", None), asked.pop("grid", None)
        if batch is not None and (asked or grid or not isinstance(batch, list)):
            raise RequestError(
                "a batch is a list of requests, with ttl_s alone beside it", code="bad_batch", field="batch",
                got=", ".join(asked)[:40] or type(batch).__name__, expected="a list of requests",
            )  # fmt: skip
        each = [asked] if batch is None else batch
        checked_all = [self._checked_fields(one) for one in each]
        if grid is not None:
            axes = _object(grid)
            checked_all = grid_requests(checked_all[0], axis_of(axes.get("rows")), axis_of(axes.get("columns")))
        many = [{"nonce": secrets.token_hex(16), **one} for one in checked_all]
        try:  # the tabs see it with their next look
            jobs = serving.submit(many, user, ttl_s, ASKING.get())
        except RequestError as error:
            if error.code != "queue_full" or not user:
                raise
            return {"error": {**error.fields(), RETRY: serving.retry_after_s(user, len(many))}}
        return {"job": jobs[0]} if batch is None and grid is None else {"jobs": jobs}

    @endpoint
    def status(self, number: float = 0) -> Json:
        """State and progress of a job."""
        job = self._job(number)
        told = {"progress": to_jsonable_python(job.progress), "error": to_jsonable_python(job.error)}
        begin = self.reader.studio.cards.begin_of(job)
        told["starts"] = {"in_s": begin.start_s, "card": begin.card} if begin else None
        told["expires_s"] = job.expires_s
        return {"job": job.id, "state": job.state, "attempt": job.attempt, **told}

    @endpoint
    def cancel(self, number: float = 0) -> Json:
        """Cancel a job."""
        return {"state": self.reader.studio.cancel(self._job(number).id)}

    @endpoint
    def list_jobs(self, number: float = 0) -> Json:
        """The newest jobs, at most `number` of them (0: fifty)."""
        limit = max(1, min(MAX_JOBS, _checked_number(number) or DEFAULT_JOBS))
        jobs = self.reader.studio.serving.jobs(limit, USER.get())
        told = []
        for job in jobs:  # without the folders of this machine: a picture by its name
            asked = job.request
            files = {
                "image": PurePath(asked.image).name or None,
                "continues": clip_id(PurePath(asked.continues).stem) or None,
            }
            request = {**asked.model_dump(mode="json"), **files}
            told.append({"job": job.id, "state": job.state, "request": request})
        return {"jobs": told}

    @endpoint
    def result(self, number: float = 0) -> Json:
        """What came of a job, with the address of its clip on this server."""
        job = self._job(number)
        made = job.result.model_dump(mode="json") if job.result else {}
        path = PurePath(str(made.pop("path", "")))
        made.pop("sidecar", None)
        url = media_url(clip_id(path.name.removesuffix(".mp4"))) if path.name else None
        return {"job": job.id, "state": job.state, "result": made, "url": url, "plan": to_jsonable_python(job.plan)}

    @endpoint
    def export(self, fields: Json) -> Json:
        """Another format of a clip, {"clip": name, "format": "gif", "fps": 60}; ask again until its state is done."""
        asked = checked(_object(fields), OF_EXPORT)
        clip = self._clip(asked.pop("clip", None) or "")
        name = self.reader.studio.exports.start(clip.path, make_export(asked))
        found = self.reader.studio.exports.of(name)
        done = found is not None and found.state == "done"
        return {**to_jsonable_python(found), "url": export_url(name) if done else None}

    def _job(self, number: object) -> QueuedJob:
        """A job that whoever asks may see. Raises RequestError: there is none."""
        return self.reader.studio.serving.job(_checked_number(number), USER.get())

    def _clip(self, name: str) -> ClipView:
        """A clip that whoever asks may see. Raises RequestError: there is none."""
        clip = self.reader.clip_called(name)
        if not self.reader.studio.serving.owns(USER.get(), clip.path):
            raise no_such_clip(name)
        return clip

    def _checked_fields(self, fields: object) -> dict[str, Any]:
        """The fields of a request from outside; a clip to continue is named as in /result's url.

        Raises:
            RequestError: not an object, a field of another type or one that names files of this machine, no such clip.
        """
        named = checked(_object(fields), OF_REQUEST)
        if named.get("grid") is not None:  # the place of one clip in a grid is the grid's to say
            raise RequestError(
                "a grid is asked for beside the fields of a submission", code="bad_grid", field="grid",
                got=str(named["grid"])[:40], expected='{"rows": ["seed", [1, 2]], "columns": ["steps", [2, 4]]}',
            )  # fmt: skip
        for name in NOT_FROM_OUTSIDE:
            if named.get(name):
                raise RequestError(
                    "not over the network", code="not_remote", field=name, try_instead="use the page for pictures"
                )
        if named.get("continues"):
            named["continues"] = str(self._clip(named["continues"]).path)
        return named


def add(reader: StudioReader) -> None:
    """Add /estimate, /submit, /status, /cancel, /list, /result and /export to the page that is being built."""
    for name, call in Endpoints(reader).calls.items():
        api(call, api_name=name, queue=False)


def add_routes(app: FastAPI, reader: StudioReader) -> None:
    """Answer the same calls where programs post them, before Gradio does: its way from the route to the endpoint takes
    most of the time of a call, and FastAPI's a third of the rest. What Gradio refuses there is refused here, too; its
    other addresses stay."""
    for name, call in Endpoints(reader).calls.items():
        app.router.routes.append(Route(f"{request_guard.GRADIO}run/{name}", partial(_posted, call), methods=["POST"]))


async def _posted(call: Callable[[object], Json], request: HttpRequest) -> Response:
    """The answer to a call as Gradio writes it; 429 where the queue of whoever asks is full."""
    body = await request.body()
    try:
        data = PredictBody.model_validate_json(body.decode(json.detect_encoding(body))).data
    except ValidationError as error:
        return ORJSONResponse(
            {"detail": error.errors(include_url=False, include_context=False, include_input=False)}, 422
        )
    except UnicodeDecodeError as error:
        raise HTTPException(422, f"not {error.encoding}") from None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not data or not JSON_KIND.fullmatch(kind) or request_guard.points_elsewhere(data):
        raise HTTPException(422, "not an input of this call")
    answer = await run_in_threadpool(call, data[0])
    wait_s = answer["error"].get(RETRY) if isinstance(answer.get("error"), dict) else None
    status, headers = (429, {"retry-after": str(wait_s)}) if wait_s else (200, None)
    return ORJSONResponse({"data": [answer], "is_generating": False}, status, headers)


def _object(fields: object) -> Json:
    """A JSON object.

    Raises:
        RequestError: anything else, or one of too many fields.
    """
    if not isinstance(fields, Mapping) or len(fields) > MAX_FIELDS:
        raise RequestError("a request is a JSON object", code="bad_fields", field="fields", got=type(fields).__name__)
    return dict(fields)


def _checked_number(value: object) -> int:
    """The number of a job or how many of them.

    Raises:
        RequestError: no number of ours.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53 or value != int(value):
        raise RequestError("no such job", code="job_unknown", field="job", got=str(value)[:40])
    return int(value)
