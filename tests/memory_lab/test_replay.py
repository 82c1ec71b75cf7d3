"""Every planned peak holds the allocations of its phase in every mode of torch's allocator; the model by its rules."""

import os
from dataclasses import replace

import pytest

from tests.plan.traced import job
from turbodiff.memory_lab.allocator_model import Allocation, CachingAllocator, OutOfCap, smallest_cap, works
from turbodiff.memory_lab.replay import cells
from turbodiff.spec.numbers import MIB

MODES = ("expandable", "limited", "native")
EVERYTHING = os.environ.get("TURBODIFF_REPLAY") == "all"  # the whole matrix; else a quick part of it


def reserved(mode, *sizes_mib):
    """MiB of the driver after allocations in a row."""
    allocator = CachingAllocator(mode, 1 << 40)
    allocator.run([Allocation(number, round(size * MIB)) for number, size in enumerate(sizes_mib)])
    return allocator.reserved_bytes // MIB


@pytest.mark.parametrize(
    ("sizes", "native", "expandable"),
    [
        ((0.5,), 2, 2),  # the small pool's segment
        ((1.5,), 20, 20),  # the large pool's
        ((1.5, 1.5, 5), 20, 20),
        ((11,), 12, 20),  # its own segment, rounded to 2 MiB; whole pages of 20
        ((25, 25), 52, 60),
        ((0.5, 1.5), 22, 22),
    ],
)
def test_segments_have_the_sizes_of_torch(sizes, native, expandable):
    assert reserved("native", *sizes) == native
    assert reserved("expandable", *sizes) == expandable


def stream(*steps):
    """Sizes in MiB that come, or numbers of those that go (negative)."""
    numbers, events = iter(range(1, 100)), []
    sizes = {}
    for step in steps:
        if step > 0:
            number = next(numbers)
            sizes[number] = round(step * MIB)
            events.append(Allocation(number, sizes[number]))
        else:
            events.append(Allocation(-step, -sizes[-step]))
    return events


def test_a_small_tensor_that_stays_spoils_a_large_block_only_where_it_may_be_split():
    """200 MiB go, a tensor of 1.5 MiB takes their place and stays, 200 MiB come again."""
    again = stream(200, -1, 1.5, 200)
    assert smallest_cap(again, "native") > 395 * MIB
    assert smallest_cap(again, "limited") < 225 * MIB
    assert smallest_cap(again, "expandable") < 225 * MIB


def test_free_segments_go_back_before_a_request_is_refused():
    assert works(stream(100, -1, 120), "native", 125 * MIB)
    with pytest.raises(OutOfCap):
        CachingAllocator("native", 125 * MIB).run(stream(100, 120))


def test_neighbours_merge_and_pages_of_a_range_are_given_back():
    assert works(stream(40, 40, 40, -1, -2, 80), "expandable", 125 * MIB)
    assert works(stream(40, 40, 40, -2, 60), "expandable", 145 * MIB)
    assert not works(stream(40, 40, 40, 60), "expandable", 145 * MIB)


MATRIX = [
    (model, size, frames, switch, attention)
    for model in ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b")
    for size in ("480p", "720p")
    for frames in (17, 81)
    for switch in ("off", "on")
    for attention in ("dense", "sage", "sagesla")
]
QUICK = [("wan2.1-1.3b", "480p", 17, "on", "sagesla")]


@pytest.mark.parametrize("cell", MATRIX if EVERYTHING else QUICK, ids=lambda cell: " ".join(map(str, cell)))
def test_what_is_planned_is_never_below_the_smallest_cap_that_works(cell):
    model, size, frames, switch, attention = cell
    here = job(model, resolution=size, num_frames=frames, quant_linear=switch, attention=attention)
    for mode in MODES:
        for found in cells(replace(here, allocator=mode), None if EVERYTHING else 6):
            assert found.works, (mode, found.cost.name, found.levers, found.margin_bytes // MIB)
