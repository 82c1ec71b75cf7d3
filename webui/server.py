"""The web process: one FastAPI app with the page in both languages, clips, downloads and health.

    python -m webui.server --state-dir ~/.local/state/turbodiff --outputs outputs --port 7860

Gradio serves no file of ours (`allowed_paths=[]`): clips are looked up by id in the library.
"""

import argparse
import gc
import json
import logging
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Sequence

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from turbodiff.prompt.enhancer import Enhancer
from turbodiff.spec import stdio
from turbodiff.spec.environment import ENHANCER_KEY, PASSWORD
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.files import make_folder
from turbodiff.spec.page_flags import page_parser
from turbodiff.spec.wording import shell_language
from turbodiff.studio import Studio
from webui import api, events, page
from webui.app import check, read_password
from webui.changes import Changes
from webui.connections import limited
from webui.listening import listening_sockets, reachable_at, url_of
from webui.markup import ROOT_PATH, link
from webui.panels import jobs
from webui.proxies import USER, ProxyMiddleware, RootPathMiddleware
from webui.request_guard import READ, RequestGuard
from webui.security import SecurityMiddleware
from webui.sessions import FILE as SESSIONS
from webui.sessions import Sessions
from webui.snapshot import StudioReader
from webui.uploads import UploadQuota, make_room, sweep_until
from webui.wording import Words, language_of

LANGUAGE_COOKIE = "turbodiff_lang"
ENDED = ("done", "failed", "parked", "cancelled")
UPLOAD_LIMIT = "25mb"
MINUTE_S = 60.0
QUEUE_SLEEP_S = 0.05  # Gradio looks for events every millisecond, for progress every ten (queueing.py, 6.31)
MAX_SENTENCES = 1000
PACKET_BYTES = 1400  # what is smaller travels in one packet of Ethernet anyhow
GZIP_LEVEL = 4  # the page in 33 kB and 2 ms; the highest takes 8 ms and saves 2 kB
PATHS = {"zh": "/zh", "en": ""}  # "" takes every path: it is mounted last


def make_app(studio: Studio, args: argparse.Namespace) -> FastAPI:
    """The whole site over one studio."""
    reader = StudioReader(studio)
    uploads = studio.state / "uploads"
    make_folder(uploads, 0o700, ours=True, link=False)  # what it holds may be shown, and is swept
    make_room(uploads)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_routes(app, reader)
    _add_downloads(app, reader)
    if args.metrics:
        _add_metrics(app, reader)
    api.add_routes(app, reader)
    script = "".join((page.STATIC / name).read_text("utf-8") for name in page.SCRIPTS)
    for lang, path in PATHS.items():
        blocks = events.build(reader, Words(lang))
        gr.mount_gradio_app(
            app,
            blocks,
            path=path or "/",
            server_name=args.listen,
            server_port=args.port,
            allowed_paths=[],
            blocked_paths=[str(studio.database)],
            show_error=False,
            max_file_size=UPLOAD_LIMIT,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            run_history=False,
            mcp_server=bool(args.mcp and not path),  # the API's six calls as tools; a restart is not among them
            theme=page.theme(),
            css=(page.STATIC / "page.css").read_text("utf-8"),
            head='<meta name="color-scheme" content="light dark">'
            f'<meta name="turbodiff-root" content="{args.root_path}"><script>{script}</script>',
        )
        # else Gradio takes any path of this machine for an upload (processing_utils.py, 6.31)
        blocks.has_launched = True
        blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = QUEUE_SLEEP_S
    # Gradio packs its own files, not the page (215 kB) or what its events answer; clips and pictures pass as they are
    app.add_middleware(GZipMiddleware, minimum_size=PACKET_BYTES, compresslevel=GZIP_LEVEL)
    app.add_middleware(RootPathMiddleware, root_path=args.root_path)
    app.add_middleware(UploadQuota, folder=uploads)
    app.add_middleware(RequestGuard)
    app.add_middleware(LanguageRedirect, forced=args.lang)
    sessions = Sessions(args.password, studio.state / SESSIONS)
    app.add_middleware(
        SecurityMiddleware,
        listen=args.listen,
        host_names=args.host_name,
        password=args.password,
        port=args.port,
        root_path=args.root_path,
        sessions=sessions,
        user_of=studio.serving.user_of,
    )
    app.add_middleware(ProxyMiddleware, proxies=args.proxy, root_path=args.root_path)
    return app


def _add_routes(app: FastAPI, reader: StudioReader) -> None:
    @app.api_route("/healthz", methods=list(READ))
    async def healthz() -> JSONResponse:  # in no thread: all of those may wait for the store
        return JSONResponse({"ok": True})

    @app.api_route("/media/{clip}", methods=list(READ))
    def media(clip: str) -> FileResponse:
        found = reader.clip(clip)
        if found is None or not found.path.is_file() or not reader.studio.serving.owns(USER.get(), found.path):
            raise HTTPException(404, "no such clip")
        return FileResponse(
            found.path, media_type="video/mp4", filename=found.path.name, content_disposition_type="inline"
        )

    @app.api_route("/media/{clip}/poster", methods=list(READ))
    def poster(clip: str) -> FileResponse:
        found = reader.clip(clip)
        shown = found is not None and reader.studio.serving.owns(USER.get(), found.path)
        if found is None or not shown or found.poster is None or not found.poster.is_file():
            raise HTTPException(404, "no poster")
        return FileResponse(found.poster, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    @app.api_route("/progress.json", methods=list(READ))
    def progress() -> JSONResponse:
        """How far the queue is, for a tab that nobody looks at: percent of the job that runs, and how jobs ended."""
        now = reader.snapshot()
        job = now.active
        events = [event for _, event in reader.studio.events(job.id)] if job else []
        percent = round(100 * jobs.progress(job, events, Words("en")).share) if job else 0
        ended = {one.id: one.state for one in now.jobs if one.state in ENDED}
        told = {"active": job.id if job else None, "percent": percent, "waiting": now.queued, "ended": ended}
        return JSONResponse(told, headers={"cache-control": "no-store"})

    changes = Changes(reader)

    @app.api_route("/changes", methods=list(READ))
    async def changed(request: Request) -> Response:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        if request.method == "HEAD":  # it would wait for what nobody reads
            return Response(media_type="text/event-stream", headers=headers)
        return StreamingResponse(changes.stream(), media_type="text/event-stream", headers=headers)

    @app.api_route("/favicon.ico", methods=list(READ))
    def favicon() -> FileResponse:
        return FileResponse(page.STATIC / "favicon.svg", media_type="image/svg+xml")

    @app.api_route("/en", methods=list(READ))
    @app.api_route("/en/", methods=list(READ))
    def english() -> RedirectResponse:
        answer = RedirectResponse(link("/"))
        answer.set_cookie(LANGUAGE_COOKIE, "en", samesite="lax")
        return answer


def _add_metrics(app: FastAPI, reader: StudioReader) -> None:
    @app.api_route("/metrics", methods=list(READ))
    def metrics() -> Response:
        return Response(reader.studio.serving.metrics(), media_type="text/plain; version=0.0.4")


class OnceAMinute(logging.Filter):
    """Passes each sentence of a logger once a minute: what a stranger's connection makes it say, a thousand connections
    must not make a log of."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, tuple[float, int]] = {}  # when, and how often not since

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this record is written; the first of a new minute says how many were not."""
        said_s, unsaid = self._said.get(str(record.msg), (-math.inf, 0))
        if record.created - said_s < MINUTE_S:
            self._said[str(record.msg)] = said_s, unsaid + 1
            return False
        if len(self._said) >= MAX_SENTENCES:
            self._said.clear()
        self._said[str(record.msg)] = record.created, 0
        if unsaid:
            record.msg = f"{record.msg} ({unsaid} more of these in the last minute)"
        return True


def _add_downloads(app: FastAPI, reader: StudioReader) -> None:
    bundling = threading.Lock()  # one reads all logs: more at once would only be slower

    @app.api_route("/exports/{name}", methods=list(READ))
    def exported(name: str) -> FileResponse:
        found, path = reader.studio.exports.of(name), reader.studio.exports.file(name)
        made_of = re.fullmatch(r"(.+)\.[0-9a-f]{8}\..+", name)  # diagnostics/exports.py
        clip = reader.clip(made_of[1]) if USER.get() and made_of else None
        shown = not USER.get() or (clip is not None and reader.studio.serving.owns(USER.get(), clip.path))
        if found is None or path is None or not shown:
            raise HTTPException(404, "no such export")
        return FileResponse(path, media_type=found.media_type, filename=name)

    @app.api_route("/presets.json", methods=list(READ))
    def presets() -> Response:
        text = json.dumps(reader.studio.recipes.presets())  # in ASCII: half a surrogate pair is no UTF-8
        return Response(text, media_type="application/json")

    @app.api_route("/seeds.md", methods=list(READ))
    def seeds() -> Response:
        return Response(reader.studio.seeds_text(), media_type="text/markdown; charset=utf-8")

    @app.api_route("/support.zip", methods=list(READ))
    def support() -> Response:
        place = reader.studio.state / f"support-{secrets.token_hex(8)}.zip"  # two may ask at once
        try:
            with bundling:
                data = reader.studio.support_bundle(place).read_bytes()
        finally:
            place.unlink(missing_ok=True)
        name = {"content-disposition": 'attachment; filename="turbodiff-support.zip"'}
        return Response(data, media_type="application/zip", headers=name)


class LanguageRedirect:
    """ASGI middleware that sends a browser from "/" to the page in its language, and anybody from "/zh" to "/zh/"; a
    program always gets "/".

    Args:
        forced: "en" or "zh" for every browser without a choice of its own, "auto" for what each asks for.
    """

    def __init__(self, app: ASGIApp, forced: str = "auto") -> None:
        self.app, self.forced = app, forced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        answer = self.app
        if (
            scope["type"] == "http"
            and scope["path"] in ("/", *filter(None, PATHS.values()))
            and scope["method"] in READ
        ):
            request = Request(scope)
            asked = request.headers.get("accept-language", "") if self.forced == "auto" else self.forced
            query = scope["query_string"].decode("latin-1")
            lang = language_of(request.cookies.get(LANGUAGE_COOKIE, asked))
            wants_page = lang == "zh" and "text/html" in request.headers.get("accept", "")
            path = f"{scope['path']}/" if scope["path"] != "/" else "/zh/" if wants_page else ""
            if path:
                answer = RedirectResponse(link(f"{path}?{query}" if query else path))
        await answer(scope, receive, send)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until told to stop; returns the exit code."""
    stdio.make_safe()
    args = page_parser().parse_args(argv)
    try:
        args.password = os.environ[PASSWORD] = read_password(args)
        check(args)
        args.root_path = os.environ[ROOT_PATH] = args.root_path.rstrip("/")
        sockets = listening_sockets(args.listen, args.port)
        studio = Studio(args.state_dir, args.outputs)
        if args.enhancer:
            studio.enhancer = Enhancer(args.enhancer, args.enhancer_model, os.environ.get(ENHANCER_KEY, ""))
        app = make_app(studio, args)
        studio.serving.tell(args.webhook, lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        sweeping = (threading.Event(), studio.state / "uploads")
        threading.Thread(target=sweep_until, args=sweeping, daemon=True).start()
        threading.Thread(target=studio.serving.prepare, daemon=True).start()
        sys.stderr.write(f"[INFO] the page is at {url_of(reachable_at(args.listen), args.port)}\n")
        # who the client is and what it asked for is ProxyMiddleware's business, not that of uvicorn's own defaults
        config = uvicorn.Config(
            app, http=limited(args.proxy), ws="none", log_level="warning", access_log=False, proxy_headers=False,
            timeout_graceful_shutdown=2, workers=1,
        )  # fmt: skip
        logging.getLogger("uvicorn.error").addFilter(OnceAMinute())
        server = uvicorn.Server(config)
        gc.collect()
        gc.freeze()  # else each full collection goes through all that Gradio made, and holds every answer for 0.4 s
        server.run(sockets=sockets)
    except TurbodiffError as error:
        sys.stderr.write(f"[ERROR] {Words(shell_language()).error_line(error)}\n")
        return error.exit_code
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
