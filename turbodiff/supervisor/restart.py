"""重启应用: end the worker, prove that its memory is back, start a new one. Page and queue stay.

Success is claimed only for what the driver confirms: free memory back at what it was before our worker, within
256 MiB. Otherwise the other holders are named, and nobody else's process is signalled.
"""

import time
from collections.abc import Callable
from typing import Any

from turbodiff.spec.numbers import gib, seconds
from turbodiff.supervisor.attempt_monitor import SupervisorContext
from turbodiff.supervisor.slots import GpuSlot

PROOF_S = 15.0  # Ollama sees 0.5-1.5 s
POLL_S = 0.25
SLACK_BYTES = 256 << 20


def restart(
    shop: SupervisorContext,
    slots: list[GpuSlot],
    refresh: Callable[[], object],
    wait: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Restart every worker; returns freed_bytes (None: no card to ask), seconds, ended, text.

    `refresh` lets the probe take in its newest sample.
    """
    start_s = shop.now()
    before = [_held(shop, slot) for slot in slots]
    ended = [slot.stop("restart by a person") for slot in slots]
    for slot, gone in zip(slots, ended, strict=True):
        if gone:
            slot.failed_starts, slot.start_after_s = 0, 0.0
    if not all(ended):
        text = "the driver does not let the worker go: a reboot is needed"
        return {"ok": False, "freed_bytes": None, "seconds": shop.now() - start_s, "text": text}
    freed = _proof(shop, slots, before, refresh, wait)
    for slot in slots:
        slot.start()
    return _outcome(freed, shop.now() - start_s)


def _held(shop: SupervisorContext, slot: GpuSlot) -> tuple[int | None, int]:
    """Free bytes of the card, and what our worker holds of it."""
    gpu = shop.memory.gpu(slot.index)
    return (None, 0) if gpu is None else (gpu.free_bytes, gpu.reclaimable_bytes)


def _proof(
    shop: SupervisorContext,
    slots: list[GpuSlot],
    before: list[tuple[int | None, int]],
    refresh: Callable[[], object],
    wait: Callable[[float], None],
) -> list[tuple[int, int]] | None:
    """Per card (freed, held before) as the driver sees it, None without a card to ask; waits until all is back."""
    known = [(slot, free, held) for slot, (free, held) in zip(slots, before, strict=True) if free is not None]
    if not known:
        return None
    end_s = shop.now() + PROOF_S
    while True:
        refresh()
        now = [(_held(shop, slot)[0] or free) - free for slot, free, _ in known]
        back = [(freed, held) for freed, (_, _, held) in zip(now, known, strict=True)]
        if all(freed >= held - SLACK_BYTES for freed, held in back) or shop.now() > end_s:
            return back
        wait(POLL_S)


def _outcome(freed: list[tuple[int, int]] | None, took_s: float) -> dict[str, Any]:
    if freed is None:
        text = f"worker replaced in {seconds(took_s)}; no GPU driver to ask about memory"
        return {"ok": True, "freed_bytes": None, "seconds": took_s, "text": text}
    total, held = sum(back for back, _ in freed), sum(before for _, before in freed)
    missing = held - total
    ok = all(back >= before - SLACK_BYTES for back, before in freed)
    text = f"freed {gib(max(0, total))} in {seconds(took_s)}"
    if not ok:
        text += f"; {gib(missing)} did not come back: another program took it, see who holds the memory"
    return {"ok": ok, "freed_bytes": max(0, total), "seconds": took_s, "text": text}
