"""Tells failures of a request from failures of ours: Gradio answers 500 to whatever it cannot use.

Three rules in front of Gradio:
  - only those of its routes answer that this page or gradio_client needs; the others are 404
  - a failure before one of our handlers ran, or a `BadRequest` of a handler, is the request's own: 422
  - HEAD is GET without its body: most of Gradio's routes know GET only, and monitors and link previews ask by HEAD
"""

import contextlib
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from copy import copy
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.blocks import BlocksConfig
from gradio.components import Component
from gradio.data_classes import BlocksConfigDict
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turbodiff.spec.text import whole

GRADIO = "/gradio_api/"
READ = ("GET", "HEAD")
# the first word of a path below /gradio_api/: events, uploads and what gradio_client asks first
EVENTS = frozenset({"run", "api", "call", "queue", "cancel", "reset", "heartbeat", "mcp"})
NEEDED = EVENTS | {"upload", "upload_progress", "info", "openapi.json", "app_id", "startup-events"}
TABS = 1000  # whose state is kept, a few kB each; who is forgotten gets the page drawn anew
FILE = "file="  # Gradio's own copies of uploads, below the state folder

P = ParamSpec("P")
R = TypeVar("R")
# the handlers that ran for the current request, less one that raised `BadRequest`; None outside of a request
_HANDLERS_RUN: ContextVar[list[str] | None] = ContextVar("handlers_run", default=None)


class BadRequest(gr.Error):
    """A request that no page of ours sends; no traceback is worth printing."""

    def __init__(self, what: str) -> None:
        super().__init__(what, print_exception=False)


class SessionConfig(BlocksConfig):
    """What Gradio keeps of the page for one session, and for each call that names none, as curl's: without a
    description of every component, which took 20 ms a call and is for deep links alone (6.31, state_holder.py), which
    are not served here."""

    @staticmethod
    def config_for_block(*args: object, **kwargs: object) -> dict[str, Any]:
        """Nothing: no session's page is described again."""
        return {}


class PageConfig(BlocksConfig):
    """The page as it was built; its copies are the sessions'."""

    def __copy__(self) -> SessionConfig:
        copied = SessionConfig(self.root_block)
        vars(copied).update(vars(super().__copy__()))  # type: ignore[no-untyped-call]
        return copied


First = dict[str, dict[str, dict[str, Any]]]  # part of the page -> id of a component -> its properties


def since(built: Any, now: Any) -> Any:
    """What of an update is not as it was built: each value that comes is a change, which asks for a new meter."""
    if not isinstance(now, dict):
        return gr.skip() if now == built else now
    return {name: part for name, part in now.items() if name == "__type__" or name not in built or built[name] != part}


def properties(parts: Iterable[Component], told: Iterable[object]) -> dict[str, dict[str, Any]]:
    """What an answer makes of components: their properties, by their ids."""
    shown = {}
    for part, update in zip(parts, told, strict=True):
        props = update if isinstance(update, dict) else {"value": update}
        shown[str(part._id)] = {name: value for name, value in props.items() if name != "__type__"}
    return shown


class FirstShown:
    """What the page shows first, drawn for each page that is sent: then Gradio copies all that it knows of the page
    (6.31, routes.py, `get_page_config`)."""

    def __init__(self, draw: Callable[[], First]) -> None:
        self._draw = draw

    def __deepcopy__(self, memo: object) -> First:
        try:
            return self._draw()
        except Exception:  # noqa: BLE001  a locked store, a full disk: the answer to `load` tells it
            return {}


class GuardedBlocks(gr.Blocks):
    """Blocks that raise `BadRequest` for an input that its component cannot read, instead of printing a traceback."""

    def __init__(self, **kwargs: Any) -> None:
        self.first = FirstShown(dict)  # static/first.js takes it over
        super().__init__(**kwargs)
        self.default_config = PageConfig(self)
        self.state_session_capacity = TABS

    def get_config_file(self) -> BlocksConfigDict:
        """The page as browsers get it. No tab, seen or not, holds one of a browser's six connections to a host
        (HTTP/1.1) only to say that it is there: of too many sessions the least lately used one is forgotten."""
        config = super().get_config_file()
        config["connect_heartbeat"] = False
        for part in config["components"]:
            if part["type"] == "number":  # Gradio leaves an empty value out (6.31), which a browser takes for 0
                part["props"].setdefault("value", None)
            elif part["type"] == "api":  # the calls' own arguments: no browser has to build anything for them
                part["props"]["visible"] = False
        config["first"] = self.first  # type: ignore[typeddict-unknown-key]
        return config

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs as the handlers get them.

        Raises:
            BadRequest: a value that the component cannot hold, too few of them, a file that was not uploaded here.
        """
        if points_elsewhere([*args, *kwargs.values()]):
            raise BadRequest("not a file that was uploaded here")
        try:
            return await super().preprocess_data(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  whatever a component throws at a stranger's value
            raise BadRequest(f"not an input of this page: {type(error).__name__}") from None

    async def postprocess_data(self, block_fn: BlockFunction, predictions: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """The outputs as a browser gets them, what is skipped as it is: Gradio makes a component anew for each (6.31),
        22 a second for every tab in which nothing has changed, which is half of such a call."""
        outputs, skipped = block_fn.outputs, gr.skip()
        several = isinstance(predictions, list) and len(predictions) == len(outputs) > 1
        if not several or skipped not in predictions:
            return values_first(await super().postprocess_data(block_fn, predictions, *args, **kwargs))
        told: list[Any] = [None if output.stateful else skipped for output in outputs]
        left = [place for place, value in enumerate(predictions) if value != skipped]
        if left:
            part, values = copy(block_fn), [predictions[place] for place in left]
            part.outputs = [outputs[place] for place in left]
            made = await super().postprocess_data(part, values if len(left) > 1 else values[0], *args, **kwargs)
            for place, value in zip(left, made, strict=True):
                told[place] = value
        return values_first(told)


def values_first(told: list[object]) -> list[object]:
    """The same updates, the value of each before its other properties: Gradio's script (6.31, `handle_data`) sets the
    first property of every output in one step and awaits something before each further one, so a field whose value
    comes second is asked for while it still holds the old one."""
    return [{"value": one["value"], **one} if isinstance(one, dict) and "value" in one else one for one in told]


def points_elsewhere(value: object) -> bool:
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


def handler(method: Callable[P, R]) -> Callable[P, R]:
    """A handler of ours: what fails in it is our fault, unless it raises `BadRequest`."""

    @wraps(method)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
        handlers_run = _HANDLERS_RUN.get()
        if handlers_run is not None:
            handlers_run.append(method.__name__)
        try:
            return method(*args, **kwargs)
        except BadRequest:
            if handlers_run is not None:
                handlers_run.clear()
            raise

    return recorded


def button_of(event: gr.EventData) -> tuple[str, str]:
    """(name, argument) of the button that page.js passed on.

    Raises:
        BadRequest: not from page.js.
    """
    try:
        return whole(str(event.act)), whole(str(event.arg))
    except (AttributeError, TypeError):
        raise BadRequest("not a button of this page") from None


class RequestGuard:
    """ASGI middleware that applies the rules to Gradio's routes; ours pass as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        _, below, rest = scope["path"].partition(GRADIO) if scope["type"] == "http" else ("", "", "")
        # not where events are streamed: these would wait for what nobody reads
        heads = scope.get("method") == "HEAD" and (not below or rest.startswith(FILE))
        app = self._without_body if heads else self.app
        if not below:
            return await app(scope, receive, send)
        if rest.split("/")[0] not in NEEDED and not rest.startswith(FILE):
            return await PlainTextResponse("not served here", 404)(scope, receive, send)
        handlers_run: list[str] = []
        started = whole = False

        async def send_judged(message: Message) -> None:
            nonlocal started, whole
            if message["type"] == "http.response.start":
                started = True
                if message["status"] == 500 and not handlers_run:
                    message = {**message, "status": 422}
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body"))
            await send(message)

        token = _HANDLERS_RUN.set(handlers_run)
        try:
            await app(scope, receive, send_judged)
        except Exception:
            if handlers_run:
                raise
            if not started:
                await PlainTextResponse("this request makes no sense here", 422)(scope, receive, send)
            elif not whole:
                await send({"type": "http.response.body", "body": b""})
        finally:
            with contextlib.suppress(ValueError):  # a stream that was cut off ends in another context
                _HANDLERS_RUN.reset(token)

    async def _without_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer HEAD by the route's own answer to it, else by that to GET; the server leaves the body out."""
        refused = False

        async def send_unless_refused(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] == 405:
                refused = b"GET" in dict(message["headers"]).get(b"allow", b"").split(b", ")
            if not refused:
                await send(message)

        await self.app(scope, receive, send_unless_refused)
        if refused:
            await self.app({**scope, "method": "GET"}, receive, send)
