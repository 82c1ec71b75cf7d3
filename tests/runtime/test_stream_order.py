"""Copies and computation share a slot in turn, whatever the two streams of a card do at the same time."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from turbodiff.runtime import offload
from turbodiff.runtime.offload import BlockStream
from turbodiff.spec.errors import CancelledByUser


class Recorder:
    """A stream that knows what must have happened before its next work: its own past and that of what it waited for."""

    def __init__(self) -> None:
        self.known: set[tuple] = set()

    def record_event(self) -> frozenset:
        return frozenset(self.known)

    def wait_event(self, event: frozenset) -> None:
        self.known |= event

    def wait_stream(self, other: "Recorder") -> None:
        self.known |= other.known


class Stream(BlockStream):
    """Blocks whose slots and copies are written down instead of made on a card."""

    def _new_slot(self, slot):
        self.compute.known.add(("memory was in use until", slot))
        return nn.Linear(2, 2)

    def _copy(self, index, slot):
        before = {("memory was in use until", slot)} | {work for work in self.compute.known if work[-1] == slot}
        assert before <= self.copies.known, f"block {index} overwrites what is still in use: {before}"
        self.copies.known.add(("copy of", index))


@pytest.fixture
def made(monkeypatch):
    """(resident) -> a stream of five blocks, with the recorders of both of a card's streams."""
    compute, copies = Recorder(), Recorder()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for name in ("page_lock", "to_host", "free_cached"):
        monkeypatch.setattr(offload, name, lambda *args, **kwargs: 0)
    monkeypatch.setattr(offload, "to_device", lambda tensor, device: tensor)
    Stream.compute, Stream.copies = compute, copies
    return lambda resident: Stream(nn.ModuleList(nn.Linear(2, 2) for _ in range(5)), torch.device("cuda"), resident)


def use(stream: Stream, index: int) -> None:
    stream[index]
    if index >= stream.resident:
        assert ("copy of", index) in stream.compute.known, "it computes with a block that has not arrived"
        stream.compute.known.add(("computes", index, index % 2))


@pytest.mark.parametrize("resident", [0, 2, 3])
def test_every_copy_waits_for_the_slot_and_every_block_for_its_copy(made, resident):
    with made(resident) as stream:
        for _ in range(2):
            for index in range(len(stream)):
                use(stream, index)


def test_a_slot_of_a_stream_that_grows_on_the_way_waits_likewise(made):
    with made(5) as stream:
        use(stream, 0)
        stream.resize(2)
        for index in (1, 2, 3, 4):
            use(stream, index)


@pytest.mark.parametrize("stay", [False, True], ids=["", "stay"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_nothing_is_freed_while_it_is_copied_into_whatever_ended_the_pass(made, at, stay):
    """A person stops the clip, or an error ends it, while the next block is on its way."""
    stream = made(1)
    stream.stay = stay
    with pytest.raises(CancelledByUser), stream:
        for index in range(at + 1):
            use(stream, index)
        raise CancelledByUser("stopped", code="cancelled")
    on_the_way = {("copy of", index) for index in range(1, at + 2)}
    assert on_the_way <= stream.compute.known, "its slots are free for others now"
    assert stream.slots == {}


def test_a_slot_that_a_block_at_rest_no_longer_needs_is_not_freed_under_its_copy(made):
    """Memory is free again in the middle of a pass: all blocks come to stay."""
    with made(3) as stream:
        for index in range(4):
            use(stream, index)
        stream.resize(5)
        assert ("copy of", 4) in stream.compute.known and stream.slots == {}


def test_the_next_clip_copies_into_nothing_that_the_one_before_still_uses(made):
    """Both take the same memory, one after the other."""
    first = made(1)
    with first:
        for index in range(3):
            use(first, index)
    assert ("computes", 2, 0) in first.compute.known
    with made(1) as second:
        for index in range(len(second)):
            use(second, index)
        assert ("computes", 2, 0) in second.copies.known
