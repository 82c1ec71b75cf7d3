"""Blocks of a transformer that one card cannot hold, spread over the cards that share a clip.

Each process has some of the blocks and sends them to the others in their turn, so that several cards hold together what
one cannot, and page-locked host memory holds each block once.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turbodiff.models.parallel import SequenceParallel
from turbodiff.runtime.offload import ALIGN_BYTES, BlockStream, share_parameters, tensors_of


class FlatBlock(NamedTuple):
    """A block whose parameters are views of one piece of memory, uint8 [bytes], which travels as a whole."""

    block: nn.Module
    flat: Tensor

    @classmethod
    def like(cls, block: nn.Module, device: torch.device) -> "FlatBlock":
        """Uninitialised, of the shapes of another block."""
        sizes = [-(-tensor.nbytes // ALIGN_BYTES) * ALIGN_BYTES for tensor in tensors_of(block)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        pieces = {id(tensor): piece for tensor, piece in zip(tensors_of(block), flat.split(sizes), strict=True)}

        def view(tensor: Tensor) -> Tensor:
            piece: Tensor = pieces[id(tensor)][: tensor.nbytes]
            return piece.view(tensor.dtype).view(tensor.shape)

        return cls(share_parameters(block, view), flat)

    def take(self, block: nn.Module) -> None:
        """Copy another block's parameters."""
        with torch.no_grad():
            for here, there in zip(tensors_of(block), tensors_of(self.block), strict=True):
                there.copy_(here, non_blocking=True)


class SharedBlocks(BlockStream):
    """A stream of blocks of which each process has a share: `stream[i]`, for which all ask in the same order.

    The first `resident` blocks are on every card. Each of the others belongs to one process, to all of them in turn:
    the first `on_cards` of them stay on the card of theirs, the rest waits in its host memory. While a block computes,
    the process that has the next one sends it to all, which take it into a slot.

    Args:
        locked: how many of its blocks in host memory are page-locked, None: all.
    """

    def __init__(
        self, blocks: nn.ModuleList, device: torch.device, resident: int, locked: int | None = None,
        *, on_cards: int, parallel: SequenceParallel, keep: bool = True,
    ) -> None:  # fmt: skip
        self._parallel = parallel
        mine = range(resident + parallel.rank, len(blocks), parallel.ranks)
        self._mine, self._stay_here = frozenset(mine), [index for index in mine if index < resident + on_cards]
        self._here: dict[int, FlatBlock] = {}  # of those that stay on this card
        self._flat: dict[int, Tensor] = {}  # slot -> its memory
        self._coming: dict[int, dist.Work] = {}  # slot -> what comes into it
        super().__init__(blocks, device, resident, locked, keep=keep)

    @property
    def beside_bytes(self) -> int:
        """Bytes on the device that are neither resident blocks nor the network's rest."""
        return super().beside_bytes + len(self._here) * self.block_bytes

    def __enter__(self) -> "SharedBlocks":
        super().__enter__()
        try:
            for index in self._stay_here:
                self._here[index] = FlatBlock.like(self._blocks[index], self._device)
                self._here[index].take(self._blocks[index])
        except torch.OutOfMemoryError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._coming.clear()  # not waited for: after an error nothing may come; it holds its memory until it is over
        self._here.clear()
        super().__exit__(*error)

    def __getitem__(self, index: int) -> nn.Module:
        block = super().__getitem__(index)
        if index < self.resident:
            return block
        if (coming := self._coming.pop(index % 2, None)) is not None:
            coming.wait()
        return self._here[index].block if index in self._here else block

    def _from_host(self) -> list[nn.Module]:
        waiting = sorted(self._mine.difference(self._stay_here))
        return [self._blocks[index] for index in waiting]

    def _new_slot(self, slot: int) -> nn.Module:
        block, self._flat[slot] = FlatBlock.like(self._blocks[-1], self._device)
        return block

    def _empty_slots(self, *slots: int) -> None:
        super()._empty_slots(*slots)
        for slot in slots:
            self._flat.pop(slot, None)

    def _copy(self, index: int, slot: int) -> None:
        here = self._here.get(index)
        if here is None and index in self._mine:
            FlatBlock(self.slots[slot], self._flat[slot]).take(self._blocks[index])
        owner = (index - self.planned) % self._parallel.ranks
        flat = self._flat[slot] if here is None else here.flat
        self._coming[slot] = dist.broadcast(flat, owner, group=self._parallel.weights, async_op=True)
