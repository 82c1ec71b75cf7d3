"""Which queue and which library a command works on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from turbodiff.studio import Studio

StateDir = Annotated[Path | None, typer.Option("--state-dir", help="queue and caches; default: the XDG state folder")]
Outputs = Annotated[Path, typer.Option("--outputs", help="the library's folder")]
OUTPUTS = Path("outputs")


def open_studio(state_dir: Path | None, outputs: Path = OUTPUTS) -> "Studio":
    """The studio of a state folder; works while the app runs."""
    from turbodiff.studio import Studio

    return Studio(state_dir, outputs)
