"""Downloads and weights on this disk from the shell: more of `turbodiff models`."""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from turbodiff.cli.flags import ModelName, StateDir, open_studio
from turbodiff.cli.machine import models_app

if TYPE_CHECKING:
    from turbodiff.weights.storage import StoredFile


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
            "failed": words.error_line(error_from(found.error)),
        }.get(found.state)
        if said:
            notice = words.download_notice(found.progress)
            print_lines([f"{spec.display_name:14} {found.state:8} {said}", *([f"    {notice}"] if notice else [])])


@models_app.command("pause")
def pause_download(model: ModelName, state_dir: StateDir = None) -> None:
    """Pause a download; `models pull` goes on with it."""
    from turbodiff.spec.models import find_model

    open_studio(state_dir).downloads.stop(find_model(model), "pause")


@models_app.command("cancel")
def cancel_download(model: ModelName, state_dir: StateDir = None) -> None:
    """Give a download up: what is not complete is removed, complete files stay."""
    from turbodiff.spec.models import find_model

    open_studio(state_dir).downloads.stop(find_model(model), "cancel")


@models_app.command("mirror")
def choose_mirror(
    address: Annotated[str | None, typer.Argument(help='https://hf-mirror.com; "" for none; left out: show it')] = None,
    state_dir: StateDir = None,
) -> None:
    """Choose the server that downloads ask first, kept in the state folder; ModelScope is asked where it fails."""
    from turbodiff.cli.show import words_here
    from turbodiff.weights.sources import sources

    downloads = open_studio(state_dir).downloads
    if address is not None:
        downloads.set_mirror(address)
    asked = [source.host for source in sources(downloads.mirror)]
    sys.stdout.write(words_here()("shell.then").join(asked) + "\n")


@models_app.command("usage")
def show_usage() -> None:
    """The room that each model takes; files that several models share are counted once and named."""
    from turbodiff.cli.show import print_lines, words_here
    from turbodiff.spec.models import find_model
    from turbodiff.spec.numbers import gb

    words, counted = words_here(), dict[Path, int]()
    for name, files in open_studio(None).storage.stored().items():
        own = sum(file.nbytes for file in files if not file.shared_with)
        if files:
            print_lines([f"{find_model(name).display_name:16} {words('shell.own', size=gb(own))}"])
        for file in files:
            notes = [words("shell.shared", models=", ".join(file.shared_with))] if file.shared_with else []
            notes += [words("shell.link", path=file.link_to)] if file.link_to else []
            notes += [words("shell.outside")] if file.keep == "outside" else []
            print_lines([f"    {gb(file.nbytes):>8}  {file.path}" + "".join(f"; {note}" for note in notes)])
            counted[file.link_to or file.path] = file.nbytes
    print_lines([f"{words('shell.all'):16} {gb(sum(counted.values()))}"])


@models_app.command("delete")
def delete_model(
    model: ModelName,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    state_dir: StateDir = None,
) -> None:
    """Delete the files of a model below the folder of downloads; what other models here need is kept."""
    from turbodiff.cli.show import print_lines, words_here
    from turbodiff.spec.models import find_model
    from turbodiff.spec.numbers import gb

    words = words_here()

    def behind(file: "StoredFile") -> str:
        if file.link_to is None:
            return ""
        return " " + (words("shell.moved_to", path=file.link_to) if file.moved else words("shell.link_alone"))

    spec, storage = find_model(model), open_studio(state_dir).storage
    going = storage.going(spec, shared=False)
    print_lines(
        f"{gb(0 if file.link_to and not file.moved else file.nbytes):>8}  {file.path}" + behind(file) for file in going
    )
    if going and not yes:
        typer.confirm(words("shell.delete_these", n=len(going), model=spec.display_name), abort=True)
    print_lines([words("shell.deleted", n=len(storage.delete(spec)))])
    for file in storage.stored().get(spec.name, ()):
        users, why = ", ".join(file.shared_with), "shared" if file.keep == "shared" else "outside"
        print_lines([words(f"shell.kept_{why}", path=file.path, models=users)])


@models_app.command("move")
def move_model(
    model: ModelName,
    folder: Annotated[Path, typer.Argument(help="a folder on another disk")],
    state_dir: StateDir = None,
    as_json: Annotated[bool, typer.Option("--json", hidden=True)] = False,
) -> None:
    """Move the files of a model to another disk: copied, compared, then linked. May be killed and rerun."""
    from turbodiff.cli.show import print_lines, words_here
    from turbodiff.diagnostics.downloads import Move
    from turbodiff.spec.errors import TurbodiffError
    from turbodiff.spec.models import find_model
    from turbodiff.spec.numbers import gb

    spec, said_s = find_model(model), -math.inf
    try:
        for name, done, total in open_studio(state_dir).storage.move(spec, folder):
            if time.monotonic() > said_s + 1 or done == total:
                said_s = time.monotonic()
                moved = Move(name=name, done_bytes=done, total_bytes=total)
                line = moved.model_dump_json() if as_json else f"{gb(done)} / {gb(total)}  {name}"
                print_lines([line])
                sys.stdout.flush()
    except TurbodiffError as error:
        if not as_json:
            raise
        print_lines([Move(error=error.fields()).model_dump_json()])
        raise typer.Exit(error.exit_code) from None
    if said_s < 0 and not as_json:
        print_lines([words_here()("shell.there_already", model=spec.display_name)])
