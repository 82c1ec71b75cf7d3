"""A scripted card: what the probe would say about one GPU, with our worker and a neighbour on it."""

from collections.abc import Callable
from dataclasses import dataclass

from turbodiff.gpu.probe import CardSample, GpuProcess, Sample
from turbodiff.gpu.process_identity import start_ticks

GIB = 1 << 30


@dataclass
class Card:
    """24 GiB; the worker holds `held_bytes` while it lives, others `others_bytes`."""

    total_bytes: int = 24 * GIB
    held_bytes: int = 18 * GIB
    others_bytes: int = 0
    leaks: bool = False
    sees_workers: bool = True  # False: in a container or under WSL2, where NVML knows none of our ids
    worker_pid: Callable[[], int | None] = lambda: None
    utilisation: float = 0.0
    power_w: float = 50.0
    age_s: float = 0.0
    _cards: tuple[CardSample, ...] = ()

    def __call__(self) -> Sample:
        pid = self.worker_pid()
        alive = pid is not None and start_ticks(pid) is not None
        ours = self.held_bytes if alive or self.leaks else 0
        processes = (GpuProcess(pid=pid, bytes=ours),) if pid is not None and alive and self.sees_workers else ()
        used = ours + self.others_bytes
        card = CardSample(
            name="Test 24",
            uuid="GPU-1",
            processes=processes,
            total_bytes=self.total_bytes,
            free_bytes=self.total_bytes - used,
            used_bytes=used,
            utilisation=self.utilisation,
            power_w=self.power_w,
        )
        if (card,) != self._cards:  # like the probe, which hands out a sample again until it has a newer one
            self._cards = (card,)
        return Sample(state="ok", error="", driver="580.1", cards=self._cards, age_s=self.age_s)
