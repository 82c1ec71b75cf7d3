"""Downloads as the page and the shell see them: a record per model in the state folder, written once per second.

The process that downloads writes <folder>/<model>.json and looks for <model>.stop, in which anybody at this state
folder may ask it to pause or to give up: so no process is ever signalled, and a record outlives its process. One
whose process is gone, be it by a power cut, is a paused download.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from turbodiff.archive.disk import free_bytes
from turbodiff.diagnostics.background_tasks import MOVE, PULL, background_task, start_task
from turbodiff.gpu.process_identity import is_running, start_ticks
from turbodiff.plan.weight_sizes import missing_files
from turbodiff.spec.downloads import Progress
from turbodiff.spec.errors import CancelledByUser, FileError, RequestError, TurbodiffError
from turbodiff.spec.files import atomic_write, open_file
from turbodiff.spec.models import Inventory, ModelSpec, Variant
from turbodiff.spec.plan import Fit
from turbodiff.weights.download import discard_parts, pull
from turbodiff.weights.locate import download_root
from turbodiff.weights.sources import check_mirror, sources

State = Literal["absent", "running", "paused", "failed", "done"]
Stop = Literal["pause", "cancel"]
MIRROR = "mirror.txt"
RECORD_S = 1.0  # between two records


class Download(BaseModel):
    """How the download of a model is doing, and what is downloaded."""

    model_config = ConfigDict(frozen=True)
    state: State = "absent"
    model: str = ""
    variant: str = ""
    root: str = ""
    progress: Progress = Progress()
    error: dict[str, str] = {}  # its fields (spec/errors.py) where the state is "failed"
    pid: int = 0
    ticks: int = 0


class Move(BaseModel):
    """How the move of a model is doing: a line of `turbodiff models move --json`."""

    model_config = ConfigDict(frozen=True)
    running: bool = False
    name: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    error: dict[str, str] = {}  # its fields (spec/errors.py) where it failed


class Offer(NamedTuple):
    """What downloading one variant of a model would bring: file names with their repositories, bytes in all, where to,
    and the room there; and how it would run here.

    No `files`: all of it is here. `network_bytes` are those of the networks alone.
    """

    variant: Variant
    files: tuple[tuple[str, str, int], ...]  # name, repository, bytes
    nbytes: int
    network_bytes: int
    folder: Path
    free_bytes: int
    host: str
    fit: Fit


class Downloads:
    """The downloads of a state folder: at most one per model, each in a process of its own.

    Args:
        folder: of the records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, model: str) -> Download:
        """How the download of a model is doing."""
        task = background_task(self.folder, model)
        try:
            with open_file(self.folder / f"{model}.json") as file:
                found = Download.model_validate_json(file.read())
        except (OSError, ValueError):
            found = Download(model=model)
            if task.lines and not task.running:  # it ended before its first word
                error = {"code": "download_stopped", "what": "the download did not start", "got": task.words[:300]}
                return found.model_copy(update={"state": "failed", "error": error})
        if found.state == "running" and not is_running(found.pid, found.ticks):
            found = found.model_copy(update={"state": "paused"})
        return found.model_copy(update={"state": "running"}) if task.running else found

    def begun(self, spec: ModelSpec, variant: str = "") -> Download | None:
        """The download of a model that stopped before its end, which the next one goes on with; None where there is
        none, or where another `variant` is asked for."""
        known = self.of(spec.name)
        names = [one.name for one in spec.variants if variant in ("", one.name)]
        return known if known.state in ("paused", "failed") and known.variant in names and known.root else None

    def start(self, spec: ModelSpec, variant: str = "") -> None:
        """Download a variant of a model in a process of its own; by default go on with the one that stopped, or take
        what suits here (RequestError: there is none of that name)."""
        if begun := self.begun(spec, variant):  # named here: to its own process this download runs already
            chosen = ["--variant", begun.variant, "--root", begun.root]
        else:
            chosen = ["--variant", spec.variant(variant).name] if variant else []
        start_task(self.folder, spec.name, (*PULL, spec.name, "--state-dir", str(self.folder.parent), *chosen))

    def stop(self, spec: ModelSpec, how: Stop) -> None:
        """Ask a download to pause, or to give up, which removes what is not complete; complete files stay."""
        known = self.of(spec.name)
        if known.state == "running":
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{spec.name}.stop").write_text(how, "utf-8")
        elif how == "cancel":
            self._forget(spec, known)

    def start_move(self, spec: ModelSpec, folder: str = "") -> None:
        """Move a model's files to a folder on another disk, in a process of its own.

        Raises:
            RequestError: not an absolute path.
        """
        if not folder.strip().startswith("/") or not folder.isprintable():
            raise RequestError("not a folder", code="move_folder", field="folder", got=folder.strip()[:120])
        state = ("--state-dir", str(self.folder.parent))
        start_task(self.folder, f"move-{spec.name}", (*MOVE, spec.name, folder.strip(), "--json", *state))

    def moving(self, model: str) -> Move:
        """How the move of a model is doing."""
        task = background_task(self.folder, f"move-{model}")
        try:
            told = Move.model_validate_json(task.words)
        except ValidationError:  # before its first word, or a fault of ours
            told = Move(
                error={} if task.running or not task.lines else {"code": "move_stopped", "got": task.words[:300]}
            )
        return told.model_copy(update={"running": task.running})

    @property
    def mirror(self) -> str:
        """The server that is asked first; "" for $HF_ENDPOINT or the hub itself."""
        with contextlib.suppress(OSError, RequestError, UnicodeDecodeError), open_file(self.folder / MIRROR) as file:
            return check_mirror(file.read().decode("utf-8"))
        return ""

    def set_mirror(self, address: str) -> None:
        """Choose the server that is asked first, for everybody at this state folder; "" for none.

        Raises:
            RequestError: not the address of a server.
        """
        address = check_mirror(address)
        with atomic_write(self.folder / MIRROR) as part:
            part.write_text(address, "utf-8")

    def run(
        self,
        spec: ModelSpec,
        *,
        variant: Variant,
        root: Path | None = None,
        mirror: str = "",
        tell: Callable[[Progress], None],
    ) -> list[Path]:
        """Download in this process: what `weights.download.pull` does, with a record that others may read.

        `tell` is called at most once per second.

        Raises:
            CancelledByUser: it was asked to stop.
            FileError: another process downloads this model, or as `pull`.
        """
        own, stop, known = os.getpid(), self.folder / f"{spec.name}.stop", self.of(spec.name)
        if known.state == "running" and known.pid not in (0, own) and is_running(known.pid, known.ticks):
            raise FileError(
                "this model is being downloaded already", code="download_running", field=spec.name,
                got=f"process {known.pid}", try_instead="wait for the other one, or pause it",
            )  # fmt: skip
        target = (root or download_root()).absolute()
        chosen = {"model": spec.name, "variant": variant.name, "root": str(target)}
        record = Download(state="running", **chosen, pid=own, ticks=start_ticks(own) or 0)
        written_s, wish = -math.inf, ""

        def write(**changed: object) -> None:
            nonlocal record, written_s
            record, written_s = record.model_copy(update=changed), time.monotonic()
            with contextlib.suppress(OSError), atomic_write(self.folder / f"{spec.name}.json") as part:
                part.write_text(record.model_dump_json(), "utf-8")  # a full disk ends no download

        def heed(progress: Progress) -> None:
            if stop.exists():
                raise CancelledByUser("stopped by a person", code="cancelled")
            if time.monotonic() >= written_s + RECORD_S:
                write(progress=progress)
                tell(progress)

        stop.unlink(missing_ok=True)
        write()
        try:
            paths = pull(spec.name, variant=variant, root=target, mirror=mirror, tell=heed)
            write(state="done")
            return paths
        except TurbodiffError as error:
            with contextlib.suppress(OSError):
                wish = stop.read_text("utf-8")
            write(**({"state": "paused"} if wish else {"state": "failed", "error": error.fields()}))
            if wish == "cancel":
                self._forget(spec, record)
            raise
        except BaseException:  # Ctrl-C, SIGTERM, a fault of ours: what came is kept
            write(state="paused")
            raise
        finally:
            stop.unlink(missing_ok=True)

    def _forget(self, spec: ModelSpec, known: Download) -> None:
        """Remove the partial files of a download that has ended, and its record."""
        if known.root:
            discard_parts(spec.files_of(spec.variant(known.variant)), Path(known.root))
        for ending in ("json", "log", "pid", "stop"):
            (self.folder / f"{spec.name}.{ending}").unlink(missing_ok=True)


def download_offers(
    spec: ModelSpec, found: Inventory, fits: Mapping[Variant, Fit], mirror: str = ""
) -> tuple[Offer, ...]:
    """Every variant of a model, with what plan/tiers.py `fits_of` says of it, and those of its files that are not here;
    () where nothing is published."""
    if spec.bundled:
        return ()
    folder, offers = download_root().absolute(), []
    room, host = free_bytes(folder) or 0, sources(mirror)[0].host
    for variant, fit in fits.items():
        files = spec.files_of(variant)
        wanted = [file for file in missing_files(files, spec, found) if file.repo]
        listed = tuple((file.names[0], file.repo, file.bytes) for file in wanted)
        networks = sum(file.bytes for file in files if file.component.startswith("dit"))
        nbytes = sum(file.bytes for file in wanted)
        offers.append(Offer(variant, listed, nbytes, networks, folder, room, host, fit))
    return tuple(offers)
