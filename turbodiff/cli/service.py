"""`turbodiff serve`, `restart`, `support-bundle`: the running app from the shell."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from turbodiff.cli.places import StateDir, open_studio
from turbodiff.spec.errors import TurbodiffError

RESTART_WAIT_S = 60.0
POLL_S = 0.2


def serve(
    port: Annotated[int, typer.Option("--port")] = 7860,
    no_browser: Annotated[bool, typer.Option("--no-browser")] = False,
    state_dir: StateDir = None,
    outputs: Annotated[Path, typer.Option("--outputs")] = Path("outputs"),
) -> None:
    """Start the app with its page: the same as `python webui/app.py`."""
    argv = ["--port", str(port), "--outputs", str(outputs)]
    argv += ["--no-browser"] if no_browser else []
    argv += ["--state-dir", str(state_dir)] if state_dir else []
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "webui.app", *argv])


def restart(state_dir: StateDir = None) -> None:
    """重启应用: end the worker, prove that its memory is back, start a new one. Works when the page is dead, too."""
    studio = open_studio(state_dir)
    if not studio.served:
        raise TurbodiffError("the app is not running", code="not_running", try_instead="turbodiff serve")
    control = studio.restart(by="shell")
    end_s = time.monotonic() + RESTART_WAIT_S
    while (outcome := studio.restart_outcome(control)) is None:
        if time.monotonic() > end_s:
            raise TurbodiffError("no answer to the restart", code="restart_silent", try_instead="see the start-up log")
        time.sleep(POLL_S)
    sys.stdout.write(f"{outcome['text']}\n")
    if not outcome.get("ok", True):
        raise typer.Exit(1)


def support_bundle(
    path: Annotated[Path, typer.Argument(help="the zip to write")] = Path("turbodiff-support.zip"),
    with_prompts: Annotated[bool, typer.Option("--with-prompts", help="leave prompts and picture names in")] = False,
    state_dir: StateDir = None,
) -> None:
    """Logs, versions and the last jobs in one zip, without prompts and secrets."""
    sys.stdout.write(f"{open_studio(state_dir).support_bundle(path, with_prompts)}\n")
