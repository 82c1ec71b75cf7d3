"""Is the plan still good? Watches the memory beside a running job, and the speed of its steps; says what it sees once.

Nothing here stops a job: torch's allocator ends at the budget, and the worker checks its plan before each phase. A
notice tells a person why a job became slow, or may end, before it does. Pure: it never reads a clock itself.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from turbodiff.jobs.retry_policy import NEIGHBOUR_BYTES
from turbodiff.spec.events import Event, Notice
from turbodiff.spec.numbers import gib, seconds
from turbodiff.spec.plan import Plan
from turbodiff.supervisor.watchdog import CAP_BYTES, LOW_RAM_BYTES

AGAIN_S = 120.0  # the same notice of one attempt
FAR = 3.0  # times the expected seconds of a step
SLOWED = 2.0  # times the fastest step of this attempt: with a full card, memory spills into the computer's


@dataclass(frozen=True)
class Seen:
    """What the probe and the system say now; None is unknown."""

    others_bytes: int | None = None  # of the card, held by other programs
    own_bytes: int | None = None  # of the card, held by our worker
    free_bytes: int | None = None
    ram_available_bytes: int | None = None
    cold: bool = False  # the GPU says 100 % and draws little power


@dataclass
class Guard:
    """Watches one attempt. Feed it every event and, about once a second, a look.

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
        self._said_s: dict[str, float] = {}

    def heard(self, event: Event) -> None:
        """Note an event of the attempt."""
        if event.type == "phase" and event.state == "start":
            self._phase, self._steps, self._last_s = event.name, 0, None
            self._fastest_s, self.peak_bytes = float("inf"), None
        elif event.type == "step":
            self._steps += 1
            if self._steps > 1:  # kernels may compile in the first
                self._last_s = event.dt_s
                self._fastest_s = min(self._fastest_s, self._last_s)

    def look(self, now_s: float, seen: Seen) -> list[Notice]:
        """The notices that are new."""
        if seen.own_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, seen.own_bytes)
        fresh = []
        for notice in self._causes(seen):
            if now_s - self._said_s.get(notice.key, -AGAIN_S) >= AGAIN_S:
                self._said_s[notice.key] = now_s
                fresh.append(notice)
        return fresh

    def _causes(self, seen: Seen) -> Iterator[Notice]:
        """What is wrong now."""
        causes = list(self._memory(seen))
        slow = self._far_over_plan()
        if slow is not None:
            took_s, expected_s = slow
            cause = causes[0].key if causes else "cold" if seen.cold else "unknown"
            text = f"a step took {seconds(took_s)}, {seconds(expected_s)} were expected; cause: {cause}"
            numbers = {"step_s": took_s, "expected_s": expected_s, "cause": cause}
            causes.append(Notice(key="slow_step", text=text, numbers=numbers))
        yield from causes

    def _memory(self, seen: Seen) -> Iterator[Notice]:
        full = seen.free_bytes is not None and seen.free_bytes < CAP_BYTES
        if full and self._last_s is not None and self._last_s > SLOWED * self._fastest_s:
            numbers = {"free_bytes": seen.free_bytes, "step_s": self._last_s, "fastest_s": self._fastest_s}
            text = f"the card is full and a step took {seconds(self._last_s)} instead of {seconds(self._fastest_s)}: "
            yield Notice(key="spill", text=text + "memory spills into the computer's RAM", numbers=numbers)
        grew = seen.others_bytes - self.others_bytes if None not in (seen.others_bytes, self.others_bytes) else 0  # type: ignore[operator]
        if grew > NEIGHBOUR_BYTES:
            text = f"another program took {gib(grew)} of the card meanwhile"
            numbers = {"grew_bytes": grew, "free_bytes": seen.free_bytes}
            yield Notice(key="neighbour_grew", text=text, numbers=numbers)
        ram = seen.ram_available_bytes
        if ram is not None and ram < LOW_RAM_BYTES:
            text = f"only {gib(ram)} of RAM is left"
            yield Notice(key="host_ram_low", text=text, numbers={"available_bytes": ram})

    def _far_over_plan(self) -> tuple[float, float] | None:
        """(seconds of the last step, expected seconds) where the one is far over the other."""
        expected_s = self.step_s.get(self._phase)
        if expected_s is None or self._last_s is None or self._last_s <= FAR * expected_s:
            return None
        return self._last_s, expected_s


def expected_steps_s(plan: Plan | None, usual_s: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one step per phase that has steps: as earlier runs took, else as the plan of a GPU says."""
    if plan is None:
        return {}
    planned: dict[str, float] = {phase.name: phase.seconds for phase in plan.phases if plan.device.startswith("cuda")}
    steps = Counter(expert.phase for expert in plan.request.experts)
    known: dict[str, float] = {**planned, **usual_s}
    return {name: known[name] / count for name, count in steps.items() if name in known}
