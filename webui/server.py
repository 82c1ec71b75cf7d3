"""The web process: our own FastAPI app with the gate, /media/<clip>, /healthz, and the page in both languages.

    python -m webui.server --state-dir ~/.local/state/turbodiff --outputs outputs --port 7860

Gradio serves no file of ours (`allowed_paths=[]`): clips are looked up by id in the library.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from turbodiff.spec.errors import TurbodiffError
from turbodiff.studio import Studio
from webui import page
from webui.launch import ANY, LOCAL, check, parser
from webui.request_guard import Narrow
from webui.security import Gate, Rules, allowed_hosts
from webui.snapshot import StudioReader
from webui.theme import theme
from webui.wording import LANGUAGES, Words, language_of

STATIC = Path(__file__).parent / "static"
LANGUAGE_COOKIE = "turbodiff_lang"
UPLOAD_LIMIT = "25mb"
PATHS = {"zh": "/zh", "en": ""}


def make_app(studio: Studio, args: argparse.Namespace) -> FastAPI:
    """The whole site over one studio."""
    reader = StudioReader(studio)
    os.environ["GRADIO_TEMP_DIR"] = str(studio.state / "uploads")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _routes(app, reader)
    _files(app, reader)
    for lang in sorted(LANGUAGES, key=lambda lang: -len(PATHS[lang])):  # "" would swallow "/zh": mount it last
        _mount(app, reader, Words(lang), PATHS[lang], args)
    app.add_middleware(Narrow)
    app.add_middleware(Languages, forced=args.lang)
    app.add_middleware(Gate, rules=Rules(allowed_hosts(args.listen, args.host_name), args.password))
    return app


def _mount(app: FastAPI, reader: StudioReader, words: Words, path: str, args: argparse.Namespace) -> None:
    script = (STATIC / "page.js").read_text("utf-8")
    blocks = page.build(reader, words)
    gr.mount_gradio_app(
        app,
        blocks,
        path=path or "/",
        server_name=args.listen,
        server_port=args.port,
        allowed_paths=[],
        blocked_paths=[str(reader.studio.store.path)],
        show_error=False,
        max_file_size=UPLOAD_LIMIT,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        run_history=False,
        mcp_server=bool(args.mcp and not path),  # the API's six calls as tools; a restart is not among them
        theme=theme(),
        css=(STATIC / "page.css").read_text("utf-8"),
        head=f'<meta name="color-scheme" content="light dark"><script>{script}</script>',
    )
    blocks.has_launched = True  # else Gradio takes any path of this machine for an upload (processing_utils.py, 6.31)


def _routes(app: FastAPI, reader: StudioReader) -> None:
    @app.get("/healthz")
    def healthz() -> JSONResponse:
        return JSONResponse({"ok": True})

    @app.get("/media/{clip}")
    def media(clip: str) -> FileResponse:
        found = reader.clip(clip)
        if found is None or not found.path.is_file():
            raise HTTPException(404, "no such clip")
        return FileResponse(
            found.path, media_type="video/mp4", filename=found.path.name, content_disposition_type="inline"
        )

    @app.get("/media/{clip}/poster")
    def poster(clip: str) -> FileResponse:
        found = reader.clip(clip)
        if found is None or found.poster is None or not found.poster.is_file():
            raise HTTPException(404, "no poster")
        return FileResponse(found.poster, media_type="image/jpeg", headers={"cache-control": "max-age=86400"})


def _files(app: FastAPI, reader: StudioReader) -> None:
    @app.get("/seeds.md")
    def seeds() -> Response:
        return Response(reader.studio.seeds_text(), media_type="text/markdown; charset=utf-8")

    @app.get("/support.zip")
    def support() -> FileResponse:
        made = reader.studio.support_bundle(reader.studio.state / "support.zip")
        return FileResponse(made, media_type="application/zip", filename="turbodiff-support.zip")

    @app.get("/favicon.ico")
    def favicon() -> FileResponse:
        return FileResponse(STATIC / "favicon.svg", media_type="image/svg+xml")

    @app.get("/en")
    def english() -> RedirectResponse:
        answer = RedirectResponse("/")
        answer.set_cookie(LANGUAGE_COOKIE, "en", samesite="lax")
        return answer


class Languages:
    """Sends a browser that asks for "/" to the page in its language; programs always get the page at "/"."""

    def __init__(self, app: ASGIApp, forced: str = "auto") -> None:
        self.app, self.forced = app, forced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and scope["path"] == "/" and scope["method"] == "GET" and self._wants_chinese(scope):
            query = scope["query_string"].decode("latin-1")
            await RedirectResponse("/zh/" + (f"?{query}" if query else ""))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _wants_chinese(self, scope: Scope) -> bool:
        headers: dict[str, Any] = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if "text/html" not in headers.get("accept", ""):
            return False
        chosen = SimpleCookie(headers.get("cookie", "")).get(LANGUAGE_COOKIE)
        if chosen is not None:
            return language_of(chosen.value) == "zh"
        wanted = headers.get("accept-language", "") if self.forced == "auto" else self.forced
        return language_of(wanted) == "zh"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until told to stop; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        serve(args)
    except TurbodiffError as error:
        sys.stderr.write(f"[ERROR] {error}\n")
        return error.exit_code
    return 0


def serve(args: argparse.Namespace) -> None:
    """Serve the page.

    Raises:
        PortInUseError: another program holds the port.
        RequestError: `--listen` without a password.
    """
    check(args)
    import uvicorn

    app = make_app(Studio(args.state_dir, args.outputs), args)
    address = LOCAL if args.listen == ANY else args.listen
    sys.stderr.write(f"[INFO] the page is at http://{address}:{args.port}\n")
    uvicorn.run(
        app, host=args.listen, port=args.port, log_level="warning", access_log=False, timeout_graceful_shutdown=2
    )


if __name__ == "__main__":
    sys.exit(main())
