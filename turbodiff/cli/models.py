"""`turbodiff models`: which weights there are, where they belong, and what is in them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

models_app = typer.Typer(help="Weights: list, pull, verify, quantize.", no_args_is_help=True)


@models_app.command("list")
def list_models() -> None:
    """Every model: are its files here, what is missing, and does its default clip fit this machine."""
    from turbodiff.cli.show import models_table
    from turbodiff.gpu.probe import machine_now
    from turbodiff.plan.tiers import fit_of
    from turbodiff.studio import Studio

    studio = Studio()
    machine, here, states = machine_now(), studio.inventory(), studio.models()
    models_table(states, {spec.name: fit_of(spec, machine, here).words for spec, _ in states})


@models_app.command("pull")
def pull_model(
    model: Annotated[str, typer.Argument(help="Wan2.1-1.3B, Wan2.1-14B, Wan2.2-A14B")],
    quant: Annotated[bool | None, typer.Option("--quant/--no-quant", help="left out: as fits this card")] = None,
    resolution: Annotated[str, typer.Option("--resolution", help="480p or 720p checkpoint")] = "",
    root: Annotated[Path | None, typer.Option("--root", help="target folder; default: checkpoints/")] = None,
) -> None:
    """Download what a model still needs; a download that stopped goes on."""
    from turbodiff.gpu.probe import machine_now
    from turbodiff.weights.download import pull

    sizes = [card.total_bytes for card in machine_now().gpus if card.total_bytes]
    paths = pull(
        model, memory_bytes=max(sizes, default=None), quant=quant, resolution=resolution, root=root, progress=_percent
    )
    for path in paths:
        sys.stdout.write(f"{path}\n")


@models_app.command("verify")
def verify_weights(
    path: Annotated[Path, typer.Argument(help="a file or a folder of shards")],
    sha256: Annotated[bool, typer.Option("--sha256", help="read every byte, too")] = False,
) -> None:
    """Say what a checkpoint is, whether it is complete, and which models can use it."""
    from turbodiff.weights.locate import verify

    report = verify(path, sha256=sha256)
    for name, value in report._asdict().items():
        sys.stdout.write(f"{name:12} {_said(value)}\n")
    if report.problems:
        raise typer.Exit(2)


@models_app.command("quantize")
def quantize_weights(source: Path, target: Path) -> None:
    """Write the -quant layout (INT8 tiles) of any DiT checkpoint."""
    from turbodiff.weights.quantize import quantize

    sys.stdout.write(f"{quantize(source, target)}\n")


def _said(value: object) -> str:
    """A field of a report for people: "BF16 189, I8 300", "none"."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, tuple):
        return "; ".join(value) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _percent(name: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r{name} {100 * done // max(total, 1):3d} %")
