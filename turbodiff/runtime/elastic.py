"""Denoising beside a neighbour that grows: fewer blocks stay on the device, and they come back when it has gone.

Free memory is asked for between two blocks, at most once a second. A block for which memory ran out all the same is
computed again with fewer blocks on the device. Neither changes a bit of the result: where a block's weights lie is no
part of its numbers, and what was added to the residual stream is not added twice (models/wan_dit.py, Block.forward).
"""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from turbodiff.plan.memory_limits import FITS_SHARE
from turbodiff.runtime.attempt import Attempt, left_notice, peak_of
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.replan import budget_now
from turbodiff.spec.events import NoticeEvent
from turbodiff.spec.numbers import gib
from turbodiff.spec.out_of_memory import memory_failure
from turbodiff.spec.plan import PhaseName

Result = TypeVar("Result")

READ_EVERY_S = 1.0
CALM_READINGS = 3  # with room to spare, one after the other, before blocks come back


class Elastic:
    """Keeps the blocks of one expert within what the device has while they are at work.

    What they need is the plan's peak of the phase, less the blocks that left. They leave when that is more than there
    is, and come back, never more than were planned, where it is no more than a plan that fits with ease would take for
    some readings in a row: twice as many after every time that memory ran out.
    """

    def __init__(self, attempt: Attempt, phase: PhaseName, placed: PlacedDit) -> None:
        self._attempt, self._phase, self._dit, self._blocks = attempt, phase, placed.dit, placed.blocks
        planned_bytes = self._blocks.bytes_with(self._blocks.planned)
        self._work_bytes = peak_of(attempt.plan, phase) - planned_bytes
        self._others_here = self._blocks.stay  # other networks may have stayed on the device
        self._next_s, self._calm, self._calm_enough = 0.0, 0, CALM_READINGS
        if self._blocks.resident < self._blocks.planned:
            self._tell("blocks_left", planned_bytes - self._blocks.bytes_with(self._blocks.resident))

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; where memory runs out, again with fewer graphs and networks on the device, as often as
        some leave.

        Raises:
            torch.OutOfMemoryError: nothing was left that could leave.
        """
        fewer = 1
        while True:
            try:
                self._follow()
                return work()
            except Exception as error:
                failure = memory_failure(error)
                if failure is None or failure.where != "device" or not failure.goes_on:
                    raise
            # only now: the traceback held what the work had made
            models = self._attempt.models
            left_bytes = models.leave_device(but=self._dit) if self._others_here else models.graphs.drop_all_but()
            self._others_here = False
            while not left_bytes and self._blocks.resident:
                left_bytes = self._resize(max(0, self._blocks.resident - fewer))
                fewer *= 2
            if not left_bytes:
                raise torch.OutOfMemoryError(failure.line)
            self._next_s, self._calm, self._calm_enough = 0.0, 0, 2 * self._calm_enough
            self._tell("block_repeated", left_bytes)

    def _follow(self) -> None:
        """Bring what is on the device to what there is room for now, unless that was done within this second."""
        now_s, attempt = time.monotonic(), self._attempt
        if attempt.machine is None or now_s < self._next_s:
            return
        self._next_s = now_s + READ_EVERY_S
        budget_bytes = budget_now(attempt.plan, attempt.machine, attempt.models.device)
        if budget_bytes is None:
            return
        if self._others_here and (left_bytes := attempt.models.make_room(attempt.plan, budget_bytes, but=self._dit)):
            self._others_here = False
            attempt.send(left_notice(left_bytes, self._phase))
        here, fitting, easy = self._blocks.resident, *map(self._largest, (budget_bytes, int(FITS_SHARE * budget_bytes)))
        self._calm = self._calm + 1 if easy > here else 0
        if fitting < here and (left_bytes := self._resize(fitting)):
            self._tell("blocks_left", left_bytes)
        elif self._calm >= self._calm_enough:
            self._calm = 0
            self._tell("blocks_back", -self._resize(easy))

    def _largest(self, room_bytes: int) -> int:
        """The most blocks that may stay on the device while all that the phase needs takes so many bytes."""
        bytes_with = self._blocks.bytes_with
        counts = range(self._blocks.planned + 1)
        return max((n for n in counts if self._work_bytes + bytes_with(n) <= room_bytes), default=0)

    def _resize(self, resident: int) -> int:
        """Let so many blocks stay; returns the bytes that left."""
        return -self._blocks.resize(resident)

    def _tell(self, key: str, moved_bytes: int) -> None:
        """Send the notice that blocks left the device or came back."""
        happened = {
            "blocks_left": f"less memory is free: blocks of {gib(moved_bytes)} leave the device",
            "blocks_back": f"memory is free again: blocks of {gib(moved_bytes)} are back on the device",
            "block_repeated": f"memory ran out: {gib(moved_bytes)} leave the device and the block is computed again",
        }
        text = f"{self._phase}: {happened[key]}; {self._blocks.resident} of {len(self._blocks)} blocks stay there"
        counts = {"resident": self._blocks.resident, "blocks": len(self._blocks)}
        self._attempt.send(
            NoticeEvent(key=key, text=text, numbers={"phase": self._phase, "bytes": moved_bytes, **counts})
        )
