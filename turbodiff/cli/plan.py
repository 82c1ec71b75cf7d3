"""`turbodiff plan`: will it fit."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from turbodiff.cli import flags
from turbodiff.spec.wording import Words, language_of

NOT_FIELDS = {"pretend_vram", "machine_file", "trace", "lang", "as_json"}


def plan(
    prompt: flags.Prompt,
    model: flags.Model = "demo",
    seed: flags.Seed = None,
    resolution: flags.Resolution = None,
    aspect: flags.Aspect = None,
    size: flags.Size = None,
    num_frames: flags.Frames = None,
    steps: flags.Steps = None,
    sampler: flags.Sampler = None,
    sigma_max: flags.SigmaMax = None,
    boundary: flags.Boundary = None,
    attention: flags.Attention = None,
    topk: flags.Topk = None,
    quant_linear: flags.QuantLinear = None,
    image: flags.Image = None,
    pinned: flags.Pin = None,
    pretend_vram: Annotated[
        float | None, typer.Option("--pretend-vram", help="plan for a card of this many GiB")
    ] = None,
    machine_file: Annotated[
        Path | None, typer.Option("--machine", help="plan for a machine described in a file")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="beside the formulas, count what the real modules allocate")
    ] = False,
    lang: Annotated[
        str | None, typer.Option("--lang", help="en or zh for the reasons; left out: as $LANG says")
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Say what a request needs on this machine, phase by phase, without running anything."""
    fields = {name: value for name, value in locals().items() if name not in NOT_FIELDS}
    from turbodiff.cli.show import plan_table
    from turbodiff.gpu.probe import machine_now
    from turbodiff.plan.hardware import pretend, read_machine
    from turbodiff.studio import Studio

    machine = read_machine(machine_file) if machine_file is not None else machine_now()
    machine = machine if pretend_vram is None else pretend(machine, pretend_vram)
    made = Studio().plan(fields, machine)
    if as_json:
        sys.stdout.write(made.model_dump_json() + "\n")
    else:
        plan_table(made, Words(language_of(lang or _spoken_here())))
    if trace:
        from turbodiff.cli.show import trace_table
        from turbodiff.memory_lab.dry_run import dry_run

        trace_table(made, dry_run(made))


def _spoken_here() -> str:
    """The language tag of this shell, the most specific variable first (POSIX locales)."""
    return next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "en")
