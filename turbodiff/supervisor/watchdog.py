"""One attempt watched from outside: is the worker stuck, and is its plan still good? Neither ever reads a clock.

Watchdog: progress first, then evidence. A silent stage says so once after 10 s, with the reason that the evidence
points at. A stage beyond its deadline is called slow at 1x, dumps its stacks at 1.5x and is ended at 2x. Loading has no
deadline while bytes still arrive. Deadlines are learned: at least a minute, else 8x the median step and 6x the median
phase of earlier runs. Measured on stand-ins: a native call that holds the GIL sends no heartbeat yet dumps its stacks
and dies on SIGTERM.

RunMonitor: the memory beside a running job, and the speed of its steps; it says what it sees once. It stops no job:
torch's allocator ends at the budget, and the worker checks its plan before each phase. A notice tells a person why a
job became slow, or may end, before it does.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import psutil

from turbodiff.jobs.retry_policy import NEIGHBOUR_BYTES
from turbodiff.spec.events import Event, Notice
from turbodiff.spec.numbers import gib, seconds
from turbodiff.spec.plan import Plan
from turbodiff.supervisor.ports import Evidence

Verdict = Literal["ok", "quiet", "slow", "dump", "end"]

QUIET_S = 10.0  # the guide's ten seconds
LOAD_S = 300.0  # no new bytes for this long (Ollama's rule)
FIRST_STEP_S = 600.0  # kernels may compile
STEP_MIN_S, STEP_TIMES = 60.0, 8.0
PHASE_MIN_S, PHASE_TIMES = 60.0, 6.0
COLD_PHASE_S = 600.0  # a phase that never ran here before
JUMP_S = 30.0  # between two looks: the computer slept, or we were stopped
IDLE_GPU = 0.05  # of its time
COLD_POWER = 0.35  # of the job's usual power at full utilisation: spilled or spinning
ARRIVING_BYTES = 64 << 10  # between two looks; a heartbeat's own reads are far below
DISK_BYTES_S = 10 << 20  # reading this fast explains a silence even while the CPU works
LOW_RAM_BYTES = 1 << 30
CAP_BYTES = 512 << 20
AGAIN_S = 120.0  # the same notice of one attempt
FAR = 3.0  # times the expected seconds of a step
SLOWED = 2.0  # times the fastest step of this attempt: with a full card, memory spills into the computer's


@dataclass
class Watchdog:
    """Watches one attempt. Feed it every event and, about once a second, the evidence."""

    started_s: float
    history: Mapping[str, float] = field(default_factory=dict)  # phase -> median seconds of earlier runs
    phase: str = ""
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    steps: int = 0

    def __post_init__(self) -> None:
        self._progress_s = self._checked_s = self.started_s
        self._reported: Verdict = "ok"
        self._quiet_reported = False
        self._last = self._first = Evidence()
        self._fresh = True
        self._power_w: deque[float] = deque(maxlen=600)

    def on_event(self, event: Event, now_s: float) -> None:
        """Note an event of the attempt; a heartbeat alone is no progress."""
        if event.type == "beat":
            return
        if event.type == "phase":
            self.phase, self.steps = event.name, 0
        if event.type == "step":
            self.steps += 1
            self.step_s.append(event.dt_s)
        self._progress_s, self._reported, self._fresh, self._quiet_reported = now_s, "ok", True, False

    def deadline_s(self) -> float:
        """Seconds without progress after which this stage is called slow."""
        if self.phase.startswith("denoise"):
            return max(STEP_MIN_S, STEP_TIMES * median(self.step_s)) if self.steps else FIRST_STEP_S
        if not self.phase:
            return LOAD_S
        usual = self.history.get(self.phase)
        return COLD_PHASE_S if usual is None else max(PHASE_MIN_S, PHASE_TIMES * usual)

    def check(self, now_s: float, evidence: Evidence) -> Verdict:
        """The verdict now, each one handed out once per silence."""
        if now_s - self._checked_s > JUMP_S:  # sleep, or a stopped supervisor: nobody was watching
            self._progress_s = now_s
        self._checked_s = now_s
        arriving = evidence.bytes_read > self._last.bytes_read + ARRIVING_BYTES
        arriving = arriving or evidence.output_lines > self._last.output_lines
        if self._fresh:
            self._first, self._fresh = evidence, False
        if evidence.power_w is not None:
            self._power_w.append(evidence.power_w)
        self._last = evidence
        silent_s = now_s - self._progress_s
        if arriving and silent_s > QUIET_S and self._quiet_reported:
            self._progress_s = now_s - QUIET_S  # bytes still arrive: slow disk, not stuck
        share = silent_s / self.deadline_s()
        order: list[Verdict] = ["ok", "slow", "dump", "end"]
        reached = order[(share >= 1) + (share >= 1.5) + (share >= 2)]
        if reached == "ok" and silent_s > QUIET_S and not self._quiet_reported:
            self._quiet_reported = True
            return "quiet"
        if reached == "ok" and self.cold_and_busy() and self._reported == "ok" and silent_s > QUIET_S:
            reached = "slow"
        if order.index(reached) > order.index(self._reported):
            self._reported = order[order.index(self._reported) + 1]  # one stage a check: a dump comes before the end
            return self._reported
        return "ok"

    def cold_and_busy(self) -> bool:
        """The GPU says 100 % and draws little power: it waits for memory over the bus, or spins."""
        if self._last.utilisation is None or self._last.power_w is None or len(self._power_w) < 30:
            return False
        return self._last.utilisation > 0.95 and self._last.power_w < COLD_POWER * max(self._power_w)

    def reason(self) -> str:
        """What the evidence says about the silence, in one line of English for the logs."""
        notice = self.silence()
        return notice.text

    def silence(self) -> Notice:
        """What the evidence says about the silence, as a notice: phase, seconds, and the key of its cause."""
        now, first = self._last, self._first
        silent_s = self._checked_s - self._progress_s
        read_bytes, busy = now.bytes_read - first.bytes_read, now.cpu_s > first.cpu_s + 0.5 * silent_s
        cause, said = "nothing_moves", "nothing moves"
        if now.state == psutil.STATUS_STOPPED:
            cause, said = "stopped", "the worker is stopped (SIGSTOP); kill -CONT lets it go on"
        elif now.state == psutil.STATUS_DISK_SLEEP:
            cause, said = "kernel", "the worker waits in the kernel (disk or driver)"
        elif read_bytes > DISK_BYTES_S * silent_s or (read_bytes > (1 << 20) and not busy):
            cause, said = "slow_disk", f"bytes still rising, {gib(read_bytes)} read meanwhile: a slow disk"
        elif now.ram_available_bytes is not None and now.ram_available_bytes < LOW_RAM_BYTES:
            cause, said = "host_ram_low", f"RAM low, {gib(now.ram_available_bytes)} left: the computer swaps"
        elif now.vram_free_bytes is not None and now.vram_free_bytes < CAP_BYTES:
            cause, said = "card_full", f"VRAM at the cap, {gib(now.vram_free_bytes)} free"
        elif self.cold_and_busy():
            cause, said = "cold", "the GPU says it is busy but draws little power: it waits for memory"
        elif busy:
            idle = now.utilisation is not None and now.utilisation < IDLE_GPU
            cause = "gpu_idle" if idle else "computing"
            said = "CPU busy while the GPU is idle, no progress" if idle else "CPU busy, no progress"
        text = f"{self.phase or 'loading'} silent for {silent_s:.0f} s: {said}"
        return Notice(
            key="silent", text=text, numbers={"phase": self.phase or "load", "silent_s": silent_s, "cause": cause}
        )


@dataclass
class RunMonitor:
    """Watches one attempt. Feed it every event and, about once a second, the evidence.

    Args:
        others_bytes: what other programs held when the attempt began.
        step_s: phase -> seconds that one of its steps should take; {} where nobody knows.
    """

    others_bytes: int | None = None
    step_s: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None  # most that the driver showed for our worker in this phase

    def __post_init__(self) -> None:
        self._phase, self._steps = "", 0
        self._last_s: float | None = None
        self._fastest_s = float("inf")
        self._reported_s: dict[str, float] = {}

    def on_event(self, event: Event) -> None:
        """Note an event of the attempt."""
        if event.type == "phase" and event.state == "start":
            self._phase, self._steps, self._last_s = event.name, 0, None
            self._fastest_s, self.peak_bytes = float("inf"), None
        elif event.type == "step":
            self._steps += 1
            if self._steps > 1:  # kernels may compile in the first
                self._last_s = event.dt_s
                self._fastest_s = min(self._fastest_s, self._last_s)

    def check(self, now_s: float, seen: Evidence, cold: bool = False) -> list[Notice]:
        """The notices that are new; `cold`: the GPU says 100 % and draws little power."""
        if seen.own_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, seen.own_bytes)
        found = []
        free, ram, took_s, fastest_s = seen.vram_free_bytes, seen.ram_available_bytes, self._last_s, self._fastest_s
        if free is not None and free < CAP_BYTES and took_s is not None and took_s > SLOWED * fastest_s:
            text = f"the card is full and a step took {seconds(took_s)} instead of {seconds(fastest_s)}: "
            text += "memory spills into the computer's RAM"
            numbers = {"free_bytes": free, "step_s": took_s, "fastest_s": fastest_s}
            found.append(Notice(key="spill", text=text, numbers=numbers))
        known = seen.others_bytes is not None and self.others_bytes is not None
        grew = (seen.others_bytes or 0) - (self.others_bytes or 0) if known else 0
        if grew > NEIGHBOUR_BYTES:
            text = f"another program took {gib(grew)} of the card meanwhile"
            found.append(Notice(key="neighbour_grew", text=text, numbers={"grew_bytes": grew, "free_bytes": free}))
        if ram is not None and ram < LOW_RAM_BYTES:
            text = f"only {gib(ram)} of RAM is left"
            found.append(Notice(key="host_ram_low", text=text, numbers={"available_bytes": ram}))
        expected_s = self.step_s.get(self._phase)
        if expected_s is not None and took_s is not None and took_s > FAR * expected_s:
            cause = found[0].key if found else "cold" if cold else "unknown"
            text = f"a step took {seconds(took_s)}, {seconds(expected_s)} were expected; cause: {cause}"
            slow = {"step_s": took_s, "expected_s": expected_s, "cause": cause}
            found.append(Notice(key="slow_step", text=text, numbers=slow))
        fresh = [notice for notice in found if now_s - self._reported_s.get(notice.key, -AGAIN_S) >= AGAIN_S]
        self._reported_s |= {notice.key: now_s for notice in fresh}
        return fresh


def expected_steps_s(plan: Plan | None, usual_s: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one step per phase that has steps: as earlier runs took, else as the plan of a GPU says."""
    if plan is None:
        return {}
    planned: dict[str, float] = {phase.name: phase.seconds for phase in plan.phases if plan.device.startswith("cuda")}
    steps = Counter(expert.phase for expert in plan.request.experts)
    known: dict[str, float] = {**planned, **usual_s}
    return {name: known[name] / count for name, count in steps.items() if name in known}
