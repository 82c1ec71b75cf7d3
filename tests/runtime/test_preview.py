"""The look at a running clip: decoded where the VAE is at hand, projected linearly where it is not."""

import base64
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scripts.train_demo.captions import held_out_captions
from scripts.train_demo.render import random_clip
from turbodiff.memory_lab.dry_run import Ledger
from turbodiff.models.vae import decode, encode
from turbodiff.runtime.pipeline import make_latents
from turbodiff.runtime.preview import project, show
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import MIB

SCENES = (
    "red circle moves right on a black",
    "blue square moves up on a white",
    "green triangle moves left on a grey",
    "yellow star moves down on a blue",
    "white circle moves right on a red",
    "purple square moves left on a yellow",
)


@pytest.fixture(params=["decoded", "projected"])
def way(request, models, monkeypatch):
    if request.param == "projected":
        monkeypatch.setattr(models, "preview_vae", lambda: None)
    return request.param


def pictures(attempt):
    sent = [base64.b64decode(event.jpeg) for event in attempt.send.of("preview")]
    return [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), dtype=np.float32) for jpeg in sent]


def test_a_preview_comes_before_the_third_of_four_steps(attempt_of, way):
    attempt = attempt_of(steps=4)
    make_latents(attempt)
    told = [(event.type, event.i) for event in attempt.send if event.type in ("step", "preview")]
    assert told.index(("preview", 1)) < told.index(("step", 2)) < told.index(("step", 3))
    assert [i for kind, i in told if kind == "preview"] == [1, 2, 3]  # after the last step the clip itself comes
    assert all(max(picture.shape) == (128 if way == "decoded" else 256) for picture in pictures(attempt))


def test_the_projection_of_encoded_clips_has_the_colours_that_the_vae_decodes(models, attempt_of):
    """Measured, cell by cell: 0.95 R, 0.97 G, 0.95 B."""
    attempt_of()
    vae, random = models.preview_vae(), np.random.default_rng(99)
    pairs = []
    for caption in held_out_captions()[:6]:
        clip = torch.from_numpy(random_clip(caption, random, 5).copy())
        pairs.append(projected_and_decoded(vae, encode(vae, clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)))
    assert min(correlations(pairs)) > 0.9


def test_the_projection_of_generated_clips_has_the_colours_that_the_vae_decodes(models, attempt_of):
    """Measured over six clips: 0.97 R, 0.97 G, 0.90 B."""
    pairs = []
    for seed, scene in enumerate(SCENES):
        latents = make_latents(attempt_of(prompt=f"a {scene} background", seed=seed, steps=4, num_frames=9))
        pairs.append(projected_and_decoded(models.preview_vae(), latents))
    assert min(correlations(pairs)) > 0.85


@torch.inference_mode()
def projected_and_decoded(vae, latents):
    """The second latent frame as colours [3, cells]: projected, and of the third of its four decoded frames."""
    frame = F.interpolate(decode(vae, latents)[:, :, 3], size=latents.shape[-2:], mode="area")
    return project(latents[:, :, 1], find_model("demo"))[0, :, 0].flatten(1), frame[0].flatten(1)


def correlations(pairs):
    """Per colour, over all cells of all pairs."""
    projected, decoded = (torch.cat(sides, dim=1).numpy() for sides in zip(*pairs, strict=True))
    return [np.corrcoef(projected[colour], decoded[colour])[0, 1] for colour in range(3)]


@pytest.mark.parametrize("size", [(90, 160), (256, 256)], ids=["720p", "2048x2048"])
def test_a_projection_takes_less_than_8_mib_and_even_noise_fits_its_event(attempt_of, models, monkeypatch, size):
    attempt = attempt_of()
    monkeypatch.setattr(models, "preview_vae", lambda: None)
    monkeypatch.setattr(models, "spec", find_model("wan2.2-a14b"))
    clean = 3 * torch.randn(1, 16, 3, *size, dtype=torch.float64)
    with torch.inference_mode(), Ledger("cpu") as ledger:
        show(attempt, clean, 1)
    assert ledger.peak_bytes - clean.nbytes < 8 * MIB
    (event,) = attempt.send.of("preview")
    assert len(event.line()) < 16 << 10
    assert max(pictures(attempt)[0].shape) == 256
