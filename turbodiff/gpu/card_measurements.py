"""What `turbodiff calibrate --quick` measured on cards of this machine, without torch.

Kept in the state folder, one record per card, driver and torch: a record of another driver or torch is not used, and
the measurement is offered anew. The machine that plans are made for (gpu/probe.py) carries what is here.
"""

import contextlib
from datetime import datetime
from pathlib import Path

from pydantic import Field, ValidationError

from turbodiff.plan.hardware import GpuFacts
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


class _File(Frozen):
    cards: tuple[CardMeasurement, ...] = ()


def card_measurements(folder: Path | None = None) -> tuple[CardMeasurement, ...]:
    """Everything that was measured on this machine, the newest last; a damaged file counts as none."""
    path = (folder or state_folder()) / FILE
    with contextlib.suppress(OSError, ValidationError):
        check_file(path)
        return _File.model_validate_json(path.read_bytes()[:MAX_BYTES]).cards
    return ()


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
    others = [one for one in card_measurements(folder) if one.key != measured.key]
    document = _File(cards=(*others[1 - KEPT :], measured))
    with atomic_write((folder or state_folder()) / FILE) as part:
        part.write_text(document.model_dump_json(indent=1), "utf-8")
