"""What `turbodiff calibrate --quick` and shared clips measured on cards of this machine, without torch.

Kept in the state folder, one record per card, driver and torch: a record of another driver or torch is not used, and
the measurement is offered anew. The machine that plans are made for (gpu/probe.py) carries what is here.
"""

import contextlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pydantic import Field, ValidationError

from turbodiff.plan.hardware import GpuFacts, Machine
from turbodiff.spec.events import LinkEvent
from turbodiff.spec.files import atomic_write, check_file, state_folder
from turbodiff.spec.models import Frozen

FILE = "cards.json"
MAX_BYTES = 1 << 20
KEPT = 32  # records: cards of this machine times drivers and versions of torch
# fields of GpuFacts that a measurement fills, where it came to an end
FACTS = (
    "context_bytes", "vmm_works", "pcie_bytes_s", "pcie_to_host_bytes_s", "pageable_bytes_s", "memory_bytes_s",
    "block_rate", "decode_rate", "link_bytes_s",
)  # fmt: skip


class CardMeasurement(Frozen):
    """What one card did, with one driver and one torch; None where a part did not come to its end.

    Args:
        name, total_bytes: of the card. driver, torch: as the machine has them.
        at: when it was measured.
        page_locked_bytes: host memory that was page-locked without a refusal; page_lock_refused: more was refused.
        block_rate, decode_rate: how fast a block, and the decoder, are over what the tables of cards say.
        link_bytes_s: (cards, what each of them sends a second in an all-to-all among so many of its kind), with NCCL.
        planned_cap_bytes, smallest_cap_bytes: what the plan holds torch's allocator to for a block and a decode of this
            card's size, and the smallest with which both ran.
        kernels: operation -> "" where its fused kernel proved itself, else why not.
        seconds: of the whole measurement.
    """

    name: str
    total_bytes: int
    driver: str = ""
    torch: str = ""
    at: datetime
    context_bytes: int | None = None
    vmm_works: bool | None = None
    pcie_bytes_s: float | None = None
    pcie_to_host_bytes_s: float | None = None
    pageable_bytes_s: float | None = None
    memory_bytes_s: float | None = None
    page_locked_bytes: int | None = None
    page_lock_refused: bool = False
    block_rate: float | None = None
    decode_rate: float | None = None
    link_bytes_s: tuple[tuple[int, float], ...] | None = None
    planned_cap_bytes: int | None = None
    smallest_cap_bytes: int | None = None
    kernels: dict[str, str] = Field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What it is true of."""
        return self.name, self.total_bytes, self.driver, self.torch

    @property
    def facts(self) -> dict[str, object]:
        """The fields of GpuFacts that were measured."""
        found = {name: value for name, value in self.model_dump(include=set(FACTS)).items() if value is not None}
        return {**found, "measured": tuple(found), "measured_on": f"{self.at:%Y-%m-%d}"} if found else {}


class LinkRate(Frozen):
    """What the first clip that so many cards of a kind shared here measured, with one driver and one torch."""

    name: str
    total_bytes: int
    driver: str = ""
    torch: str = ""
    cards: int
    bytes_s: float

    @property
    def key(self) -> tuple[str, int, str, str, int]:
        """What it is true of."""
        return self.name, self.total_bytes, self.driver, self.torch, self.cards


class Measurements(Frozen):
    """All that was measured on this machine, the newest last."""

    cards: tuple[CardMeasurement, ...] = ()
    links: tuple[LinkRate, ...] = ()

    def facts_of(self, gpu: GpuFacts, driver: str | None, torch: str | None) -> dict[str, object]:
        """The fields of GpuFacts that were measured on such a card: rates between cards are those of
        `calibrate --quick`, and for numbers of cards that it did not measure those of clips."""
        found = measurement_of(self.cards, gpu, driver, torch)
        facts = found.facts if found else {}
        key = (gpu.name, gpu.total_bytes or 0, driver or "", torch or "")
        shared = {one.cards: one.bytes_s for one in self.links if one.key[:4] == key}
        rates = shared | dict(found.link_bytes_s or () if found else ())
        return facts | ({"link_bytes_s": tuple(sorted(rates.items()))} if rates else {})


def card_measurements(folder: Path | None = None) -> tuple[CardMeasurement, ...]:
    """The records of cards, the newest last."""
    return all_measurements(folder).cards


def all_measurements(folder: Path | None = None) -> Measurements:
    """Everything that was measured on this machine; a damaged file counts as none."""
    path = (folder or state_folder()) / FILE
    with contextlib.suppress(OSError, ValidationError):
        check_file(path)
        return Measurements.model_validate_json(path.read_bytes()[:MAX_BYTES])
    return Measurements()


def measurement_of(
    known: tuple[CardMeasurement, ...], gpu: GpuFacts, driver: str | None, torch: str | None
) -> CardMeasurement | None:
    """What was measured on such a card under this driver and torch; None where it is to be measured (anew)."""
    key = (gpu.name, gpu.total_bytes or 0, driver or "", torch or "")
    return next((one for one in reversed(known) if one.key == key), None)


def keep_measurement(measured: CardMeasurement, folder: Path | None = None) -> None:
    """Keep a record in the place of an older one of the same card, driver and torch.

    Raises:
        OSError: the disk refused.
    """
    known = all_measurements(folder)
    others = [one for one in known.cards if one.key != measured.key]
    _keep(known.model_copy(update={"cards": (*others[1 - KEPT :], measured)}), folder)


def lacks_link(gpu: GpuFacts | None, cards: Sequence[str]) -> bool:
    """Whether a clip that a card shares with these (`RunCommand.cards`) has to measure what they send: nobody
    has, among so many of its kind. Processes on a CPU have nothing to measure."""
    return gpu is not None and any(cards) and 1 + len(cards) not in dict(gpu.link_bytes_s or ())


def keep_link(gpu: GpuFacts, machine: Machine, event: LinkEvent) -> None:
    """Keep what cards of this kind send each other, for plans; where the disk refuses, the next shared clip says it."""
    on = {"name": gpu.name, "total_bytes": gpu.total_bytes or 0}
    versions = {"driver": machine.driver or "", "torch": machine.torch or ""}
    with contextlib.suppress(OSError):
        keep_link_rate(LinkRate.model_validate({**on, **versions, "cards": event.cards, "bytes_s": event.bytes_s}))


def keep_link_rate(rate: LinkRate, folder: Path | None = None) -> None:
    """Keep what a clip measured in the place of an older rate of the same.

    Raises:
        OSError: the disk refused.
    """
    known = all_measurements(folder)
    others = [one for one in known.links if one.key != rate.key]
    _keep(known.model_copy(update={"links": (*others[1 - KEPT :], rate)}), folder)


def _keep(document: Measurements, folder: Path | None) -> None:
    with atomic_write((folder or state_folder()) / FILE) as part:
        part.write_text(document.model_dump_json(indent=1), "utf-8")
