"""Is the worker stuck? Progress first, then evidence; a pure clockwork that never reads a clock itself.

A silent stage says so once after 10 s, with the reason that the evidence points at. A stage beyond its deadline is
called slow at 1x, dumps its stacks at 1.5x and is ended at 2x. Loading has no deadline while bytes still arrive.
Deadlines are learned: at least a minute, else 8x the median step and 6x the median phase of earlier runs. What was
measured on stand-ins: a native call that holds the GIL sends no heartbeat yet dumps its stacks and dies on SIGTERM.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from turbodiff.spec.events import Event
from turbodiff.spec.numbers import gib

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


@dataclass(frozen=True)
class Evidence:
    """What can be seen of a worker from outside; None is unknown."""

    bytes_read: int = 0
    cpu_s: float = 0.0
    state: str = "S"  # of proc(5)
    ram_available_bytes: int | None = None
    vram_free_bytes: int | None = None
    utilisation: float | None = None
    power_w: float | None = None
    output_lines: int = 0


@dataclass
class Watch:
    """Watches one attempt. Feed it every event and, about once a second, a look at the evidence."""

    started_s: float
    history: Mapping[str, float] = field(default_factory=dict)  # phase -> median seconds of earlier runs
    phase: str = ""
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    steps: int = 0

    def __post_init__(self) -> None:
        self._progress_s = self._looked_s = self.beat_s = self.started_s
        self._said: Verdict = "ok"
        self._quiet_said = False
        self._last = self._first = Evidence()
        self._fresh = True
        self._power_w: deque[float] = deque(maxlen=600)

    def heard(self, event: Event, now_s: float) -> None:
        """Note an event of the attempt."""
        if event.type == "beat":
            self.beat_s = now_s
            return
        if event.type == "phase":
            self.phase, self.steps = event.name, 0
        if event.type == "step":
            self.steps += 1
            self.step_s.append(event.dt_s)
        self._moved(now_s)

    def _moved(self, now_s: float) -> None:
        self._progress_s, self._said, self._fresh = now_s, "ok", True
        self._quiet_said = False

    def deadline_s(self) -> float:
        """Seconds without progress after which this stage is called slow."""
        if self.phase.startswith("denoise"):
            if not self.steps:
                return FIRST_STEP_S
            return max(STEP_MIN_S, STEP_TIMES * median(self.step_s))
        if not self.phase:
            return LOAD_S
        usual = self.history.get(self.phase)
        return COLD_PHASE_S if usual is None else max(PHASE_MIN_S, PHASE_TIMES * usual)

    def look(self, now_s: float, evidence: Evidence) -> Verdict:
        """The verdict now, each one handed out once per silence."""
        if now_s - self._looked_s > JUMP_S:  # sleep, or a stopped supervisor: nobody was watching
            self._progress_s = now_s
        self._looked_s = now_s
        arriving = evidence.bytes_read > self._last.bytes_read + ARRIVING_BYTES
        arriving = arriving or evidence.output_lines > self._last.output_lines
        if self._fresh:
            self._first, self._fresh = evidence, False
        if evidence.power_w is not None:
            self._power_w.append(evidence.power_w)
        self._last = evidence
        silent_s = now_s - self._progress_s
        if arriving and silent_s > QUIET_S and self._quiet_said:
            self._progress_s = now_s - QUIET_S  # bytes still arrive: slow disk, not stuck
        return self._new(silent_s / self.deadline_s(), silent_s)

    def _new(self, share: float, silent_s: float) -> Verdict:
        order: list[Verdict] = ["ok", "slow", "dump", "end"]
        reached = order[(share >= 1) + (share >= 1.5) + (share >= 2)]
        if reached == "ok" and silent_s > QUIET_S and not self._quiet_said:
            self._quiet_said = True
            return "quiet"
        if reached == "ok" and self.cold_and_busy() and self._said == "ok" and silent_s > QUIET_S:
            reached = "slow"
        if order.index(reached) > order.index(self._said):
            self._said = order[order.index(self._said) + 1]  # one stage a look: a dump comes before the end
            return self._said
        return "ok"

    def cold_and_busy(self) -> bool:
        """The GPU says 100 % and draws little power: it waits for memory over the bus, or spins."""
        if self._last.utilisation is None or self._last.power_w is None or len(self._power_w) < 30:
            return False
        return self._last.utilisation > 0.95 and self._last.power_w < COLD_POWER * max(self._power_w)

    def why(self) -> str:
        """What the evidence says about the silence, in one line."""
        now, first = self._last, self._first
        silent_s = self._looked_s - self._progress_s
        said = f"{self.phase or 'loading'} silent for {silent_s:.0f} s: "
        if now.state == "T":
            return said + "the worker is stopped (SIGSTOP); kill -CONT lets it go on"
        if now.state == "D":
            return said + "the worker waits in the kernel (disk or driver)"
        read_bytes, busy = now.bytes_read - first.bytes_read, now.cpu_s > first.cpu_s + 0.5 * silent_s
        if read_bytes > DISK_BYTES_S * silent_s or (read_bytes > (1 << 20) and not busy):
            return said + f"bytes still rising, {gib(read_bytes)} read meanwhile: a slow disk"
        if now.ram_available_bytes is not None and now.ram_available_bytes < LOW_RAM_BYTES:
            return said + f"RAM low, {gib(now.ram_available_bytes)} left: the computer swaps"
        if now.vram_free_bytes is not None and now.vram_free_bytes < CAP_BYTES:
            return said + f"VRAM at the cap, {gib(now.vram_free_bytes)} free"
        if self.cold_and_busy():
            return said + "the GPU says it is busy but draws little power: it waits for memory"
        if busy:
            cold = now.utilisation is not None and now.utilisation < IDLE_GPU
            return said + ("CPU busy while the GPU is idle, no progress" if cold else "CPU busy, no progress")
        return said + "nothing moves"
