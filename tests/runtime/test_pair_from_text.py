"""Text to video with two experts, as Wan2.2 T2V-A14B: from a sentence to a verified clip at the demo's size."""

import shutil
from pathlib import Path

import pytest

from tests.test_tiny import EventList, attempt
from tests.weights import formats
from turbodiff.archive.clips import read_sidecar
from turbodiff.runtime.device import Device
from turbodiff.runtime.model_cache import ModelCache
from turbodiff.runtime.pipeline import generate
from turbodiff.spec.models import configs_folder
from turbodiff.weights import locate


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model "pair" of the demo's sizes with the two experts of A14B's text to video, named as people name them."""
    configs = tmp_path / "configs"
    shutil.copytree(configs_folder(), configs)
    demo = (configs / "models" / "demo.toml").read_text()
    wan = (configs / "models" / "wan2.2-t2v-a14b.toml").read_text()
    assert 'experts = ["high", "low"]' in wan and 'kind = "t2v"' in wan and "turbo = false" in wan
    text = demo.replace('name = "demo"', 'name = "pair"').replace('"Demo"', '"Pair"').replace('"turbodiff-demo"', "")
    text = text.replace("bundled = true", 'experts = ["high", "low"]')
    dit = text[text.index('[[files]]\ncomponent = "dit"') : text.index('[[files]]\ncomponent = "vae"')]
    both = "".join(
        dit.replace('"dit"', f'"dit_{side}"').replace("dit_t2v", f"{side}_noise") for side in ("high", "low")
    )
    (configs / "models" / "pair.toml").write_text(text.replace(dit, both))
    folder, bundle = tmp_path / "weights", locate.bundled_root()
    folder.mkdir()
    for name in ("vae.safetensors", "umt5.safetensors", "spiece.model"):
        shutil.copy(bundle / name, folder / name)
    for name in ("Wan2.2-T2V-A14B-HighNoise.safetensors", "Wan2.2-T2V-A14B-LowNoise.safetensors"):
        shutil.copy(bundle / "dit_t2v.safetensors", folder / name)
    monkeypatch.setenv("TURBODIFF_CONFIGS", str(configs))
    monkeypatch.setenv(locate.ROOTS_VARIABLE, str(folder))
    return folder


def test_two_experts_without_a_picture_make_a_clip(pair: Path, tmp_path: Path) -> None:
    found = locate.inventory()
    assert Path(found.of("pair", "dit_high").path).name == "Wan2.2-T2V-A14B-HighNoise.safetensors"
    assert Path(found.of("pair", "dit_low").path).name == "Wan2.2-T2V-A14B-LowNoise.safetensors"
    assert found.of("demo", "dit") and pair not in Path(found.of("demo", "dit").path).parents
    events = EventList()
    running = attempt(tmp_path, ModelCache(Device.pick("cpu")), events, model="pair", steps=4)
    result = generate(running)
    started = [event.name for event in events.of("phase") if event.state == "start"]
    assert started == ["text_encode", "denoise_high", "denoise_low", "vae_decode", "write"]
    recipe = read_sidecar(tmp_path / "outputs" / result.path).request
    assert (recipe.model, result.frames) == ("pair", 5)


def test_comfys_text_encoder_brings_its_own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, folder = locate.bundled_root(), tmp_path / "weights"
    folder.mkdir()
    for name in ("vae.safetensors", "dit_t2v.safetensors"):
        shutil.copy(bundle / name, folder / name)
    formats.safetensors(formats.umt5_comfy()[0], folder / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    monkeypatch.setattr(locate, "bundled_root", lambda: folder)
    result = generate(attempt(tmp_path, ModelCache(Device.pick("cpu")), steps=1))
    assert result.frames == 5
