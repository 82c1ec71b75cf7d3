"""The whole story on a CPU in seconds: the bundled demo, in this process, through the code that runs Wan on a GPU."""

import hashlib
import json

import pytest
import torch

from turbodiff.archive.clips import read_sidecar
from turbodiff.gpu.probe import machine_now
from turbodiff.plan.planner import plan_request
from turbodiff.runtime import pipeline
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.pipeline import generate
from turbodiff.spec.errors import CancelledByUser, OutOfMemoryError, TurbodiffError
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import inventory

PROMPT = "a red circle moves right on a black background"


class NoCommands:
    """Of a person who lets the job run."""

    cancelled = frozenset()
    decode_now = frozenset()


class EventList(list):
    """Collects events; each must fit its line."""

    def __call__(self, event):
        event.line()
        self.append(event)

    def of(self, kind):
        return [event for event in self if event.type == kind]


@pytest.fixture(scope="module")
def models():
    return ModelCache(Device.pick("cpu"))


def attempt(tmp_path, models, events=None, commands=NoCommands, **fields):
    """Attempt 1 at job 1; nothing of it has happened yet."""
    request = make_request({"prompt": PROMPT, "seed": 7, "steps": 2, "num_frames": 5, **fields})
    plan = plan_request(request, machine_now(), inventory())
    events = EventList() if events is None else events
    return Attempt(1, 1, plan, tmp_path / "outputs", tmp_path / "state", models, events, commands)


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_sentence_becomes_a_verified_clip_with_its_recipe(tmp_path, models):
    result = generate(attempt(tmp_path, models))
    clip = tmp_path / "outputs" / result.path
    assert clip.name.startswith("t2v_7_demo_") and clip.suffix == ".mp4"
    assert hashlib.sha256(clip.read_bytes()).hexdigest() == result.sha256
    assert (result.frames, result.width, result.height) == (5, 128, 128)
    recipe = read_sidecar(clip).request
    assert recipe.prompt == PROMPT and recipe.seed == 7
    assert json.loads((tmp_path / "outputs" / result.sidecar).read_text())["sha256"] == result.sha256
    assert not list((tmp_path / "outputs" / ".partial").iterdir())
    assert not list((tmp_path / "state" / "latents").iterdir())


def test_phases_and_steps_are_told_in_order(tmp_path, models):
    events = EventList()
    generate(attempt(tmp_path, models, events))
    started = [event.name for event in events.of("phase") if event.state == "start"]
    assert started == ["text_encode", "denoise", "vae_decode", "write"]
    assert [(event.i, event.n) for event in events.of("step")] == [(1, 2), (2, 2)]
    assert len(events.of("preview")) == 1
    assert events[0].type == "plan"


def test_one_seed_is_one_clip_also_when_the_prompt_comes_from_the_cache(tmp_path, models):
    first = generate(attempt(tmp_path, models))
    second = generate(attempt(tmp_path, models))
    other = generate(attempt(tmp_path, models, seed=8))
    first_frames, second_frames, other_frames = (frames_of(result) for result in (first, second, other))
    assert first_frames == second_frames != other_frames
    assert first.path != second.path


def frames_of(result):
    import subprocess

    import imageio_ffmpeg

    argv = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", result.path, "-f", "rawvideo", "-"]
    return hashlib.sha256(subprocess.run(argv, capture_output=True, check=True).stdout).hexdigest()


def test_a_second_job_reads_no_weights(tmp_path, models, monkeypatch):
    generate(attempt(tmp_path, models))

    def read(*_args, **_kwargs):
        raise AssertionError("weights were read again")

    monkeypatch.setattr("turbodiff.runtime.model_cache.load_into", read)
    generate(attempt(tmp_path, models, seed=9))


def test_saved_latents_are_decoded_without_sampling_again(tmp_path, models, monkeypatch):

    def full_disk(*_args):
        raise TurbodiffError("no space", code="disk_full")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decode", full_disk)
        with pytest.raises(TurbodiffError):
            generate(attempt(tmp_path, models))
    events = EventList()
    generate(attempt(tmp_path, models, events))
    assert not events.of("step")


def test_cancel_between_steps_leaves_no_file(tmp_path, models):
    class Impatient(NoCommands):
        @property
        def cancelled(self):
            return {1} if events.of("step") else set()

    events = EventList()
    with pytest.raises(CancelledByUser):
        generate(attempt(tmp_path, models, events, Impatient()))
    assert len(events.of("step")) == 1
    assert not [path for path in files(tmp_path) if path.suffix in {".mp4", ".json", ".jpg"}]


def test_stop_and_decode_makes_a_clip_of_the_estimate_so_far(tmp_path, models):
    class Content(NoCommands):
        decode_now = frozenset({1})

    events = EventList()
    result = generate(attempt(tmp_path, models, events, Content, steps=4))
    assert len(events.of("step")) == 1 and result.frames == 5


def test_latents_that_are_no_numbers_are_an_error_that_names_the_step(tmp_path, models, monkeypatch):
    from turbodiff.runtime.denoise import Network

    monkeypatch.setattr(Network, "__call__", lambda self, latents, timesteps: latents * torch.nan)
    with pytest.raises(TurbodiffError) as caught:
        generate(attempt(tmp_path, models))
    assert caught.value.code == "nan_latents"


def test_an_out_of_memory_is_named_oom_with_its_phase(tmp_path, models, monkeypatch):
    from turbodiff.runtime.denoise import Network

    def oom(self, latents, timesteps):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Network, "__call__", oom)
    with pytest.raises(OutOfMemoryError) as caught:
        generate(attempt(tmp_path, models))
    assert caught.value.field == "denoise" and "OOM" in str(caught.value)


@pytest.mark.parametrize("fields", [{"quant_linear": "on"}, {"attention": "sla", "topk": 0.5}, {"sampler": "ode"}])
def test_every_way_of_running_makes_a_clip(tmp_path, models, fields):
    result = generate(attempt(tmp_path, models, **fields))
    assert result.frames == 5
    ran = result.ran.model_dump()
    assert {name: ran.get(name) for name in fields if name in ran} == {
        name: value for name, value in fields.items() if name in ran
    }
