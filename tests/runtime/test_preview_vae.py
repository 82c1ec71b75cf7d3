"""Small VAEs of Wan's latents for previews: known by keys and shapes, run in host memory, never taken for the VAE."""

import base64
import io

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.test_tiny import EventList, attempt
from tests.weights import tiny
from turbodiff.models.tiny_vae import TinyDecoder
from turbodiff.models.vae import make_vae
from turbodiff.runtime import preview
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.spec.models import all_models, find_model
from turbodiff.weights import keymaps, locate
from turbodiff.weights.fit import network_shapes

WAN = {spec.name for spec in all_models() if spec.vae.base_dim == 96}


def tae(_, path):
    torch.manual_seed(0)
    state = TinyDecoder().state_dict() | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}
    return tiny.save_pth({name: value.half() for name, value in state.items()}, path / "taew2_1.pth")


def light(layout, path):
    torch.manual_seed(0)
    state = make_vae(base_dim=24).state_dict()
    named = tiny.renamed(state, keymaps.names_from("vae", "wan")) if layout == "wan" else state
    return tiny.save_safetensors(named, path / "lightvaew2_1.safetensors")


@pytest.mark.parametrize(("make", "layout"), [(tae, "taehv"), (light, "wan"), (light, "diffusers")])
def test_a_small_vae_is_for_previews_of_wan_and_nothing_else(tmp_path, make, layout):
    path = make(layout, tmp_path)
    found = locate.inventory([tmp_path])
    here = [file for file in found.files if file.path == str(path)]
    assert {file.model for file in here} == WAN and {file.component for file in here} == {"preview_vae"}
    assert {file.layout for file in here} == {layout} and not found.passed_over


def test_a_small_decoder_of_other_latents_is_named(tmp_path):
    state = dict(TinyDecoder().state_dict())
    state["decoder.1.weight"] = torch.zeros(256, 48, 3, 3)
    tiny.save_safetensors(state, tmp_path / "taew2_2.safetensors")
    (one,) = locate.inventory([tmp_path]).passed_over
    assert one.code == "no_model"


def test_the_shapes_are_those_of_the_published_file():
    state = {name: tuple(value.shape) for name, value in TinyDecoder().state_dict().items()}
    assert network_shapes(find_model("wan2.1-14b"), "tiny_vae", False, False) == state
    assert state["decoder.1.weight"] == (256, 16, 3, 3) and state["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    grown = [state[f"decoder.{place}.conv.weight"] for place in (7, 13, 19)]
    assert grown == [(256, 256, 1, 1), (256, 128, 1, 1), (128, 64, 1, 1)]
    narrowed = [state[f"decoder.{place}.weight"][:2] for place in (8, 14, 20, 22)]
    assert narrowed == [(128, 256), (64, 128), (64, 64), (3, 64)]
    assert sum(name.endswith(".bias") for name in state) == 29  # 9 blocks of three convolutions, the first, the last


def test_the_frame_is_the_last_of_four_made_one_after_the_other():
    torch.manual_seed(1)
    decoder = TinyDecoder()
    w, z = decoder.state_dict(), torch.randn(1, 16, 3, 5)

    def conv(x, name, padding=1):
        return F.conv2d(x, w[f"decoder.{name}.weight"], w.get(f"decoder.{name}.bias"), padding=padding)

    def stage(frames, first, times):
        """Frame by frame: three blocks with a memory each, twice the size, `times` frames of each, a convolution."""
        made, memories = [], [torch.zeros_like(frames[0])] * 3
        for x in frames:
            for place in range(3):
                y, memory, block = torch.cat((x, memories[place]), 1), x, f"{first + place}.conv"
                y = conv(F.relu(conv(F.relu(conv(y, f"{block}.0")), f"{block}.2")), f"{block}.4")
                x, memories[place] = F.relu(x + y), memory
            x = F.interpolate(x, scale_factor=2)
            made += [conv(part, first + 5) for part in conv(x, f"{first + 4}.conv", 0).chunk(times, 1)]
        return made

    frames = [F.relu(conv(3 * torch.tanh(z / 3), 1))]
    for first, times in ((3, 1), (9, 2), (15, 2)):
        frames = stage(frames, first, times)
    assert len(frames) == 4
    want = 2 * conv(F.relu(frames[-1]), 22) - 1
    assert torch.allclose(decoder(z)[:, :, 0], want, atol=1e-5)


@pytest.mark.parametrize("make", [tae, light], ids=["taehv", "light"])
def test_previews_are_decoded_by_the_small_vae_where_it_is_present(tmp_path, monkeypatch, make):
    folder = tmp_path / "weights"
    folder.mkdir()
    path = make("wan", folder)
    monkeypatch.setattr("turbodiff.weights.look.WAN_VAE_DIM", find_model("demo").vae.base_dim)
    monkeypatch.setenv(locate.ROOTS_VARIABLE, str(folder))
    models, events = ModelCache(Device.pick("cpu")), EventList()
    running = attempt(tmp_path, models, events, steps=2)
    models.open(running.request)
    small = models.preview_vae()
    assert next(small.parameters()).dtype == torch.float32
    latents = torch.randn(1, 16, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    preview.show(running, latents, 1)
    monkeypatch.setattr(Device, "is_cuda", property(lambda self: True))
    assert models.preview_vae() is small, "on a card as well: it takes nothing there"
    monkeypatch.setattr(Device, "is_cuda", property(lambda self: False))
    models.open(running.request)
    path.unlink()
    models._kept.clear()
    preview.show(running, latents, 2)  # the demo's own VAE
    first, second = (Image.open(io.BytesIO(base64.b64decode(event.jpeg))) for event in events.of("preview"))
    assert first.size == second.size == (128, 128) and first.tobytes() != second.tobytes()
