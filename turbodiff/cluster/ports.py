"""A worker on a node of the cluster, as the supervisor's rules know it, and what is known of the node. Imports no Ray.

What arrives of a worker is heard under the random name of its port alone: the words and the clip of a worker that was
given up go to nobody. Only this side publishes, so an attempt that lives on where nobody can reach it changes nothing.
"""

import secrets
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbodiff.archive.clips import clip_path, publish, read_sidecar, sidecar_path
from turbodiff.archive.grid_sheets import note_cell
from turbodiff.diagnostics.background_tasks import start_task
from turbodiff.jobs.cards import labels
from turbodiff.jobs.nodes import NodeCard, NodeDownload, NodeFacts, NodeState, whole_models
from turbodiff.plan.hardware import Machine
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.errors import FileError, VerifyError
from turbodiff.spec.events import Event, ExitCommand, JobCommand, ResultEvent, RunCommand, read_event
from turbodiff.spec.files import sha256_of
from turbodiff.spec.models import Inventory
from turbodiff.spec.request import Request
from turbodiff.supervisor.context import STALE_S, Memory, SupervisorContext
from turbodiff.supervisor.ports import Evidence
from turbodiff.supervisor.worker_process import WORKER

if TYPE_CHECKING:
    from turbodiff.cluster.remote import Cluster

SHEET, TASKS = (sys.executable, "-P", "-m", "turbodiff.archive.grid_sheets"), "tasks"


@dataclass
class Node:
    """What a node's scout told last."""

    id: str
    host: str = ""
    state: NodeState = "ok"
    program: str = ""  # what runs there, where that is another version
    other_build: str = ""  # said of one that has our version and speaks otherwise: of another commit
    cards: int = 0
    machine: Machine | None = None
    inventory: Inventory = field(default_factory=lambda: Inventory(files=()))
    models: frozenset[str] = frozenset()  # those that it has every file of
    host_ooms: int = 0
    heard_s: float = 0.0
    downloads: tuple[NodeDownload, ...] = ()
    asked_s: dict[str, float] = field(default_factory=dict)  # when it was asked to download a model

    @property
    def uuids(self) -> frozenset[str]:
        """The cards that it sees, as far as they tell themselves apart."""
        return frozenset(gpu.uuid for gpu in self.machine.gpus if gpu.uuid) if self.machine else frozenset()

    def take_in(self, inventory: Inventory) -> None:
        """The weights that it has now."""
        self.inventory, self.models = inventory, whole_models(inventory)

    def facts(self, held: Sequence[tuple[str, int | None]]) -> NodeFacts:
        """What page and shell show of it.

        Args:
            held: UUID and job of each card that is ours, "" before it is known.
        """
        gpus = self.machine.gpus if self.machine else ()
        ours = dict(held)
        cards = [
            NodeCard(name=name, job=ours.get(gpu.uuid), ours=gpu.uuid in ours)
            for gpu, name in zip(gpus, labels(gpus), strict=True)
        ]
        if not gpus:  # the driver does not tell them apart
            cards = [NodeCard(job=job, ours=True) for _, job in held]
            cards += [NodeCard()] * (self.cards - len(cards))
        machine, inventory = (self.machine, self.inventory) if self.state == "ok" else (None, None)
        told = {"host": self.host, "state": self.state, "program": self.program, "downloads": self.downloads}
        return NodeFacts(**told, cards=tuple(cards), machine=machine, inventory=inventory)


class NodeMemory(Memory):
    """The machine of a node, as its scout told it."""

    def __init__(self, node: Node, cluster: "Cluster") -> None:
        super().__init__()
        self._node, self._cluster = node, cluster

    def machine(self) -> Machine | None:
        """The node's machine; None once it has been silent for ten seconds."""
        fresh = self._cluster.now() - self._node.heard_s <= STALE_S
        return self._node.machine if fresh else None

    def ram_available_bytes(self) -> int | None:
        """RAM that can be had there."""
        machine = self.machine()
        return machine.ram_available_bytes if machine else None

    def host_ooms(self) -> int:
        """How often the kernel there has ended a process for want of RAM."""
        return self._node.host_ooms


@dataclass
class NodeContext(SupervisorContext):
    """What the slots of one node share."""

    cluster: "Cluster" = field(kw_only=True)
    there: Node = field(kw_only=True)

    @property
    def node(self) -> str:
        """The node's id in the cluster."""
        return self.there.id

    @property
    def host(self) -> str:
        """The node's name."""
        return self.there.host

    @property
    def inventory(self) -> Inventory:
        """The weights that the node has."""
        return self.there.inventory

    def has_weights(self, model: str) -> bool:
        """Whether the node answers and has every file of a model: nothing is fetched to where nobody asked for it."""
        return self.there.state == "ok" and model in self.there.models

    def open_port(self, slot: int, device: str) -> "RemotePort":
        """Ask the cluster for a card of that node, and for a worker on it."""
        argv = () if tuple(self.worker_argv) == WORKER else tuple(self.worker_argv)
        return RemotePort(self.cluster, self.there, self.outputs, argv)


class RemotePort:
    """A worker on a card of a node. Whatever is asked is passed on, nothing is waited for."""

    def __init__(self, cluster: "Cluster", node: Node, outputs: Path, argv: Sequence[str]) -> None:
        self.id, self.pid, self.card, self.lost = secrets.token_hex(8), 0, "", ""
        self._cluster, self._node, self._outputs = cluster, node, outputs
        self._events, self._output = deque[Event](), deque[str]()
        self._seen, self._status = Evidence(), None if cluster.is_up else -signal.SIGTERM
        allocator = node.machine.allocator if node.machine else None
        cluster.ports[self.id] = self
        cluster.order(op="start", port=self.id, node=node.id, argv=list(argv), allocator=allocator)

    @property
    def where(self) -> str:
        """The node's name."""
        return f"on {self._node.host}"

    def hear(self, told: Mapping[str, Any]) -> None:
        """Take in a line of the bridge about this worker."""
        if told["op"] == "up":
            self.pid, self.card = told["pid"], told["card"]
        elif told["op"] == "heard":
            for line in told["events"]:
                try:
                    self._events.append(read_event(line))
                except ValueError as error:
                    self._output.append(f"[WARNING] not an event line ({error}): {line[:200]}")
            self._output.extend(told["log"])
            self._seen = Evidence(told["bytes_read"], told["cpu_s"], told["state"])
        else:
            self.lost = told["lost"] and (self._node.host or self._node.id)
            self._status = -signal.SIGKILL if told["status"] is None else told["status"]
            self._output.extend([f"[WARNING] {told['why']}"] if told["why"] else [])

    def filenos(self) -> list[int]:
        """None of its own: the bridge's is the cluster's."""
        return []

    def send(self, command: RunCommand | JobCommand | ExitCommand) -> bool:
        """Pass on one command; False once the worker has ended."""
        self._cluster.order(op="send", port=self.id, command=command.model_dump(mode="json"))
        return self._status is None

    def events(self) -> list[Event]:
        """The events that have arrived."""
        found, self._events = list(self._events), deque()
        return found

    def output(self) -> list[str]:
        """The log lines that have arrived."""
        found, self._output = list(self._output), deque()
        return found

    def look(self) -> Evidence:
        """What the node said last."""
        return self._seen

    def dump_stacks(self) -> None:
        """Have it write the stacks of its threads to its log."""
        self.signal(signal.SIGUSR1)

    def bring(self, result: ResultEvent) -> ClipResult:
        """Publish the clip that the bridge has fetched, under the paths that were asked for.

        Raises:
            VerifyError: what came is not what the worker verified.
        """
        part = Path(result.path)
        try:
            got = sha256_of(part)
            if got != result.sha256:
                raise VerifyError(
                    "the clip on disk is not the one that was verified", code="clip_changed", field="sha256",
                    got=got[:12], expected=result.sha256[:12], try_instead="run it again; check the disk",
                )  # fmt: skip
            sidecar = read_sidecar(part)
            request = sidecar.request
            poster = part.with_name(f"{part.name}.jpg").read_bytes()
            created = sidecar.created or datetime.now().astimezone()
            final = clip_path(self._outputs, request.kind, request.seed or 0, request.model, created)
            clip = publish(part, final, sidecar, poster)
            self._note(request, clip)
        except (OSError, FileError) as error:
            if isinstance(error, VerifyError):
                raise
            raise VerifyError("the clip cannot be read", code="clip_unreadable", field="path", got=error) from None
        finally:
            for name in ("", ".json", ".jpg"):
                Path(f"{part}{name}").unlink(missing_ok=True)
        return result.model_copy(update={"path": str(clip), "sidecar": str(sidecar_path(clip))})

    def _note(self, request: Request, clip: Path) -> None:
        """Note a cell of a grid; the sheet that the last one brings takes a process of its own."""
        context = self._cluster.context
        try:
            if request.grid and (whole := note_cell(context.state, request.grid, clip)):
                argv = [*SHEET, str(whole), str(clip), str(self._outputs)]
                start_task(context.state / TASKS, f"grid-{request.grid.id}", argv)
        except Exception as error:  # noqa: BLE001  whatever it is, the clips are there
            context.log.say(f"no contact sheet was made: {error}", "cluster", level="WARNING")

    def signal(self, number: int) -> None:
        """Ask for a signal to the worker."""
        self._cluster.order(op="signal", port=self.id, number=number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended as far as is known."""
        return self._status is not None

    def exit_status(self) -> int | None:
        """How it ended, as far as is known; SIGKILL where its actor or node went with it."""
        return self._status

    def stop(self, exit_s: float, term_s: float) -> int:
        """Ask for its end; nothing that it says later is heard."""
        return self.kill()

    def kill(self) -> int:
        """Ask for its end; nothing that it says later is heard."""
        if self._status is None:
            self._cluster.order(op="end", port=self.id)
            self._status = -signal.SIGTERM
        return self._status

    def close(self) -> None:
        """Hear nothing more of it."""
        self._cluster.ports.pop(self.id, None)
