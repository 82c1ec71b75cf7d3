"""A picture to start with and one to end with: the condition is that of diffusers' pipeline for Wan's such models."""

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from PIL import Image

from scripts.bench_pipeline import diffusers_vae
from turbodiff.gpu.probe import machine_now
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.runtime.latents_cache import LatentsCache
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.pipeline import as_tensor, encode_image
from turbodiff.spec.errors import RequestError
from turbodiff.spec.request import make_request
from turbodiff.weights.locate import inventory


class NeverStop:
    cancelled: frozenset[int] = frozenset()
    decode_now: frozenset[int] = frozenset()


def pictures(folder):
    """Two pictures of the demo's size and their paths."""
    pixels = np.random.default_rng(3).integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
    paths = [folder / name for name in ("first.png", "last.png")]
    for path, one in zip(paths, pixels, strict=True):
        Image.fromarray(one).save(path)
    return pixels, [str(path) for path in paths]


@pytest.mark.parametrize("with_end", [False, True])
def test_the_condition_is_that_of_diffusers_pipeline(tmp_path, with_end):
    (first, last), (image, end) = pictures(tmp_path)
    fields = {"model": "demo-i2v", "prompt": "a red circle moves right", "image": image, "num_frames": 9, "seed": 1}
    request = make_request({**fields, "end_image": end if with_end else ""})
    plan = plan_request(request, machine_now(), inventory())
    models = ModelCache(Device.pick("cpu"))
    models.open(plan.request)
    job = Attempt(1, 1, plan, tmp_path, tmp_path / "state", models, lambda event: None, NeverStop)
    ours = encode_image(job)
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=diffusers_vae(models.get_or_load("vae")),
        scheduler=UniPCMultistepScheduler(),
        image_processor=None, image_encoder=None, transformer=None,
    )  # fmt: skip
    told = {"last_image": as_tensor(last)} if with_end else {}
    with torch.inference_mode():
        _, theirs = pipe.prepare_latents(
            as_tensor(first), 1, 16, 128, 128, 9, torch.float32, torch.device("cpu"), **told
        )  # fmt: skip
    assert torch.equal(ours[:, :4], theirs[:, :4])
    assert torch.allclose(ours[:, 4:], theirs[:, 4:], atol=1e-4)


def test_latents_of_another_end_picture_are_not_taken_up(tmp_path):
    _, (image, end) = pictures(tmp_path)
    fields = {"model": "demo-i2v", "prompt": "a red circle", "image": image, "num_frames": 5, "seed": 1}
    plan = plan_request(make_request({**fields, "end_image": end}), machine_now(), inventory())
    saved = LatentsCache(tmp_path, 1)
    saved.save(torch.zeros(1, 16, 2, 16, 16), plan)
    assert saved.load(plan.request) is not None
    assert saved.load(plan.request.model_copy(update={"end_image": ""})) is None


def test_models_that_take_no_end_picture_say_so():
    with pytest.raises(RequestError, match="end with"):
        make_request({"model": "Wan2.1-I2V-14B-480P", "prompt": "a cat", "image": "a.png", "end_image": "b.png"})
    with pytest.raises(RequestError, match="end with"):
        make_request({"prompt": "a cat", "end_image": "b.png"})
