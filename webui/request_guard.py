"""Whose fault a failed request is: Gradio answers 500 to whatever it cannot use, also where the request makes no sense.

Two rules in front of it:
  - only those of Gradio's routes answer that this page or gradio_client needs; the others are 404
  - a failure before one of our handlers ran, or one that our handler calls nonsense, is the request's own: 422
"""

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import gradio as gr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GRADIO = "/gradio_api/"
# the first word of a path below /gradio_api/: events, uploads and what gradio_client asks first
EVENTS = frozenset({"run", "api", "call", "queue", "cancel", "reset", "heartbeat", "mcp"})
NEEDED = EVENTS | {"upload", "upload_progress", "info", "openapi.json", "app_id", "startup-events"}
FILE = "file="  # Gradio's own copies of uploads, below the state folder

_REACHED: ContextVar[list[bool] | None] = ContextVar("reached", default=None)


class BadRequest(gr.Error):
    """A request that no page of ours sends; no traceback is worth printing."""

    def __init__(self, what: str) -> None:
        super().__init__(what, print_exception=False)


class Page(gr.Blocks):
    """Blocks that call an input nonsense where its component cannot read it, instead of printing a traceback."""

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> Any:
        """What the handlers get.

        Raises:
            BadRequest: a value that the component cannot hold, too few of them, a file that was not uploaded here.
        """
        if points_elsewhere([*args, *kwargs.values()]):
            raise BadRequest("not a file that was uploaded here")
        try:
            return await super().preprocess_data(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever a component throws at a stranger's value
            raise BadRequest(f"not an input of this page: {type(error).__name__}") from None


def points_elsewhere(value: Any) -> bool:
    """Whether a file in these inputs has an address for a path: Gradio would fetch it (6.31, `FileData.path`)."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            path = found.get("path")
            if isinstance(path, str) and not path.startswith("/"):
                return True
            left += found.values()
        elif isinstance(found, list):
            left += found
    return False


def handler(method: Callable[..., Any]) -> Callable[..., Any]:
    """A handler of ours: what fails in it is our fault, unless it raises `BadRequest`."""

    @wraps(method)
    def reached(*args: Any) -> Any:
        ran = _REACHED.get()
        if ran is not None:
            ran.append(True)
        try:
            return method(*args)
        except BadRequest:
            if ran is not None:
                ran.clear()
            raise

    return reached


def said(event: gr.EventData) -> tuple[str, str]:
    """(act, argument) of a button that page.js handed over.

    Raises:
        BadRequest: not from page.js.
    """
    try:
        return str(event.act), str(event.arg)
    except (AttributeError, TypeError):
        raise BadRequest("not a button of this page") from None


class Narrow:
    """ASGI middleware that applies the two rules to Gradio's routes; ours pass as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        _, below, rest = scope["path"].partition(GRADIO) if scope["type"] == "http" else ("", "", "")
        if not below:
            await self.app(scope, receive, send)
        elif rest.split("/")[0] not in NEEDED and not rest.startswith(FILE):
            await _say(send, 404, "not served here")
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        ran: list[bool] = []
        started = whole = False

        async def judged(message: Message) -> None:
            nonlocal started, whole
            if message["type"] == "http.response.start":
                started = True
                if message["status"] == 500 and not ran:
                    message = {**message, "status": 422}
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body"))
            await send(message)

        token = _REACHED.set(ran)
        try:
            await self.app(scope, receive, judged)
        except Exception:
            if ran:
                raise
            if not started:
                await _say(send, 422, "this request makes no sense here")
            elif not whole:
                await send({"type": "http.response.body", "body": b""})
        finally:
            with contextlib.suppress(ValueError):  # a stream that was cut off ends in another context
                _REACHED.reset(token)


async def _say(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
