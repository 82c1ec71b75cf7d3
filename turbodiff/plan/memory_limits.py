"""What a job may use of the device and of host memory, and which of several ways to run a phase is the best there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from turbodiff.plan.phase_costs import PhaseCost

NO_LIMIT_BYTES = 1 << 60
NEARLY = 1.02  # times the fastest: that much time is worth the ease of a smaller peak
FITS_SHARE = 0.9  # of the budget; a plan between this and all of it is "tight"
Option: TypeAlias = "tuple[dict[str, str | int], tuple[PhaseCost, ...]]"  # levers, and the phases that they are for


class MemoryLimits(NamedTuple):
    """What a job may use: bytes on the device, and of host memory (None: unknown, not limited); `one_pool` where both
    are the same memory."""

    device: int
    host: int | None
    one_pool: bool = False

    def in_host(self, cost: "PhaseCost") -> int:
        """Bytes of host memory that a phase takes."""
        return cost.host_ram_bytes + (cost.peak_bytes if self.one_pool else 0)

    def on_device(self, cost: "PhaseCost") -> int:
        """Bytes of the device's memory that a phase takes."""
        return cost.peak_bytes + (cost.host_ram_bytes if self.one_pool else 0)

    def short(self, cost: "PhaseCost") -> int:
        """Bytes by which a phase does not fit, on the device or in host memory; <= 0 when it does."""
        on_device = cost.peak_bytes - self.device
        return on_device if self.host is None else max(on_device, self.in_host(cost) - self.host)


def rate(phases: Sequence["PhaseCost"], limits: MemoryLimits) -> tuple[int, int, float]:
    """(bytes by which the worst phase does not fit, largest peak, seconds) of some phases."""
    peak = host = 0
    seconds = 0.0
    for cost in phases:  # no comprehensions: a keystroke comes here hundreds of times
        peak = cost.peak_bytes if cost.peak_bytes > peak else peak
        taken = cost.host_ram_bytes + cost.peak_bytes if limits.one_pool else cost.host_ram_bytes
        host = taken if taken > host else host
        seconds += cost.seconds
    short = peak - limits.device
    if limits.host is not None and host - limits.host > short:
        short = host - limits.host
    return short, peak, seconds


def best_of(options: Sequence[Option], limits: MemoryLimits) -> Option:
    """The fastest option that fits; one that is nearly as fast and fits with ease goes before it.

    Where none fits, the one that is short by the least.
    """
    rated = [(*rate(phases, limits), number) for number, (_, phases) in enumerate(options)]
    fitting = [row for row in rated if row[0] <= 0]
    if not fitting:
        return options[min([(short, number) for short, _, _, number in rated])[1]]
    limit_s = NEARLY * min([seconds for _, _, seconds, _ in fitting])
    easy_bytes = FITS_SHARE * limits.device
    fast = [(peak > easy_bytes, seconds, number) for _, peak, seconds, number in fitting if seconds <= limit_s]
    return options[min(fast)[2]]
