"""What every part of the supervisor shares: store, logs, folders, and what is known about memory.

None is unknown and never read as 0 or as free.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from turbodiff.diagnostics.logs import LogFile
from turbodiff.gpu.host_memory import host_memory, private_bytes
from turbodiff.gpu.probe import Sample, machine_from
from turbodiff.jobs.nodes import whole_models
from turbodiff.jobs.rows import parsed
from turbodiff.jobs.store import Store
from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.spec.cached import CachedValue
from turbodiff.spec.models import Inventory
from turbodiff.supervisor.ports import LocalPort, Port
from turbodiff.supervisor.worker_process import WORKER
from turbodiff.weights.locate import inventory

CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")
VMSTAT = Path("/proc/vmstat")
OF_MACHINE = "name = 'probe' OR name LIKE 'worker%'"  # rows of the table of facts
STALE_S = 10.0
ASK_WORKERS_S, READ_RAM_S = 1.0, 0.5
WEIGHTS_FRESH_S = 5.0


def machine_of(store: Store) -> Machine | None:
    """The machine by the supervisor's newest probe sample as another process sees it, our workers' memory counted as
    ours; None without a sample younger than 10 s. Takes no NVML call of its own: only the probe does.
    """
    found = {row["name"]: row for row in store.rows(f"SELECT name, value, at_s FROM fact WHERE {OF_MACHINE}")}
    probe = found.pop("probe", None)
    if probe is None or max(0.0, store.now() - probe["at_s"]) > STALE_S:
        return None
    return _machine_behind(probe["value"], probe["at_s"], tuple([row["value"] for row in found.values()]))


@lru_cache(4)
def _machine_behind(probe: str, at_s: float, workers: tuple[str, ...]) -> Machine | None:
    """The machine by these facts of a store. It is worked out once for each sample, with the RAM as it is then."""
    try:
        sample = Sample.model_validate_json(probe)
    except ValueError:  # a damaged row, or none yet; the next second has another
        return None
    told = [fact for text in workers if isinstance(fact := parsed(text), dict) and not fact.get("node")]
    held = {worker.get("card") or "": worker.get("held_bytes") or 0 for worker in told}
    machine = machine_from(sample, _pids_of(told), held)
    if len(told) < 2:
        return machine
    own = {worker.get("card"): private_bytes(worker["pid"]) for worker in told if worker.get("pid")}
    gpus = [gpu.model_copy(update={"worker_ram_bytes": own.get(gpu.uuid, 0)}) for gpu in machine.gpus]
    return machine.model_copy(update={"gpus": tuple(gpus)})


def worker_pids(store: Store) -> frozenset[int]:
    """Our workers on this machine, as the supervisor wrote them down."""
    return _pids_of(_workers(store))


def _workers(store: Store) -> list[dict[str, Any]]:
    facts = [parsed(row["value"]) for row in store.rows("SELECT value FROM fact WHERE name LIKE 'worker%'")]
    return [fact for fact in facts if isinstance(fact, dict) and not fact.get("node")]


def _pids_of(workers: list[dict[str, Any]]) -> frozenset[int]:
    return frozenset(pid for one in workers for pid in (one.get("pid"), *one.get("followers", ())) if pid)


class Memory:
    """The machine and its cards, from a sample that somebody else takes.

    Args:
        sample: the newest probe sample, never blocking; None where there is no probe.
        own_pids: our workers, whose memory is ours.
        told_bytes: what they say that they hold, by the UUID of the card ("": the first one).
    """

    def __init__(
        self,
        sample: Callable[[], Sample | None] = lambda: None,
        own_pids: Callable[[], Collection[int]] = lambda: (),
        told_bytes: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._sample, self._own_pids, self._told_bytes = sample, own_pids, told_bytes
        self._known: tuple[object, float, frozenset[int], Mapping[str, int], Machine] | None = None
        self._asked_s, self._read_s, self._ram_bytes = -ASK_WORKERS_S, -READ_RAM_S, 0

    def machine(self) -> Machine | None:
        """The whole machine; None without a probe or with a sample older than 10 s. Our workers are asked anew for each
        sample, once a second, and after `workers_changed`: 32 slots ask this a hundred times a turn."""
        sample = self._sample()
        if sample is None or sample.age_s > STALE_S:
            return None
        known, now_s = self._known, time.monotonic()
        # two samples without a card share one empty tuple: the time tells them apart
        is_same_sample = known is not None and known[0] is sample.cards and known[1] == sample.taken_s
        if known is None or not is_same_sample or now_s - self._asked_s >= ASK_WORKERS_S:
            pids, told = frozenset(self._own_pids()), self._told_bytes()
            self._asked_s = now_s
            if known is None or not is_same_sample or known[2:4] != (pids, told):
                known = self._known = sample.cards, sample.taken_s, pids, told, machine_from(sample, pids, told)
        return known[4]

    def workers_changed(self) -> None:
        """Ask for our workers again: one was started, has ended, or holds another amount."""
        self._asked_s = -ASK_WORKERS_S

    def place(self, slot: int, device: str) -> int:
        """Where the card of a slot stands in the machine now, behind the last one where it is gone. A slot without a
        UUID has the card of its own number."""
        machine = self.machine()
        if machine is None or not device.startswith(("GPU-", "MIG-")):
            return slot
        return next((at for at, gpu in enumerate(machine.gpus) if gpu.uuid == device), len(machine.gpus))

    def gpu(self, index: int) -> GpuFacts:
        """The card at that place; one of which nothing is known where it cannot be seen."""
        machine = self.machine()
        return machine.gpus[index] if machine and index < len(machine.gpus) else GpuFacts(index=index)

    def others_bytes(self, index: int) -> int | None:
        """Device memory that other programs hold."""
        gpu = self.gpu(index)
        return None if gpu.used_bytes is None else max(0, gpu.used_bytes - gpu.reclaimable_bytes)

    def ram_available_bytes(self) -> int | None:
        """RAM that can be had now, read at most twice a second: 32 slots ask once a second each."""
        now_s = time.monotonic()
        if now_s - self._read_s >= READ_RAM_S:
            self._read_s, self._ram_bytes = now_s, host_memory().available_bytes
        return self._ram_bytes

    def host_ooms(self) -> int:
        """How often the kernel has ended a process for want of RAM, in our cgroup, else on this machine."""
        for path in (CGROUP_EVENTS, VMSTAT):
            try:
                counters = dict(line.split() for line in path.read_text().splitlines())
            except (OSError, ValueError):
                continue
            if "oom_kill" in counters:
                return int(counters["oom_kill"])
        return 0


@dataclass
class SupervisorContext:
    """What the slots of one machine share."""

    store: Store
    log: LogFile
    run_log: LogFile
    state: Path
    outputs: Path
    run_id: str
    memory: Memory
    worker_argv: Sequence[str] = WORKER
    now: Callable[[], float] = time.monotonic
    promised_bytes: Callable[[int], int] = lambda slot: 0  # RAM that the jobs on the other slots will still take
    has_cluster: bool = False  # other machines work for the queue
    whole_models: Callable[[], frozenset[str]] = field(
        default_factory=lambda: CachedValue(lambda: whole_models(inventory()), WEIGHTS_FRESH_S)
    )  # those that this machine has every file of

    @property
    def node(self) -> str:
        """The machine's id in a cluster, "" for this one."""
        return ""

    @property
    def host(self) -> str:
        """The machine's name in a cluster, "" for this one."""
        return ""

    @property
    def inventory(self) -> Inventory:
        """The weights that this machine has."""
        return inventory()

    def has_weights(self, model: str) -> bool:
        """Whether a model may run there. On this machine a job with missing weights says so itself; beside others that
        work for the queue it waits for one that has them."""
        return not self.has_cluster or model in self.whole_models()

    def open_port(self, slot: int, device: str) -> Port:
        """Start a worker for a slot on its card.

        Raises:
            TurbodiffError, OSError: it cannot be started.
        """
        machine = self.memory.machine()
        allocator = machine.allocator if machine else None
        return LocalPort(
            self.worker_argv, self.run_id, device, allocator, slot=slot, state=self.state, outputs=self.outputs
        )
