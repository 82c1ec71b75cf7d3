"""The cards that are there, and a slot for each: they appear and go with what the probe sees."""

from collections.abc import Sequence
from typing import Protocol

from turbodiff.gpu.probe import Sample, machine_from
from turbodiff.spec.numbers import gib
from turbodiff.spec.wording import Words
from turbodiff.supervisor.context import STALE_S, SupervisorContext
from turbodiff.supervisor.slots import GpuSlot


class RemoteCards(Protocol):
    """Cards of other machines, as slots that come and go."""

    def filenos(self) -> list[int]:
        """Descriptors that are ready when there is something to hear."""

    def tick(self, slots: Sequence[GpuSlot]) -> list[GpuSlot]:
        """Hear of the cards, without waiting; the slots with those of other machines as they are now."""

    def stop(self) -> None:
        """Let all of them go."""


GONE_AFTER = 3  # samples in a row, one a second, before a card counts as gone


def card_ids(sample: Sample | None) -> tuple[str, ...]:
    """The UUIDs of the cards that compute; () where none is seen, or one does not tell its own."""
    gpus = machine_from(sample).usable_gpus if sample else ()
    return tuple(gpu.uuid for gpu in gpus) if all(gpu.uuid for gpu in gpus) else ()


def visible_devices(sample: Sample | None) -> tuple[str, ...]:
    """What each worker is shown: a card each, or ("",) where the first card is the only one, or none is."""
    gpus, ids = machine_from(sample).usable_gpus if sample else (), card_ids(sample)
    return ids if len(ids) > 1 or any(gpu.index for gpu in gpus if ids) else ("",)


def slots_of(context: SupervisorContext, slots: Sequence[GpuSlot]) -> list[GpuSlot]:
    """The slots of one machine."""
    return [slot for slot in slots if slot.context is context]


def follow_cards(context: SupervisorContext, slots: list[GpuSlot], sample: Sample | None) -> list[GpuSlot]:
    """The slots for the cards of a sample: those of cards that are there go on, new cards get one, and of a card that
    is gone the worker is ended and its job put back into the queue.

    A driver that says nothing, or that sees no card at all, changes nothing: it may answer again in a moment.
    """
    ids = card_ids(sample) if sample and sample.state == "ok" and sample.age_s <= STALE_S else ()
    if not ids or (len(ids) == 1 and [slot.device for slot in slots_of(context, slots)] == [""]):
        return slots
    kept = []
    for slot in slots_of(context, slots):
        slot.device = slot.device or ids[0]  # it was shown all and took the first; its next worker sees that one alone
        slot.unseen = 0 if slot.device in ids else slot.unseen + 1
        if slot.unseen < GONE_AFTER:
            kept.append(slot)
            continue
        slot.log("its card is gone", level="ERROR")
        slot.stop("its card is gone", exit_s=0.0, term_s=1.0)
        context.store.put(f"worker{slot.index}", None)
    for device in ids:
        if device not in [slot.device for slot in kept]:
            number = next(n for n in range(len(kept) + 1) if n not in [slot.index for slot in kept])
            kept.append(GpuSlot(context, number, device))
            kept[-1].log(f"a card was found: {device}")
    return kept + [slot for slot in slots if slot.context is not context]


def card_lines(sample: Sample | None) -> list[str]:
    """What the log says of the cards of this machine."""
    machine, lines = machine_from(sample) if sample else None, []
    for gpu in machine.gpus if machine else ():
        free = "unknown" if gpu.free_bytes is None else gib(gpu.free_bytes)
        total = "unknown" if gpu.total_bytes is None else gib(gpu.total_bytes)
        driver = sample.driver if sample else None
        lines.append(f"GPU {gpu.index}: {gpu.name} {gpu.uuid}, {free} free of {total}, driver {driver}")
    key = f"reason.{sample.reason}" if sample else ""
    why = Words("en").or_else(key, sample.state, got=sample.error) if sample else "no probe"
    return lines or [f"no GPU: {why}"]
