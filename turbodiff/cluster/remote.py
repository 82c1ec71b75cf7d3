"""The supervisor's side of the cluster: the bridge process kept alive, the nodes that it tells of, and the slots for
their cards. Imports no Ray.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from turbodiff.archive.clips import PARTIAL
from turbodiff.cluster.host import program
from turbodiff.cluster.ports import Node, NodeContext, NodeMemory, RemotePort
from turbodiff.jobs.cards import WINDOW
from turbodiff.jobs.nodes import CLUSTER, ClusterFacts, NodeDownload
from turbodiff.jobs.rows import parsed
from turbodiff.jobs.store import Store
from turbodiff.plan.hardware import Machine
from turbodiff.spec.environment import RUN_ID, child_environment
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import Inventory
from turbodiff.spec.page_flags import UsedCards
from turbodiff.supervisor.context import SupervisorContext
from turbodiff.supervisor.slots import GpuSlot
from turbodiff.supervisor.supervisor import Supervisor
from turbodiff.supervisor.worker_process import BACKOFF_S, PIPE_BYTES, Lines, describe_exit, spawn_child

BRIDGE = (sys.executable, "-P", "-m", "turbodiff.cluster.bridge")
FIRST_SLOT = 1000  # numbers below are of this machine's cards
AGAIN_S = 600.0  # from a download that failed on a node to the next try
EVERY_S = 0.5  # between two looks at what waits
IDLE_S = 900.0  # after which a card goes back to the cluster's other users


class Cluster:
    """The cards of a Ray cluster as slots of the supervisor.

    Args:
        context: of the supervisor.
        address: of the cluster's head, or "auto".
        most_cards: that are asked for at once.
        downloads: whether nodes may download the weights that a job waits for.
    """

    def __init__(self, context: SupervisorContext, address: str, most_cards: int, downloads: bool = False) -> None:
        self.context, self.address, self.most_cards, self.now = context, address, most_cards, context.now
        self.downloads = downloads
        self.ports: dict[str, RemotePort] = {}
        self.nodes: dict[str, Node] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._events = self._output = Lines(-1, closed=True)
        self._commands = -1
        self._failed_starts, self._start_after_s, self._told_s, self._looked_s = 0, 0.0, 0.0, -EVERY_S
        self._wanted = frozenset[str]()  # models that jobs wait for
        self._behind_at, self._behind, self._passing = WINDOW, frozenset[str](), frozenset[str]()
        self._slots: Sequence[GpuSlot] = ()
        self.joined, self.refused, context.has_cluster = False, "", True

    @property
    def is_up(self) -> bool:
        """Whether the bridge runs."""
        return self._child is not None

    def filenos(self) -> list[int]:
        """Descriptors to wait on."""
        return [lines.fd for lines in (self._events, self._output) if not lines.closed]

    def tick(self, slots: Sequence[GpuSlot]) -> list[GpuSlot]:
        """Hear the bridge, start it again where it ended; the slots with those of the nodes as they are now."""
        self._slots = slots
        if self._child is None and self.now() >= self._start_after_s:
            self._start()
        if self._child is not None:
            self._hear()
            if (status := self._child.poll()) is not None:
                self._hear()
                slots = self._bridge_ended(slots, status)
        if self.now() - self._told_s >= 1.0:
            self._told_s = self.now()
            self._tell(slots)
        return self._follow(slots)

    def _start(self) -> None:
        events_read, events_write = os.pipe()
        commands_read, self._commands = os.pipe()
        for fd in (events_read, self._commands):
            with contextlib.suppress(OSError):  # over the user's pipe limit
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        for fd in (events_read, self._commands):
            os.set_blocking(fd, False)
        flags = ["--events-fd", str(events_write), "--commands-fd", str(commands_read), "--address", self.address]
        flags += ["--outputs", str(self.context.outputs), "--run-id", self.context.run_id]
        environment = {**child_environment(), RUN_ID: self.context.run_id, "PYTHONUNBUFFERED": "1"}
        self._events = Lines(events_read)
        try:
            self._child = spawn_child([*BRIDGE, *flags], environment, (events_write, commands_read))
        except TurbodiffError as error:
            self.context.log.say(str(error), "cluster", level="ERROR")
            self._close()
            return
        finally:
            os.close(events_write)
            os.close(commands_read)
        assert self._child.stdout is not None
        self._output = Lines(self._child.stdout.fileno())
        self.context.log.say(f"joins {self.address}, pid {self._child.pid}", "cluster")

    def order(self, **order: object) -> None:
        """Write one line to the bridge. One that is gone is noticed by `tick`, one that reads no more is ended."""
        data = json.dumps(order).encode() + b"\n"
        try:
            while self._commands >= 0 and data:
                data = data[os.write(self._commands, data) :]
        except OSError as error:
            if isinstance(error, BlockingIOError) and self._child is not None:
                self._child.kill()

    def _hear(self) -> None:
        for line in self._output.read():
            self.context.log.say(line, "cluster")
        for line in self._events.read():
            told = json.loads(line)
            if told["op"] == "joined":
                self.joined, self._failed_starts, self.refused = True, 0, ""
                self.context.log.say("joined", "cluster")
            elif told["op"] == "refused":
                self.refused = told["why"]
                self.context.log.say(f"{self.address} lets us not in: {told['text']}", "cluster", level="ERROR")
            elif told["op"] == "node":
                self._hear_node(told)
            elif (port := self.ports.get(told["port"])) is not None:
                port.hear(told)

    def _hear_node(self, told: Mapping[str, Any]) -> None:
        known = told["node"] in self.nodes
        node = self.nodes.setdefault(told["node"], Node(told["node"]))
        if told["state"] == "lost":
            self.context.log.say(f"node {node.host or node.id[:8]}: lost, {told['why']}", "cluster", level="WARNING")
            self.nodes.pop(node.id)
            return
        before, more = node.state if known else "", ""
        node.state, node.cards = told["state"], told["cards"]
        if node.state == "unfit":
            node.host, more = told["host"], f"; turbodiff does not run there: {told['why']}"
        if node.state == "ok":
            node.heard_s = self.now()
            try:
                node.host, node.host_ooms = told["host"], told["host_ooms"]
                node.machine = Machine.model_validate(told["machine"])
                node.downloads = tuple(NodeDownload.model_validate(one) for one in told.get("downloads", ()))
                if "inventory" in told:
                    node.take_in(Inventory.model_validate_json(told["inventory"]))
            except (KeyError, ValidationError):  # what it says of itself has other fields than here
                node.other_build = ", another build"
            theirs = str(told.get("program", "unknown"))
            node.program = theirs if theirs != program() else theirs + node.other_build if node.other_build else ""
            node.state = "other_version" if node.program else "same_cards" if self._has_same_cards(node) else "ok"
        if node.state != before:
            more = f"; it runs {node.program}, here is {program()}" if node.program else more
            level = "WARNING" if node.state == "unfit" else "INFO"
            self.context.log.say(f"node {node.host or node.id[:8]}: {node.state}{more}", "cluster", level=level)

    def _has_same_cards(self, node: Node) -> bool:
        """Whether the cards that a node sees are no more than this machine's slots and the nodes before it use: a
        machine that joined twice, or this one. Each card would get two workers, each planned for all of it."""
        left = node.uuids - {slot.gpu.uuid for slot in self._slots if not self._is_ours(slot)}
        n_left = len(left)
        for other in self.nodes.values():
            if other is node:
                break
            if other.state in ("ok", "unreachable") and other.uuids & left:
                n_left -= other.cards
        return bool(node.uuids) and n_left < 1

    def _bridge_ended(self, slots: Sequence[GpuSlot], status: int) -> list[GpuSlot]:
        """Put what ran on the cluster back into the queue; this machine's own cards go on."""
        self.context.log.say(f"left: {describe_exit(status)}; it is joined again later", "cluster", level="WARNING")
        wait_s = BACKOFF_S[min(self._failed_starts, len(BACKOFF_S) - 1)]
        self._failed_starts, self._start_after_s = self._failed_starts + 1, self.now() + wait_s
        unfinished = f"*.{self._child.pid}.*" if self._child else ""
        self._close()
        self.nodes.clear()
        kept = [slot for slot in slots if not self._is_ours(slot) or not self._give_back(slot, "the cluster is gone")]
        for part in (self.context.outputs / PARTIAL).glob(unfinished) if unfinished else ():
            part.unlink(missing_ok=True)  # clips on their way that were not whole
        return kept

    def _close(self) -> None:
        if self._commands >= 0:
            os.close(self._commands)
            os.close(self._events.fd)
        if self._child is not None and self._child.stdout is not None:
            self._child.stdout.close()
        self._child, self._commands, self.joined = None, -1, False
        self._events = self._output = Lines(-1, closed=True)

    def _is_ours(self, slot: GpuSlot) -> bool:
        return isinstance(slot.context, NodeContext)

    def _give_back(self, slot: GpuSlot, why: str) -> bool:
        slot.stop(why)
        self.context.store.put(f"worker{slot.index}", None)
        return True

    def _follow(self, slots: Sequence[GpuSlot]) -> list[GpuSlot]:
        """Give back cards of nodes that are gone and cards that are idle; ask for cards while jobs wait."""
        waiting = bool(self.context.store.rows("SELECT 1 FROM job WHERE state = 'queued' LIMIT 1"))
        if self.now() - self._looked_s >= EVERY_S:
            self._looked_s = self.now()
            self._wanted = self._waiting_models()
        kept = [slot for slot in slots if not self._is_ours(slot)]
        taken = dict[str, int]()
        ours = [slot for slot in slots if self._is_ours(slot)]
        for slot in ours:
            if isinstance(slot.worker, RemotePort) and slot.worker.card.isdecimal() and not slot.device:
                slot.device = slot.context.memory.gpu(int(slot.worker.card)).uuid
            gone = slot.context.node not in self.nodes and slot.worker is None
            unused = slot.worker is None and not waiting
            if gone or unused:
                self._give_back(slot, "")
            elif slot.free and not waiting and self.now() - slot.idle_since_s > IDLE_S:
                slot.log("the card goes back to the cluster")
                self._give_back(slot, "idle")
            else:
                taken[slot.context.node] = taken.get(slot.context.node, 0) + 1
                kept.append(slot)
        used = {slot.index for slot in kept}
        for node in self.nodes.values() if waiting else ():
            for _ in range(min(node.cards - taken.get(node.id, 0), self.most_cards - sum(taken.values()))):
                if node.state != "ok" or not self._wanted & node.models:
                    break
                index = next(n for n in range(FIRST_SLOT, FIRST_SLOT + len(used) + 1) if n not in used)
                used.add(index)
                taken[node.id] = taken.get(node.id, 0) + 1
                shared = {one.name: getattr(self.context, one.name) for one in fields(SupervisorContext)}
                shared["memory"] = NodeMemory(node, self)
                kept.append(GpuSlot(NodeContext(**shared, cluster=self, there=node), index))
        return kept

    def _waiting_models(self) -> frozenset[str]:
        """The models that jobs wait for: of the next ones now, of the others as they were when they were looked at."""
        if here := models_of(self.context.store, self._behind_at):
            self._behind_at, self._passing = self._behind_at + WINDOW, self._passing | here
        else:
            self._behind_at, self._behind, self._passing = WINDOW, self._passing, frozenset()
        return models_of(self.context.store, 0) | self._behind | self._passing

    def _tell(self, slots: Sequence[GpuSlot]) -> None:
        """Write down the nodes for the page and the shell, and tell the scouts what our workers hold."""
        ours = [slot for slot in slots if self._is_ours(slot)]
        told = []
        for node in self.nodes.values():
            there = [slot for slot in ours if slot.context.node == node.id]
            pids = [slot.worker.pid for slot in there if slot.worker]
            self.order(op="held", node=node.id, pids=pids, held_bytes={slot.device: slot.held_bytes for slot in there})
            told.append(node.facts([(slot.device, slot.job.id if slot.job else None) for slot in there]))
            self._fetch(node)
        known = {"address": self.address, "downloads": self.downloads, "joined": self.joined, "refused": self.refused}
        facts = ClusterFacts(**known, nodes=tuple(told))
        self.context.store.put(CLUSTER, facts.model_dump(mode="json"), durable=False)

    def _fetch(self, node: Node) -> None:
        """Have a node download the weights that jobs wait for and it has not, where a person let it."""
        if not self.downloads or node.state != "ok":
            return
        failed = {one.model for one in node.downloads if one.state == "failed"}
        for model in self._wanted - node.models:
            asked_s = node.asked_s.get(model)
            if asked_s is None or (model in failed and self.now() - asked_s > AGAIN_S):
                node.asked_s[model] = self.now()
                self.context.log.say(f"node {node.host}: downloads {model}", "cluster")
                self.order(op="fetch", node=node.id, model=model)

    def stop(self, patience_s: float = 1.0) -> None:
        """Leave the cluster: all our actors end with the bridge."""
        if self._child is None:
            return
        self._child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(patience_s)
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._close()
        self.context.store.put(CLUSTER, None)


def models_of(store: Store, at: int) -> frozenset[str]:
    """The models of a windowful of waiting jobs, from the one at that place of the queue on; empty behind its end."""
    rows = store.rows("SELECT request FROM job WHERE state = 'queued' ORDER BY place, id LIMIT ? OFFSET ?", WINDOW, at)
    asked = [parsed(row["request"]) for row in rows]
    return frozenset(str(fields.get("model")) for fields in asked if isinstance(fields, dict))


def supervisor_with(state: Path, outputs: Path, used: UsedCards) -> Supervisor:
    """A supervisor of this machine's cards, of a cluster's, or of both. Raises: see `Supervisor`."""
    cluster = (
        partial(Cluster, address=used.cluster, most_cards=used.most, downloads=used.downloads) if used.cluster else None
    )
    return Supervisor(state, outputs, devices=None if used.local else (), cluster=cluster)
