"""Two experts take turns on the device: never both, and none of them once the steps are done."""

from contextlib import contextmanager

import pytest
import torch

from tests.plan.machines import ask, card, disk
from tests.test_tiny import EventList, NoCommands
from turbodiff.plan.planner import plan_request
from turbodiff.runtime import denoise
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.step_graph import StepGraphs
from turbodiff.runtime.text import TextRows
from turbodiff.spec.errors import OutOfMemoryError


class Bench:
    """A model cache whose networks only say when they come and go."""

    def __init__(self, fail_at=""):
        self.device, self.weights_bytes = Device.pick("cpu"), 0
        self.graphs = StepGraphs(self.device)
        self.here, self.seen, self.fail_at = [], [], fail_at

    def reset_peak(self):
        pass

    @contextmanager
    def dit(self, expert, plan, parallel=None):
        if expert == self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.here.append(expert)
        self.seen.append(tuple(self.here))
        try:
            yield PlacedDit(None, (), ())
        finally:
            self.here.remove(expert)


class Still:
    """A network that moves nothing."""

    def __init__(self, *clip):
        pass

    def __call__(self, latents, timesteps):
        return torch.zeros_like(latents)


@pytest.fixture(autouse=True)
def still(monkeypatch):
    monkeypatch.setattr(denoise, "Network", Still)
    monkeypatch.setattr(denoise.preview, "show", lambda *_: None)


def attempt_of(tmp_path, bench, **fields):
    request = ask("wan2.2-a14b", size="128x128", num_frames=5, steps=4, seed=1, **fields)
    plan = plan_request(request, card(80), disk(), policy="anyway")
    return Attempt(1, 1, plan, tmp_path, tmp_path, bench, EventList(), NoCommands)


def steps(attempt):
    return denoise.denoise(attempt, TextRows(torch.zeros(1, 512, 4096), 4), None)


@pytest.mark.parametrize(
    ("boundary", "turns"),
    [(0.9, [("high",), ("low",)]), (0.5, [("high",)]), (1.0, [("low",)])],
    ids=["both", "high alone", "low alone"],
)
def test_one_expert_at_a_time_and_none_before_the_decode(tmp_path, boundary, turns):
    bench = Bench()
    attempt = attempt_of(tmp_path, bench, boundary=boundary)
    assert steps(attempt).shape[1] == 16
    assert bench.seen == turns
    assert bench.here == []
    done = [event.name for event in attempt.send.of("phase") if event.state == "done"]
    assert done == [f"denoise_{expert}" for (expert,) in turns]


def test_an_expert_that_does_not_fit_leaves_nothing_behind(tmp_path):
    bench = Bench(fail_at="low")
    attempt = attempt_of(tmp_path, bench, boundary=0.9)
    with pytest.raises(OutOfMemoryError) as error:
        steps(attempt)
    assert (error.value.field, bench.here) == ("denoise_low", [])
