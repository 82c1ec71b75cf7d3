"""The VAE and the text encoder load from the layouts that Wan, diffusers, transformers and ComfyUI publish."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.weights import tiny
from turbodiff.models.text_encoder import make_text_encoder
from turbodiff.models.vae import make_vae
from turbodiff.spec.errors import FileError
from turbodiff.spec.models import TextFacts
from turbodiff.weights import keymaps
from turbodiff.weights.detect import open_checkpoint
from turbodiff.weights.load import load_into

TEXT = TextFacts(dim=32, dim_attn=32, dim_ffn=48, num_heads=2, num_layers=2, vocab=64)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_the_vae_loads_from_both_layouts(layout: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        module = make_vae(base_dim=4)
    state = random_state(module)
    saved = tiny.renamed(state, keymaps.names_from("vae", "wan")) if layout == "wan" else state
    loaded = load_into(module, tiny.save_pth(saved, tmp_path / "v.pth"), dtype=torch.float32, component="vae")
    assert (loaded.checkpoint.layout, dict(loaded.checkpoint.numbers)) == (layout, {"base_dim": 4, "z_dim": 16})
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def encoder_state(layout: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    once = {name: value for name, value in state.items() if name != "encoder.embed_tokens.weight"}
    if layout == "wan":
        return tiny.renamed(once, keymaps.names_from("text_encoder", "wan"))
    if layout == "transformers":
        return once
    result: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    for name, value in once.items():
        scaled = ".q." in name
        result[name] = (value / 2).to(torch.float8_e4m3fn) if scaled else value
        if scaled:
            result[name.removesuffix("weight") + "scale_weight"] = torch.tensor([2.0])
    return result


@pytest.mark.parametrize("layout", ["wan", "transformers", "transformers-fp8"])
def test_the_text_encoder_loads_from_three_layouts(layout: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        module = make_text_encoder(TEXT)
    state = random_state(module)
    path = tiny.save_safetensors(encoder_state(layout, state), tmp_path / "t.safetensors")
    loaded = load_into(module, path, dtype=torch.float32)
    assert loaded.checkpoint.layout == layout
    assert loaded.checkpoint.numbers.items() <= TEXT.model_dump().items()
    for name, value in module.state_dict().items():
        rounded = layout.endswith("fp8") and ".q." in name
        expected = (state[name] / 2).to(torch.float8_e4m3fn).float() * 2 if rounded else state[name]
        assert torch.equal(value, state["shared.weight"] if "embed_tokens" in name else expected), name
    first, second = (module.state_dict()[name] for name in keymaps.UMT5_TIED)
    assert first.data_ptr() == second.data_ptr(), "the embedding is in memory once"


def test_another_part_of_the_model_is_refused_by_name(tmp_path: Path) -> None:
    path = tiny.write("wan.pth", tmp_path)
    with pytest.raises(FileError) as caught:
        open_checkpoint(path, "vae")
    assert (caught.value.got, caught.value.expected) == ("a Wan DiT", "the Wan2.1 VAE")


@pytest.mark.parametrize(
    ("component", "dialect"),
    [
        ("dit", "diffusers"),
        ("dit", "fastvideo"),
        ("vae", "wan"),
        ("text_encoder", "wan"),
        ("text_encoder", "llama.cpp"),
        ("image_encoder", "wan"),
    ],
)
def test_every_table_is_one_to_one(component: str, dialect: str) -> None:
    there = keymaps.names_from(component, dialect)
    back = tiny.inverse(there)
    assert there
    assert all(keymaps.rename(f"{keymaps.rename(f'{name}.weight', there)}", back) == f"{name}.weight" for name in there)
