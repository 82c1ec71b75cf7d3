"""The whole story on a CPU in seconds: the bundled demo, in this process, through the code that runs Wan on a GPU."""

import hashlib
import json

import pytest
import torch

from turbodiff.archive.clips import read_sidecar
from turbodiff.gpu.probe import machine_now
from turbodiff.plan.planner import plan_request
from turbodiff.runtime import stages
from turbodiff.runtime.attempt import Job
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.pipeline import generate
from turbodiff.spec.errors import CancelledByUser, OutOfMemoryError, TurbodiffError
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import inventory

PROMPT = "a red circle moves right on a black background"


class Nobody:
    """Orders of a person who lets the job run."""

    def cancelled(self, job):
        return False

    def decode_now(self, job):
        return False


class Ears(list):
    """Collects events; each must fit its line."""

    def __call__(self, event):
        event.line()
        self.append(event)

    def of(self, kind):
        return [event for event in self if event.type == kind]


@pytest.fixture(scope="module")
def shelf():
    return ModelCache(Device.pick("cpu"))


def job(tmp_path, **fields):
    request = make_request({"prompt": PROMPT, "seed": 7, "steps": 2, "num_frames": 5, **fields})
    plan = plan_request(request, machine_now(), inventory())
    return Job(1, 1, plan, tmp_path / "outputs", tmp_path / "state")


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_sentence_becomes_a_verified_clip_with_its_recipe(tmp_path, shelf):
    ears = Ears()
    result = generate(job(tmp_path), shelf, ears, Nobody())
    clip = tmp_path / "outputs" / result.path
    assert clip.name.startswith("t2v_7_demo_") and clip.suffix == ".mp4"
    assert hashlib.sha256(clip.read_bytes()).hexdigest() == result.sha256
    assert (result.frames, result.width, result.height) == (5, 128, 128)
    recipe = read_sidecar(clip).request
    assert recipe.prompt == PROMPT and recipe.seed == 7
    assert json.loads((tmp_path / "outputs" / result.sidecar).read_text())["sha256"] == result.sha256
    assert not list((tmp_path / "outputs" / ".partial").iterdir())
    assert not list((tmp_path / "state" / "latents").iterdir())


def test_phases_and_steps_are_told_in_order(tmp_path, shelf):
    ears = Ears()
    generate(job(tmp_path), shelf, ears, Nobody())
    started = [fields.name for fields in ears.of("phase") if fields.state == "start"]
    assert started == ["text_encode", "denoise", "vae_decode", "write"]
    assert [(fields.i, fields.n) for fields in ears.of("step")] == [(1, 2), (2, 2)]
    assert len(ears.of("preview")) == 1
    assert ears[0].type == "plan"


def test_one_seed_is_one_clip_also_when_the_prompt_comes_from_the_cache(tmp_path, shelf):
    first = generate(job(tmp_path), shelf, Ears(), Nobody())
    second = generate(job(tmp_path), shelf, Ears(), Nobody())
    other = generate(job(tmp_path, seed=8), shelf, Ears(), Nobody())
    first_frames, second_frames, other_frames = (frames_of(result) for result in (first, second, other))
    assert first_frames == second_frames != other_frames
    assert first.path != second.path


def frames_of(result):
    import subprocess

    import imageio_ffmpeg

    argv = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", result.path, "-f", "rawvideo", "-"]
    return hashlib.sha256(subprocess.run(argv, capture_output=True, check=True).stdout).hexdigest()


def test_a_second_job_reads_no_weights(tmp_path, shelf, monkeypatch):
    generate(job(tmp_path), shelf, Ears(), Nobody())

    def read(*_args, **_kwargs):
        raise AssertionError("weights were read again")

    monkeypatch.setattr("turbodiff.runtime.model_cache.load_into", read)
    generate(job(tmp_path, seed=9), shelf, Ears(), Nobody())


def test_saved_latents_are_decoded_without_sampling_again(tmp_path, shelf, monkeypatch):
    broken = job(tmp_path)

    def full_disk(*_args):
        raise TurbodiffError("no space", code="disk_full")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "decode", full_disk)
        with pytest.raises(TurbodiffError):
            generate(broken, shelf, Ears(), Nobody())
    ears = Ears()
    generate(broken, shelf, ears, Nobody())
    assert not ears.of("step")


def test_cancel_between_steps_leaves_no_file(tmp_path, shelf):
    class Impatient(Nobody):
        def cancelled(self, job):
            return bool(ears.of("step"))

    ears = Ears()
    with pytest.raises(CancelledByUser):
        generate(job(tmp_path), shelf, ears, Impatient())
    assert len(ears.of("step")) == 1
    assert not [path for path in files(tmp_path) if path.suffix in {".mp4", ".json", ".jpg"}]


def test_stop_and_decode_makes_a_clip_of_the_estimate_so_far(tmp_path, shelf):
    class Content(Nobody):
        def decode_now(self, job):
            return True

    ears = Ears()
    result = generate(job(tmp_path, steps=4), shelf, ears, Content())
    assert len(ears.of("step")) == 1 and result.frames == 5


def test_latents_that_are_no_numbers_are_an_error_that_names_the_step(tmp_path, shelf, monkeypatch):
    from turbodiff.runtime.network import Network

    monkeypatch.setattr(Network, "__call__", lambda self, latents, timesteps: latents * torch.nan)
    with pytest.raises(TurbodiffError) as caught:
        generate(job(tmp_path), shelf, Ears(), Nobody())
    assert caught.value.code == "nan_latents"


def test_an_out_of_memory_is_named_oom_with_its_phase(tmp_path, shelf, monkeypatch):
    from turbodiff.runtime.network import Network

    def oom(self, latents, timesteps):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Network, "__call__", oom)
    with pytest.raises(OutOfMemoryError) as caught:
        generate(job(tmp_path), shelf, Ears(), Nobody())
    assert caught.value.field == "denoise" and "OOM" in str(caught.value)


@pytest.mark.parametrize("fields", [{"quant_linear": "on"}, {"attention": "sla", "topk": 0.5}, {"sampler": "ode"}])
def test_every_way_of_running_makes_a_clip(tmp_path, shelf, fields):
    result = generate(job(tmp_path, **fields), shelf, Ears(), Nobody())
    assert result.frames == 5
    assert {name: result.ran.get(name) for name in fields if name in result.ran} == {
        name: value for name, value in fields.items() if name in result.ran
    }
