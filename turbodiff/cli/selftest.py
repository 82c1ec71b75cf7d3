"""`turbodiff selftest`: does everything work on this machine? Each check is one line, also in webui_test.log."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import Event

PROMPT = "a red circle moves right on a black background"


def selftest(as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False) -> None:
    """Install, GPU, plan, a demo clip, and its verification."""
    from turbodiff.diagnostics import logs
    from turbodiff.diagnostics.background_tasks import Check
    from turbodiff.studio import state_folder

    log = logs.LogFile(logs.log_folder(Path.cwd(), state_folder()) / logs.RUN_LOG)
    checks = {"install": _install, "gpu": _gpu, "plan": _plan, "clip": _clip}
    failed = False
    for name, check in checks.items():
        try:
            found = Check(name=name, ok=True, detail=check())
        except TurbodiffError as error:
            found = Check(name=name, ok=False, detail=str(error))
        line = f"selftest {name}: {'ok' if found.ok else 'FAILED'}, {found.detail}"
        log.say(line, who="selftest")
        sys.stdout.write((found.model_dump_json() if as_json else line) + "\n")
        sys.stdout.flush()  # the page shows each as it comes
        failed = failed or not found.ok
    if failed:
        raise typer.Exit(1)


def _install() -> str:
    from turbodiff.diagnostics.doctor import doctor

    report = doctor()
    if report.warnings:
        key, text = report.warnings[0]
        raise TurbodiffError(text, code=key)
    return f"torch {report.found['torch']}, ffmpeg {report.found['ffmpeg']}"


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
