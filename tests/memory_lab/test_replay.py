"""Every planned peak holds the allocations of its phase in every mode of torch's allocator; the model by its rules."""

from dataclasses import replace

import pytest

from tests.plan.traced import job
from turbodiff.memory_lab.allocator_model import Allocation, CachingAllocator, OutOfCap, smallest_cap, works
from turbodiff.memory_lab.replay import network_cells, vae_cells, words_cells
from turbodiff.spec.numbers import MIB

MODES = ("expandable", "limited", "native")


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


CLIPS = [
    # model, clip, attention, modes; the whole matrix: scripts/bench_guard.py --replay
    ("wan2.1-1.3b", {"resolution": "480p", "num_frames": 17, "quant_linear": "on"}, "sagesla", MODES),
    ("wan2.1-14b", {"resolution": "720p", "num_frames": 81, "quant_linear": "off"}, "sage", ("expandable", "native")),
    ("wan2.2-a14b", {"resolution": "480p", "num_frames": 81, "quant_linear": "on"}, "sla", ("limited",)),
    ("wan2.2-t2v-a14b", {"resolution": "480p", "num_frames": 17}, "dense", MODES),
    ("wan2.1-i2v-14b", {"resolution": "480p", "num_frames": 17}, "dense", MODES),
]


@pytest.mark.parametrize(("model", "clip", "attention", "modes"), CLIPS, ids=[clip[0] for clip in CLIPS])
def test_what_is_planned_of_a_network_is_never_below_the_smallest_cap_that_works(model, clip, attention, modes):
    here = job(model, attention=attention, **clip)
    for mode in modes:
        for found in network_cells(replace(here, allocator=mode), 6):
            assert found.works, (mode, found.levers, found.margin_bytes // MIB)


def test_what_is_planned_of_the_encoders_is_never_below_the_smallest_cap_that_works():
    """A streamed text encoder holds a layer, of which the plan once counted a fifth: 300 MiB too little."""
    here = job("wan2.1-i2v-14b", resolution="720p", num_frames=17)
    for mode in MODES:
        for found in words_cells(replace(here, allocator=mode)):
            assert found.works, (mode, found.levers, found.margin_bytes // MIB)


def test_what_is_planned_of_the_vae_is_never_below_the_smallest_cap_that_works():
    here = job("wan2.1-i2v-14b", resolution="480p", num_frames=9)
    for mode in MODES:
        for found in vae_cells(replace(here, allocator=mode)):
            assert found.works, (mode, found.cost.name, found.levers, found.margin_bytes // MIB)
