"""What the newest probe sample and the kernel say about memory; None is unknown and never read as 0 or as free."""

from collections.abc import Callable, Collection
from pathlib import Path

import psutil

from turbodiff.gpu.probe import Sample, machine_from
from turbodiff.jobs.store import Store
from turbodiff.plan.hardware import GpuFacts, Machine

CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")
VMSTAT = Path("/proc/vmstat")
STALE_S = 10.0


def sample_of(store: Store) -> Sample | None:
    """The supervisor's newest probe sample as another process sees it, None if there is none younger than 10 s."""
    fact, age_s = store.fact("probe"), store.fact_age_s("probe")
    if not fact or age_s is None or age_s > STALE_S:
        return None
    return Sample(**{**fact, "cards": tuple(fact["cards"]), "age_s": fact["age_s"] + age_s})


def machine_of(store: Store) -> Machine | None:
    """The machine by the supervisor's probe, our workers' memory counted as ours; None without a running supervisor.

    Takes no NVML call of its own: only the probe does.
    """
    sample = sample_of(store)
    if sample is None:
        return None
    return machine_from(sample, worker_pids(store))


def worker_pids(store: Store) -> frozenset[int]:
    """Our workers, as the supervisor wrote them down."""
    facts = store.rows("SELECT name FROM fact WHERE name LIKE 'worker%'")
    pids = {(store.fact(row["name"]) or {}).get("pid") for row in facts}
    return frozenset(pid for pid in pids if pid)


class Memory:
    """Numbers about cards and RAM, from a sample that somebody else takes.

    Args:
        sample: the newest probe sample, never blocking; None where there is no probe.
        own_pids: our workers, whose memory is ours.
    """

    def __init__(
        self, sample: Callable[[], Sample | None] = lambda: None, own_pids: Callable[[], Collection[int]] = lambda: ()
    ) -> None:
        self._sample, self._own_pids = sample, own_pids
        self._known: tuple[object, frozenset[int], Machine] | None = None

    def gpu(self, index: int) -> GpuFacts | None:
        """The card of a slot, or None: no card, no probe, or a sample older than 10 s."""
        machine = self.machine()
        return machine.gpus[index] if machine and index < len(machine.gpus) else None

    def machine(self) -> Machine | None:
        """The whole machine, our workers' memory counted as ours."""
        sample = self._sample()
        if sample is None or sample.age_s > STALE_S:
            return None
        pids = frozenset(self._own_pids())
        if self._known is None or self._known[0] is not sample.cards or self._known[1] != pids:
            self._known = sample.cards, pids, machine_from(sample, pids)
        return self._known[2]

    def free_bytes(self, index: int) -> int | None:
        """Device memory that a job could have: free, and what our own worker holds."""
        gpu = self.gpu(index)
        return None if gpu is None or gpu.free_bytes is None else gpu.free_bytes + gpu.reclaimable_bytes

    def own_bytes(self, index: int) -> int | None:
        """Device memory that our worker holds as the driver sees it, its CUDA context included; None where unseen."""
        gpu = self.gpu(index)
        return None if gpu is None else gpu.reclaimable_bytes or None

    def others_bytes(self, index: int) -> int | None:
        """Device memory that other programs hold."""
        gpu = self.gpu(index)
        return None if gpu is None or gpu.used_bytes is None else max(0, gpu.used_bytes - gpu.reclaimable_bytes)

    def card(self, index: int) -> tuple[int | None, float | None, float | None]:
        """Free bytes, utilisation 0..1 and watts of the card."""
        gpu = self.gpu(index)
        return (None, None, None) if gpu is None else (gpu.free_bytes, gpu.utilisation, gpu.power_w)

    def ram_available_bytes(self) -> int:
        """RAM that can be had without swapping."""
        return int(psutil.virtual_memory().available)

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
