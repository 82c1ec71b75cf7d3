"""Which allocator a worker gets: a person's choice first, then what was measured, then what is known to fail."""

import pytest

from turbodiff.gpu.allocator import VARIABLES, allocator_mode, allocator_settings
from turbodiff.gpu.probe import CardSample, Sample, machine_from
from turbodiff.plan.hardware import GpuFacts

HERE = {"wsl": False, "tegra": False, "environment": {}}


@pytest.mark.parametrize("name", VARIABLES)
def test_what_a_person_set_is_never_touched(name):
    for value, mode in (
        ("max_split_size_mb:128", "native"), ("backend:native, expandable_segments: True", "expandable"),
        ("expandable_segments:False", "native"), ("max_split_size_mb:24,garbage_collection_threshold:0.8", "limited"),
    ):  # fmt: skip
        environment = {name: value}
        assert allocator_mode((), "580.1", wsl=False, tegra=False, environment=environment) == mode
        assert allocator_settings("limited", environment) == allocator_settings("expandable", environment) == {}


@pytest.mark.parametrize(
    ("driver", "more", "card", "mode"),
    [
        ("580.82.07", {}, {}, "expandable"),
        ("591.44", {"wsl": True}, {}, "limited"),
        ("615.10", {"wsl": True}, {}, "expandable"),
        (None, {"wsl": True}, {}, "limited"),
        ("540.4.0", {"tegra": True}, {}, "limited"),
        ("580.82.07", {}, {"vgpu": True}, "limited"),
        ("580.82.07", {}, {"vmm_works": False}, "limited"),
        ("591.44", {"wsl": True}, {"vmm_works": True}, "expandable"),
    ],
)
def test_expandable_segments_are_off_where_they_are_known_to_fail(driver, more, card, mode):
    assert allocator_mode((GpuFacts(**card),), driver, **HERE | more) == mode


def test_a_worker_reads_from_its_environment_the_mode_that_it_was_given():
    for mode in ("limited", "expandable"):
        environment = allocator_settings(mode, {})
        assert set(environment) == set(VARIABLES)
        assert allocator_mode((), None, wsl=True, tegra=True, environment=environment) == mode


@pytest.mark.parametrize(("name", "shared"), [("NVIDIA GB10", True), ("Orin (nvgpu)", True), ("NVIDIA GH200", False)])
def test_a_gpu_without_memory_of_its_own_is_told_by_its_name(name, shared):
    sample = Sample(state="ok", error="", driver="580.1", cards=(CardSample(name=name),))
    assert machine_from(sample).unified_memory is shared
