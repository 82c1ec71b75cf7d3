"""Downloads and weights on this disk from the shell: more of `turbodiff models`."""

import sys
from typing import Annotated

import typer

from turbodiff.cli.flags import StateDir, open_studio
from turbodiff.cli.machine import models_app

Model = Annotated[str, typer.Argument(help="Wan2.1-1.3B, Wan2.1-14B, Wan2.2-A14B")]


@models_app.command("downloads")
def list_downloads(state_dir: StateDir = None) -> None:
    """Downloads that run, that are paused, that failed."""
    from turbodiff.cli.show import print_lines, words_here
    from turbodiff.spec.errors import error_from
    from turbodiff.spec.models import all_models
    from turbodiff.spec.numbers import gb

    words, downloads = words_here(), open_studio(state_dir).downloads
    for spec in all_models():
        found = downloads.of(spec.name)
        done, total = gb(found.progress.done_bytes), gb(found.progress.total_bytes)
        said = {
            "running": words.download(found.progress),
            "paused": words("download.paused", done=done, total=total),
            "failed": str(error_from(found.error)),
        }.get(found.state)
        if said:
            notice = words.download_notice(found.progress)
            print_lines([f"{spec.display_name:14} {found.state:8} {said}", *([f"    {notice}"] if notice else [])])


@models_app.command("pause")
def pause_download(model: Model, state_dir: StateDir = None) -> None:
    """Pause a download; `models pull` goes on with it."""
    from turbodiff.spec.models import find_model

    open_studio(state_dir).downloads.stop(find_model(model), "pause")


@models_app.command("cancel")
def cancel_download(model: Model, state_dir: StateDir = None) -> None:
    """Give a download up: what is not complete is removed, complete files stay."""
    from turbodiff.spec.models import find_model

    open_studio(state_dir).downloads.stop(find_model(model), "cancel")


@models_app.command("mirror")
def choose_mirror(
    address: Annotated[str | None, typer.Argument(help='https://hf-mirror.com; "" for none; left out: show it')] = None,
    state_dir: StateDir = None,
) -> None:
    """Choose the server that downloads ask first, kept in the state folder; ModelScope is asked where it fails."""
    from turbodiff.weights.sources import sources

    downloads = open_studio(state_dir).downloads
    if address is not None:
        downloads.set_mirror(address)
    asked = [source.host for source in sources(downloads.mirror)]
    sys.stdout.write(f"{', then '.join(asked)}\n")
