"""Image to video with two experts: who runs each step, and that only one of them is on the device at a time."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from tests.test_tiny import EventList, NoCommands
from turbodiff.gpu.probe import machine_now
from turbodiff.models.wan_dit import WanDiT
from turbodiff.plan.planner import plan_request
from turbodiff.runtime import offload, preview
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.denoise import denoise
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache, dit_config
from turbodiff.runtime.text import TextRows
from turbodiff.spec.models import find_model
from turbodiff.spec.request import make_request
from turbodiff.weights import locate

# sigma_max 200: the expert of each step for 1, 2, 3 and 4 steps (TurboDiffusion's schedule, switch at t < boundary)
TABLE = {
    0.95: "H HL HLL HLLL", 0.9: "H HH HHL HHLL", 0.875: "H HH HHL HHLL", 0.7: "H HH HHH HHHL", 0.6: "H HH HHH HHHH",
    0.5: "H HH HHH HHHH",
}  # fmt: skip
CASES = [(boundary, letters) for boundary, row in TABLE.items() for letters in row.split()]
LETTERS = {"high": "H", "low": "L"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model cache whose demo-i2v is two random experts; everything else is the bundle's."""
    folder, bundle = tmp_path_factory.mktemp("bundle"), locate.bundled_root()
    for name in ("vae.safetensors", "umt5.safetensors", "spiece.model"):
        shutil.copy(bundle / name, folder / name)
    torch.manual_seed(0)
    for expert in ("high", "low"):
        state = WanDiT(dit_config(find_model("demo-i2v"), sla=True)).bfloat16().state_dict()
        save_file(state, folder / f"dit_i2v_{expert}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locate, "bundled_root", lambda: folder)
        patch.setattr(preview, "show", lambda *_: None)  # decodes a picture after every step
        yield ModelCache(Device.pick("cpu"))


@pytest.fixture(scope="module")
def machine():
    return machine_now()


def attempt_with(pair, machine, tmp_path, experts="swapped", **fields):
    request = make_request(
        {"prompt": "x", "model": "demo-i2v", "image": "picture", "seed": 3, "num_frames": 1, **fields}
    )
    plan = plan_request(request, machine, locate.inventory())
    plan = plan.model_copy(update={"levers": plan.levers.model_copy(update={"experts": experts})})
    pair.open(plan.request)
    return Attempt(1, 1, plan, tmp_path / "outputs", tmp_path / "state", pair, EventList(), NoCommands)


def latents_of(attempt):
    torch.manual_seed(1)
    latent = attempt.request.shape.latent
    text = TextRows(torch.randn(1, 512, attempt.request.spec.text_encoder.dim), 4)
    return denoise(attempt, text, torch.randn(1, 20, *latent[1:]))


@pytest.fixture
def visits(monkeypatch):
    """("in" or "out", network) for every transformer that comes to the device and leaves it."""
    seen, on_device = [], offload.on_device

    @contextmanager
    def watched(module, device, *, stay=False):
        with on_device(module, device, stay=stay):
            seen.append(("in", module, stay))
            yield
        seen.append(("out", module, stay))

    monkeypatch.setattr(offload, "on_device", watched)
    return seen


@pytest.mark.parametrize(("boundary", "letters"), CASES, ids=[f"{b:g}-{letters}" for b, letters in CASES])
def test_each_step_runs_the_expert_of_the_table_and_one_is_there_at_a_time(
    boundary, letters, pair, machine, tmp_path, visits
):
    attempt = attempt_with(pair, machine, tmp_path, boundary=boundary, steps=len(letters))
    latents_of(attempt)
    assert "".join(LETTERS[step.expert] for step in attempt.send.of("step")) == letters
    names = [f"denoise_{expert}" for expert in ("high", "low") if LETTERS[expert] in letters]
    told = [(phase.name, phase.state) for phase in attempt.send.of("phase")]
    assert told == [(name, state) for name in names for state in ("start", "done")]
    assert [phase.name for phase in attempt.plan.phases if phase.name.startswith("denoise")] == names
    assert [what for what, *_ in visits] == ["in", "out"] * len(names)
    assert len({id(module) for _, module, _ in visits}) == len(names)
    assert not any(stay for *_, stay in visits)


def test_where_the_expert_waits_changes_no_pixel(pair, machine, tmp_path):
    whole, swapped, streamed = (
        latents_of(attempt_with(pair, machine, tmp_path, experts, steps=4, boundary=0.9))
        for experts in ("resident", "swapped", "streamed")
    )
    assert torch.equal(whole, swapped) and torch.equal(whole, streamed)


def test_the_two_experts_are_two_networks(pair, machine, tmp_path):
    early, late = (latents_of(attempt_with(pair, machine, tmp_path, steps=2, boundary=b)) for b in (0.9, 0.95))
    assert not torch.equal(early, late)
