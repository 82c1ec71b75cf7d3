"""Two experts take turns on the device: never both, and none of them once the steps are done."""

from contextlib import contextmanager

import pytest
import torch

from tests.plan.machines import ask, card, disk
from tests.test_tiny import Ears, Nobody
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.attempt import Job, Run
from turbodiff.runtime.denoise import denoise
from turbodiff.runtime.device import Device
from turbodiff.runtime.embeddings import TextRows
from turbodiff.spec.errors import OutOfMemoryError


class Bench:
    """A shelf whose networks only say when they come and go."""

    def __init__(self, fail_at=""):
        self.device, self.weights_bytes = Device.pick("cpu"), 0
        self.here, self.seen, self.fail_at = [], [], fail_at

    def reset_peak(self):
        pass

    def vae_at_hand(self):
        return None

    def lora_notes(self, expert, request):
        return ()

    @contextmanager
    def network(self, expert, plan):
        if expert == self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.here.append(expert)
        self.seen.append(tuple(self.here))
        try:
            yield Still()
        finally:
            self.here.remove(expert)


class Still:
    """A network that moves nothing."""

    def begin(self, *clip):
        pass

    def __call__(self, latents, timesteps):
        return torch.zeros_like(latents)


def run_of(tmp_path, bench, **fields):
    request = ask("wan2.2-a14b", size="128x128", num_frames=5, steps=4, seed=1, **fields)
    plan = plan_request(request, card(80), disk(), policy="anyway")
    return Run(Job(1, 1, plan, tmp_path, tmp_path), bench, Ears(), Nobody())


def steps(run):
    return denoise(run, TextRows(torch.zeros(1, 512, 4096), 4), None)


@pytest.mark.parametrize(
    ("boundary", "turns"),
    [(0.9, [("high",), ("low",)]), (0.5, [("high",)]), (1.0, [("low",)])],
    ids=["both", "high alone", "low alone"],
)
def test_one_expert_at_a_time_and_none_before_the_decode(tmp_path, boundary, turns):
    bench = Bench()
    run = run_of(tmp_path, bench, boundary=boundary)
    assert steps(run).shape[1] == 16
    assert bench.seen == turns
    assert bench.here == []
    done = [fields.name for fields in run.say.of("phase") if fields.state == "done"]
    assert done == [f"denoise_{expert}" for (expert,) in turns]


def test_an_expert_that_does_not_fit_leaves_nothing_behind(tmp_path):
    bench = Bench(fail_at="low")
    run = run_of(tmp_path, bench, boundary=0.9)
    with pytest.raises(OutOfMemoryError) as error:
        steps(run)
    assert (error.value.field, bench.here) == ("denoise_low", [])
