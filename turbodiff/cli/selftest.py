"""`turbodiff selftest`: does everything work on this machine? Each check is one line, also in webui_test.log."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import Event

if TYPE_CHECKING:
    from turbodiff.diagnostics.logs import LogFile

PROMPT = "a red circle moves right on a black background"


def selftest() -> None:
    """Install, GPU, plan, a demo clip, and its verification."""
    from turbodiff.diagnostics import logs
    from turbodiff.studio import state_folder

    log = logs.LogFile(logs.log_folder(Path.cwd(), state_folder()) / logs.RUN_LOG)
    checks: dict[str, Callable[[], str]] = {
        "install": _install,
        "gpu": _gpu,
        "plan": _plan,
        "clip": _clip,
    }
    failed = [name for name, check in checks.items() if not _passes(name, check, log)]
    if failed:
        raise typer.Exit(1)


def _passes(name: str, check: Callable[[], str], log: "LogFile") -> bool:
    try:
        line, good = f"selftest {name}: ok, {check()}", True
    except TurbodiffError as error:
        line, good = f"selftest {name}: FAILED, {error}", False
    log.say(line, who="selftest")
    sys.stdout.write(line + "\n")
    return good


def _install() -> str:
    from turbodiff.diagnostics.doctor import doctor

    report = doctor()
    if report["warnings"]:
        key, text = report["warnings"][0]
        raise TurbodiffError(text, code=key)
    return f"torch {report['found']['torch']}, ffmpeg {report['found']['ffmpeg']}"


def _gpu() -> str:
    from turbodiff.gpu.probe import machine_now

    machine = machine_now()
    return ", ".join(card.name for card in machine.gpus) or f"no GPU ({machine.gpu_state}): runs on the CPU"


def _plan() -> str:
    from turbodiff.studio import Studio

    plan = Studio().plan({"prompt": PROMPT})
    return f"{plan.peak_bytes >> 20} MiB of {plan.budget_bytes >> 20} MiB"


def _clip() -> str:
    """A demo clip through a worker of its own; it has its name only if every frame agreed with what was sent."""
    from turbodiff.studio import Studio

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "selftest.mp4"
        made = Studio(outputs=Path(folder)).generate({"prompt": PROMPT, "seed": 1}, output=output, on_event=_quiet)
    return f"{made.frames} frames in {made.seconds:.1f} s, verified, sha256 {made.sha256[:12]}"


def _quiet(_event: Event) -> None:
    pass
