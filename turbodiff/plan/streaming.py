"""Blocks that do not stay on the card: what passes through costs host memory and seconds, by where it comes from.

Each card copies them from host memory (runtime/offload.py), or those that share a clip have some each and send them to
the others (runtime/shared_blocks.py).
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from turbodiff.plan.memory_limits import FITS_SHARE

if TYPE_CHECKING:
    from turbodiff.plan.phase_costs import CostInputs

STAGED_BLOCKS = 2  # in host memory, between a file and the device
# Blocks in flight beside the resident ones: one computing, one arriving. Halves would save one (0.33 GiB of Wan 14B in
# INT8), which decides nothing from 8 GB on, where 81 frames at 720p fit, nor on a card of 6 GB, which lacks 0.7 GiB
STREAM_BUFFERS = 2


class Streamed(NamedTuple):
    """What blocks that pass through cost: how many are on a card at once, all counted; bytes of page-locked host memory
    beyond those staged; seconds of a forward pass beyond those of its maths, without those of reading `disk_bytes`."""

    on_card: int
    locked_bytes: int
    seconds: float
    disk_bytes: int


def streamed(
    inputs: "CostInputs", resident: int, forward_s: float, *, locked: int | None, shared: int | None, host_bytes: int
) -> Streamed:
    """A pass whose blocks but the `resident` come in their turn.

    Args:
        forward_s: seconds of the pass where all is on the card.
        locked: of those in host memory of one process, how many have page-locked copies, None: all. The rest is copied
            by the driver piece by piece while nothing computes; what does not stay in the page cache either is read
            from disk in every pass.
        shared: as Levers.blocks_shared.
        host_bytes: of host memory that the process needs beside blocks.
    """
    w, speed, ranks = inputs.weights, inputs.speed, 1 if shared is None else inputs.ranks
    waiting = w.blocks - resident
    in_host = -(-(waiting - (shared or 0)) // ranks)  # of one process
    locked = in_host if locked is None else locked
    compute, copy, send = forward_s / w.blocks, w.block / speed.pcie_bytes_s, 0.0
    if shared is not None:  # what attention exchanges takes the same way between cards
        send, compute = w.block / inputs.link_bytes_s, compute - inputs.exchange_s / w.blocks
    seconds = (shared or 0) * max(0.0, send - compute)
    seconds += min(locked * ranks, waiting - (shared or 0)) * max(0.0, copy + send - compute)
    seconds += (copy if in_host or shared is None else 0.0) + send
    locked_bytes = 0 if inputs.made else max(0, locked - STAGED_BLOCKS) * w.block
    pageable_bytes = (in_host - locked) * w.block
    seconds += ranks * pageable_bytes / speed.pageable_bytes_s + ranks * (in_host - locked) * send
    needs_bytes = host_bytes + locked_bytes + pageable_bytes
    from_disk = inputs.host_bytes is not None and not inputs.made and needs_bytes > inputs.host_bytes
    on_card = resident + -(-(shared or 0) // ranks) + STREAM_BUFFERS
    return Streamed(on_card, locked_bytes, seconds, ranks * pageable_bytes * from_disk)


def spread(inputs: "CostInputs", device_bytes: int, bare_bytes: int, block_bytes: int) -> tuple[int, int]:
    """(blocks on every card, others that lie on one of them) where blocks are shared out, as far as a plan still
    "fits": with room for all of them once, more stay on every card. `bare_bytes`: what a card needs without any."""
    blocks, ranks = inputs.weights.blocks, inputs.ranks
    room = max(0, (int(FITS_SHARE * device_bytes) - bare_bytes) // block_bytes)
    if room * ranks < blocks:
        return 0, room * ranks
    resident = min((room * ranks - blocks) // (ranks - 1), blocks - STREAM_BUFFERS)
    while resident and resident + math.ceil((blocks - resident) / ranks) > room:
        resident -= 1
    return resident, blocks - resident
