"""What runs on a node of the cluster, inside Ray's actors: a worker on one card, and a scout that tells what is there.

Neither imports Ray. A `GpuHost` makes its worker in `__init__`, which Ray runs in the actor's main thread: a child dies
with the thread that started it (PR_SET_PDEATHSIG), so the worker dies with its actor.
"""

import contextlib
import importlib.metadata
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

from turbodiff.diagnostics.downloads import Downloads
from turbodiff.gpu.probe import Probe, machine_from
from turbodiff.gpu.process_identity import is_running, start_ticks
from turbodiff.plan.hardware import Allocator
from turbodiff.spec.events import PROTOCOL_VERSION, RunCommand, read_command
from turbodiff.spec.files import sha256_of, state_folder
from turbodiff.spec.models import find_model
from turbodiff.supervisor.context import Memory
from turbodiff.supervisor.ownership import end_leftover_workers
from turbodiff.supervisor.ports import LocalPort
from turbodiff.supervisor.worker_process import WORKER
from turbodiff.weights.locate import inventory

SCRATCH = "turbodiff-host-"
PIECE_BYTES = 4 << 20
INVENTORY_EVERY_S = 60.0
STOP_EXIT_S, STOP_TERM_S = 1.0, 1.0
NO_PATHS: Mapping[str, str] = {}


class Heard(TypedDict):
    """What a worker said since the last call: event lines, log lines, what procfs says, its exit status."""

    events: list[str]
    log: list[str]
    bytes_read: int
    cpu_s: float
    state: str
    status: int | None


def program() -> str:
    """What must be the same on both sides: turbodiff's version and that of its protocol."""
    try:
        version = importlib.metadata.version("turbodiff")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version}, protocol {PROTOCOL_VERSION}"


class GpuHost:
    """One worker on the card that Ray shows this actor. Calls of `pump` wait; others are short.

    Args:
        run_id: of the supervisor's run.
        argv: the worker's command line; () for that of this node.
        allocator: how torch's allocator shall work on this node.
    """

    def __init__(self, run_id: str, argv: Sequence[str] = (), allocator: Allocator | None = None) -> None:
        sweep_scratch()
        own = os.getpid()
        self.scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getuid()}-{own}-{start_ticks(own) or 0}-"))
        self.outputs, self.files = self.scratch / "outputs", self.scratch / "files"
        for folder in (self.outputs, self.files):
            folder.mkdir()
        self.worker = LocalPort(argv or WORKER, run_id, "", allocator, slot=0, state=self.scratch, outputs=self.outputs)

    def facts(self) -> dict[str, str | int]:
        """The worker's process id, and the number of its card on this node as Ray gave it, "" for none."""
        return {"pid": self.worker.pid, "card": os.environ.get("CUDA_VISIBLE_DEVICES", "")}

    def send(self, command: dict[str, object], paths: Mapping[str, str] = NO_PATHS) -> bool:
        """Pass on a command as of the supervisor's pipe; a clip goes into this node's scratch.

        Args:
            paths: where this node has the files of a run, by the paths that the command gives.
        """
        given = read_command(command)
        if isinstance(given, RunCommand):
            given = given.moved(paths, self.outputs, self.scratch)
        return self.worker.send(given)

    def pump(self, wait_s: float) -> Heard:
        """What the worker said, as soon as it says anything; after its end, its last words with its status."""
        select.select(self.worker.filenos(), [], [], wait_s)
        over = self.worker.wait(0)  # asked before it is heard, so that no last word is missed
        events = [event.line() for event in self.worker.events()]
        seen = self.worker.look()
        return Heard(
            events=events, log=self.worker.output(), bytes_read=seen.bytes_read, cpu_s=seen.cpu_s, state=seen.state,
            status=self.worker.exit_status() if over else None,
        )  # fmt: skip

    def signal(self, number: int) -> None:
        """Signal the worker; SIGUSR1 only where it writes its stacks then."""
        if number == signal.SIGUSR1:
            self.worker.dump_stacks()
        else:
            self.worker.signal(number)

    def put(self, digest: str, suffix: str, offset: int, piece: bytes, whole_bytes: int) -> str:
        """Take a piece of a file in; where it stands once it is whole, "" before. b"" only asks whether it is there."""
        path = self.files / f"{digest}{suffix}"
        part = path.with_name(f".{path.name}")
        if piece:
            with part.open("ab" if offset else "wb") as file:
                file.write(piece)
            if offset + len(piece) == whole_bytes and sha256_of(part) == digest:
                part.replace(path)
        return str(path) if path.exists() else ""

    def read(self, path: str, offset: int) -> bytes:
        """A piece of a finished clip or of what lies beside it, b"" at its end or where it is not there.

        Raises:
            PermissionError: it is not below this host's outputs.
        """
        found = Path(path).resolve()
        if not found.is_relative_to(self.outputs.resolve()):
            raise PermissionError(path)
        with contextlib.suppress(FileNotFoundError), found.open("rb") as file:
            file.seek(offset)
            return file.read(PIECE_BYTES)
        return b""

    def forget(self, path: str) -> None:
        """Remove a clip that has come home."""
        for name in ("", ".json", ".jpg"):
            Path(f"{path}{name}").unlink(missing_ok=True)

    def end(self) -> None:
        """End the worker and take the scratch away."""
        self.worker.stop(STOP_EXIT_S, STOP_TERM_S)
        self.worker.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def sweep_scratch() -> None:
    """End the workers and remove the scratch of hosts of ours that were killed: those whose process, by its number and
    its start, is gone."""
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH}{os.getuid()}-*"):
        _, pid, ticks, *_ = f"{old.name.removeprefix(SCRATCH)}---".split("-")
        if old.is_symlink() or old.lstat().st_uid != os.getuid():  # a shared folder: not ours
            continue
        if pid.isdecimal() and ticks.isdecimal() and not is_running(int(pid), int(ticks)):
            end_leftover_workers(old)
            shutil.rmtree(old, ignore_errors=True)


class NodeScout:
    """Tells what a node has: one on each node, on no card."""

    def __init__(self) -> None:
        self._probe, self._digest, self._told_s = Probe(), "", -INVENTORY_EVERY_S
        self._downloads, self._asked = Downloads(state_folder() / "downloads"), dict[str, str]()  # model, how it was

    def fetch(self, model: str) -> None:
        """Download what suits this node's card, as the page of this node would: in a process of its own, resumed,
        checked, with the disk's room in view. How it does is told by `look`."""
        self._asked[model] = ""
        self._downloads.start(find_model(model))

    def look(self, own_pids: Sequence[int], held_bytes: dict[str, int]) -> dict[str, Any]:
        """The machine now, with the memory of our workers as ours, what runs here, and the weights where they changed
        since the last call."""
        sample = self._probe.latest()
        told: dict[str, Any] = {
            "program": program(),
            "host": socket.gethostname(),
            "machine": machine_from(sample, frozenset(own_pids), held_bytes).model_dump(mode="json"),
            "host_ooms": Memory().host_ooms(),
            "disk_free_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        }
        told["downloads"] = []
        for model, before in self._asked.items():
            known = self._downloads.of(model)
            share = known.progress.done_bytes / (known.progress.total_bytes or 1)
            told["downloads"].append({"model": model, "state": known.state, "share": share, "error": known.error})
            if known.state != before and known.state == "done":
                self._told_s = -INVENTORY_EVERY_S
            self._asked[model] = known.state
        if time.monotonic() - self._told_s >= INVENTORY_EVERY_S:
            self._told_s = time.monotonic()
            found = inventory().model_dump_json()
            digest = sha256(found.encode()).hexdigest()
            if digest != self._digest:
                self._digest, told["inventory"] = digest, found
        return told
