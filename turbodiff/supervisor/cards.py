"""The cards that are there, and a slot for each: they appear and go with what the probe sees."""

from turbodiff.gpu.probe import Sample, machine_from
from turbodiff.supervisor.context import STALE_S, SupervisorContext
from turbodiff.supervisor.slots import GpuSlot

GONE_AFTER = 3  # samples in a row, one a second, before a card counts as gone


def card_ids(sample: Sample | None) -> tuple[str, ...]:
    """The UUIDs of the cards that compute; () where none is seen, or one does not tell its own."""
    gpus = machine_from(sample).usable_gpus if sample else ()
    return tuple(gpu.uuid for gpu in gpus) if all(gpu.uuid for gpu in gpus) else ()


def visible_devices(sample: Sample | None) -> tuple[str, ...]:
    """What each worker is shown: a card each, or ("",) where the first card is the only one, or none is."""
    gpus, ids = machine_from(sample).usable_gpus if sample else (), card_ids(sample)
    return ids if len(ids) > 1 or any(gpu.index for gpu in gpus if ids) else ("",)


def follow_cards(context: SupervisorContext, slots: list[GpuSlot], sample: Sample | None) -> list[GpuSlot]:
    """The slots for the cards of a sample: those of cards that are there go on, new cards get one, and of a card that
    is gone the worker is ended and its job put back into the queue.

    A driver that says nothing, or that sees no card at all, changes nothing: it may answer again in a moment.
    """
    ids = card_ids(sample) if sample and sample.state == "ok" and sample.age_s <= STALE_S else ()
    if not ids or (len(ids) == 1 and [slot.device for slot in slots] == [""]):
        return slots
    kept = []
    for slot in slots:
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
    return kept
