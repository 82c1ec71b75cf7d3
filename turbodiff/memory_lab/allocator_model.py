"""A small model of torch's caching allocator: how much a stream of allocations makes it take from the driver.

Three modes: native (fixed segments, split and merged), limited (the same under max_split_size_mb: large blocks are used
whole or not at all) and expandable segments (one address range per pool that grows and shrinks by pages). Read off the
public rules of c10/cuda/CUDACachingAllocator.cpp in torch 2.9-2.13: sizes are rounded to 512 bytes; up to 1 MiB they
come from the small pool. A native segment has 2 MiB in the small pool;
in the large one 20 MiB for requests below 10 MiB, and above the request itself rounded to 2 MiB. A free block is taken
best fit and split where the rest is at least 512 bytes (small pool, expandable) or above 1 MiB (large pool). A request
that would go beyond the cap first gives back all that is free and whole, then is refused. Pages of an expandable range
have 2 MiB in the small pool and 20 MiB in the large one. One stream, no private pools, default options.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from turbodiff.gpu.allocator import MAX_SPLIT_MIB
from turbodiff.plan.hardware import Allocator
from turbodiff.spec.numbers import MIB

GRAIN_BYTES = 512  # kMinBlockSize
SMALL_BYTES = 1 * MIB  # kSmallSize: requests up to this come from the small pool, larger rests are split off
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT_BYTES = 20 * MIB  # kLargeBuffer
LARGE_REQUEST_BYTES = 10 * MIB  # kMinLargeAlloc: from here on a native segment has the size of its request
ROUND_BYTES = 2 * MIB  # kRoundLarge
NO_LIMIT_BYTES = 1 << 60
MAX_SPLIT_BYTES = MAX_SPLIT_MIB * MIB


class Allocation(NamedTuple):
    """A tensor that came to life, or with negative bytes that died; `number` tells one from another."""

    number: int
    n_bytes: int


class OutOfCap(Exception):
    """A request found no place below the cap."""


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment: in use, free, or (expandable only) without memory behind it; its neighbours in address."""

    start: int
    size: int
    segment: int
    free: bool = True
    mapped: bool = True
    before: "Block | None" = None
    after: "Block | None" = None


@dataclass
class Pool:
    """Free blocks with memory behind them, by size and address; in an expandable one the pieces without any."""

    page_bytes: int
    free: list[tuple[int, int, int]] = field(default_factory=list)  # size, segment, start
    blocks: dict[tuple[int, int], Block] = field(default_factory=dict)  # by segment and start

    def put(self, block: Block) -> None:
        """Note a free block."""
        insort(self.free, (block.size, block.segment, block.start))
        self.blocks[block.segment, block.start] = block

    def take(self, block: Block) -> None:
        """Forget a free block."""
        del self.free[bisect_left(self.free, (block.size, block.segment, block.start))]
        del self.blocks[block.segment, block.start]


class CachingAllocator:
    """One device's allocator under a cap; `reserved_bytes` is what it has of the driver."""

    def __init__(self, mode: Allocator, cap_bytes: int) -> None:
        self.expandable, self.cap_bytes = mode == "expandable", cap_bytes
        self.max_split_bytes = MAX_SPLIT_BYTES if mode == "limited" else NO_LIMIT_BYTES
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self._small, self._large = Pool(SMALL_SEGMENT_BYTES), Pool(LARGE_SEGMENT_BYTES)
        self._used: dict[int, tuple[Block, Pool]] = {}
        self._segments = 0
        self._ranges: dict[int, Block] = {}  # id of a pool -> first block of its expandable range

    def run(self, events: Sequence[Allocation]) -> None:
        """Allocate and free in order; deaths of what was never allocated here are ignored.

        Raises:
            OutOfCap: a request cannot be met.
        """
        for number, n_bytes in events:
            if n_bytes > 0:
                self.allocate(number, n_bytes)
            elif number in self._used:
                self.release(number)

    def allocate(self, number: int, n_bytes: int) -> None:
        """Find a place for a request.

        Raises:
            OutOfCap: there is none, also after everything free was given back.
        """
        size = -(-max(n_bytes, 1) // GRAIN_BYTES) * GRAIN_BYTES
        pool = self._small if size <= SMALL_BYTES else self._large
        block = self._best(pool, size)
        if block is None:
            taken = _segment_bytes(size)
            if self.reserved_bytes + taken > self.cap_bytes:
                self.give_back()
            if self.reserved_bytes + taken > self.cap_bytes:
                raise OutOfCap(f"{size} bytes, {self.reserved_bytes} of {self.cap_bytes} are taken")
            if self.expandable:
                block = self._grow(pool, size)
            else:
                self._take_from_driver(taken)
                self._segments += 1
                block = Block(0, taken, self._segments)
        rest = block.size - size
        if pool is self._small or self.expandable:
            split = rest >= GRAIN_BYTES
        else:
            split = rest > SMALL_BYTES and size < self.max_split_bytes
        if split:
            after = Block(block.start + size, rest, block.segment, before=block, after=block.after)
            if block.after is not None:
                block.after.before = after
            block.after, block.size = after, size
            pool.put(after)
        block.free = False
        self._used[number] = block, pool

    def release(self, number: int) -> None:
        """Free what was allocated under a number, merging it with free neighbours."""
        block, pool = self._used.pop(number)
        block.free = True
        before, after = block.before, block.after
        if before is not None and before.free and before.mapped:
            pool.take(before)
            block = self._join(before, block)
        if after is not None and after.free and after.mapped:
            pool.take(after)
            block = self._join(block, after)
        pool.put(block)

    def give_back(self) -> None:
        """Return to the driver what is free and whole: native segments without a used part, pages of a range."""
        for pool in (self._small, self._large):
            for block in list(pool.blocks.values()):
                if self.expandable:
                    self._unmap(block, pool)
                elif block.before is None and block.after is None:
                    pool.take(block)
                    self.reserved_bytes -= block.size

    def _best(self, pool: Pool, size: int) -> Block | None:
        """The smallest free block that is large enough; of the one that may grow, what it may grow to counts."""
        index = bisect_left(pool.free, (size, -1, -1))
        if index == len(pool.free):
            return None
        found = pool.blocks[pool.free[index][1:]]
        while self.expandable and index + 1 < len(pool.free):
            index += 1
            other = pool.blocks[pool.free[index][1:]]
            if _could_be(other) >= _could_be(found):
                break
            found = other
        if (size < self.max_split_bytes) != (found.size < self.max_split_bytes):
            return None
        if size >= self.max_split_bytes and found.size >= size + LARGE_SEGMENT_BYTES:
            return None
        pool.take(found)
        return found

    def _take_from_driver(self, n_bytes: int) -> None:
        self.reserved_bytes += n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _grow(self, pool: Pool, size: int) -> Block:
        """The first place of the range that is or can be given memory for a request, at the lowest address."""
        block = self._ranges.get(id(pool))
        if block is None:
            self._segments += 1
            block = self._ranges[id(pool)] = Block(0, 1 << 50, self._segments, mapped=False)
        run, have, lacks = list[Block](), 0, False
        while True:  # free neighbours, with memory or without, that are large enough together and lack some
            if block.free:
                run.append(block)
                have, lacks = have + block.size, lacks or not block.mapped
            else:
                run, have, lacks = [], 0, False
            if have >= size and lacks:
                break
            assert block.after is not None, "the range is endless"
            block = block.after
        found: Block | None = None
        for part in run:
            have = 0 if found is None else found.size
            if have >= size:
                break
            if part.mapped:
                pool.take(part)
            else:
                self._map(part, min(part.size, -(-(size - have) // pool.page_bytes) * pool.page_bytes))
            found = part if found is None else self._join(found, part)
        assert found is not None
        return found

    def _map(self, block: Block, n_bytes: int) -> None:
        """Put memory behind the first bytes of a piece."""
        if block.size > n_bytes:
            rest = Block(
                block.start + n_bytes, block.size - n_bytes, block.segment, mapped=False, before=block,
                after=block.after,
            )  # fmt: skip
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, n_bytes
        block.mapped = True
        self._take_from_driver(n_bytes)

    def _unmap(self, block: Block, pool: Pool) -> None:
        """Take the memory from the whole pages of a free block."""
        first = -(-block.start // pool.page_bytes) * pool.page_bytes
        last = (block.start + block.size) // pool.page_bytes * pool.page_bytes
        if last <= first:
            return
        pool.take(block)
        self.reserved_bytes -= last - first
        for start, end, mapped in ((block.start, first, True), (last, block.start + block.size, True)):
            if end > start:
                part = Block(start, end - start, block.segment, mapped=mapped)
                if start < first:
                    part.before, part.after = block.before, block
                    if block.before is not None:
                        block.before.after = part
                    else:
                        self._ranges[id(pool)] = part
                    block.before = part
                else:
                    part.before, part.after = block, block.after
                    if block.after is not None:
                        block.after.before = part
                    block.after = part
                pool.put(part)
        block.start, block.size, block.mapped = first, last - first, False
        for other in (block.before, block.after):
            if other is not None and not other.mapped:
                first_part, second = (other, block) if other.start < block.start else (block, other)
                block = self._join(first_part, second)

    def _join(self, first: Block, second: Block) -> Block:
        """Two neighbours as one, the first."""
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first


def _could_be(block: Block) -> int:
    """What a free block may grow to in its range."""
    return block.size + (block.after.size if block.after is not None and not block.after.mapped else 0)


def _segment_bytes(size: int) -> int:
    """What a request without a place takes from the driver."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < LARGE_REQUEST_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_BYTES) * ROUND_BYTES


def works(events: Sequence[Allocation], mode: Allocator, cap_bytes: int) -> bool:
    """Whether a stream runs under a cap."""
    try:
        CachingAllocator(mode, cap_bytes).run(events)
    except OutOfCap:
        return False
    return True


def smallest_cap(events: Sequence[Allocation], mode: Allocator, near_bytes: int = 0) -> int:
    """The smallest cap under which a stream still runs, in whole steps of what is taken from the driver; larger ones
    are taken to work, too. Quickest where it is `near_bytes` above the live bytes at their worst."""
    low = -(-live_peak_bytes(events) // ROUND_BYTES) - 1
    high, step = low + 1 + near_bytes // ROUND_BYTES, 1
    if works(events, mode, high * ROUND_BYTES):
        while high - step > low and works(events, mode, (high - step) * ROUND_BYTES):
            high, step = high - step, 2 * step
        low = max(low, high - step)
    else:
        while not works(events, mode, (high + step) * ROUND_BYTES):
            high, step = high + step, 2 * step
        low, high = high, high + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(events, mode, middle * ROUND_BYTES) else (middle, high)
    return high * ROUND_BYTES


def live_peak_bytes(events: Sequence[Allocation]) -> int:
    """The most that is live at once."""
    live = peak = 0
    for _, n_bytes in events:
        live += n_bytes
        peak = max(peak, live)
    return peak
