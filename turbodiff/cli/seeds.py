"""`turbodiff seeds`: the archive of what was made, rated and worth repeating."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from turbodiff.cli.places import OUTPUTS, Outputs, StateDir, open_studio

seeds_app = typer.Typer(help="The seed archive: list, rate, export, import.", no_args_is_help=True)


@seeds_app.command("list")
def list_seeds(
    search: Annotated[str, typer.Argument(help="words that must occur")] = "", state_dir: StateDir = None
) -> None:
    """The newest rows first."""
    for seed in open_studio(state_dir).seeds(search):
        row = seed.row
        cells = (row.prompt, row.seed, row.model, row.resolution, row.rating, row.note)
        sys.stdout.write(f"{seed.id:6} " + " | ".join(cells) + "\n")


@seeds_app.command("rate")
def rate_seed(
    row: int,
    rating: Annotated[str, typer.Argument(help="stars or words")],
    note: Annotated[str | None, typer.Option("--note")] = None,
    state_dir: StateDir = None,
    outputs: Outputs = OUTPUTS,
) -> None:
    """Rate a row; seeds.md in the outputs folder follows."""
    open_studio(state_dir, outputs).rate(row, rating, note)


@seeds_app.command("export")
def export_seeds(state_dir: StateDir = None) -> None:
    """The archive as a Markdown table on standard output."""
    sys.stdout.write(open_studio(state_dir).seeds_text())


@seeds_app.command("import")
def import_seeds(path: Path, state_dir: StateDir = None, outputs: Outputs = OUTPUTS) -> None:
    """Take over the rows of a Markdown table."""
    sys.stdout.write(f"{open_studio(state_dir, outputs).import_seeds(path)} rows\n")
