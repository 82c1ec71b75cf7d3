"""Every layout loads to the same parameters and the same forward pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.weights import tiny
from turbodiff.models.wan_dit import WanDiT
from turbodiff.spec.errors import FileError
from turbodiff.weights.detect import open_checkpoint
from turbodiff.weights.load import load_into

PLAIN = [
    name for name, (_, _, _, layout) in tiny.LAYOUTS.items() if layout in {"wan", "turbowan", "diffusers", "fastvideo"}
]


def load(path: Path, dtype: torch.dtype = torch.float32, **changes: bool) -> WanDiT:
    checkpoint = open_checkpoint(path, "dit")
    config = replace(tiny.CONFIG, quant_linear=checkpoint.quant, **changes)
    with torch.device("meta"):
        module = WanDiT(config)
    return load_into(module, checkpoint, dtype=dtype).module


@torch.no_grad()
def forward(model: WanDiT) -> torch.Tensor:
    torch.manual_seed(1)
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 32)
    return model(latents, torch.tensor([[500.0]]), text)


@pytest.mark.parametrize("layout", PLAIN)
def test_a_layout_loads_to_the_parameters_it_was_made_from(layout: str, tmp_path: Path) -> None:
    model = load(tiny.write(layout, tmp_path), sla=False)
    expected = tiny.dit_state(sla=False)
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("layout", PLAIN)
def test_a_layout_gives_the_same_velocity(layout: str, tmp_path: Path) -> None:
    oracle = WanDiT(replace(tiny.CONFIG, sla=False))
    oracle.load_state_dict(tiny.dit_state(sla=False))
    assert torch.equal(forward(load(tiny.write(layout, tmp_path), sla=False)), forward(oracle))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_layout_and_sizes_are_told_from_keys_and_shapes(layout: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write(layout, tmp_path))
    numbers = {
        "dim": 128, "in_dim": 16, "ffn_dim": 256, "num_layers": 2, "out_dim": 16, "text_dim": 32, "freq_dim": 64,
        "head_dim": 128 if checkpoint.sla else 0, "image_dim": 0,
    }  # fmt: skip
    assert (checkpoint.component, checkpoint.layout, checkpoint.numbers) == ("dit", tiny.LAYOUTS[layout][3], numbers)
    assert checkpoint.quant == layout.endswith("quant")
    assert not checkpoint.unknown


def test_quantised_weights_stay_int8_and_norms_become_float32(tmp_path: Path) -> None:
    model = load(tiny.write("turbowan-quant", tmp_path), torch.bfloat16)
    layer = model.blocks[0].self_attn.q
    assert (layer.int8_weight.dtype, layer.scale.dtype, layer.bias.dtype) == (torch.int8, torch.float32, torch.bfloat16)
    assert model.blocks[0].norm3.weight.dtype == model.blocks[0].self_attn.norm_q.weight.dtype == torch.float32
    assert model.blocks[0].modulation.dtype == torch.float32  # as stored
    assert model.head.head.weight.dtype == torch.bfloat16
    assert forward(model).isfinite().all()


def test_int8_in_the_names_of_diffusers_is_the_same_network(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ours, theirs = (load(tiny.write(name, tmp_path / "a")) for name in ("turbowan-quant", "diffusers-quant"))
    assert torch.equal(forward(ours), forward(theirs))


def test_scaled_fp8_is_multiplied_by_its_scale(tmp_path: Path) -> None:
    model = load(tiny.write("comfy fp8", tmp_path), sla=False)
    expected = tiny.dit_state()["blocks.0.ffn.0.weight"]
    assert torch.equal(model.blocks[0].ffn[0].weight, (expected / 0.5).to(torch.float8_e4m3fn).float() * 0.5)


def test_plain_wan_gets_a_linear_branch_of_zeros_where_one_is_wanted(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = WanDiT(tiny.CONFIG)
    loaded = load_into(module, tiny.write("wan.pth", tmp_path), dtype=torch.float32)
    assert not module.blocks[1].self_attn.proj_l.weight.any()
    assert "zero" in loaded.notes[0]


def test_parameters_are_the_file_itself(tmp_path: Path) -> None:
    path = tiny.write("turbowan.pth", tmp_path)
    model = load(path)
    info = open_checkpoint(path).info("head.head.bias")
    assert info.offset % 64 == 0, "torch aligns the members of its zip files"
    with path.open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\0" * info.nbytes)
    assert not model.head.head.bias.any()


def test_a_strided_tensor_of_a_pickle_keeps_its_values(tmp_path: Path) -> None:
    state = tiny.dit_state()
    state["head.head.weight"] = state["head.head.weight"].t().contiguous().t()
    shared = torch.randn(2, 128)
    state["blocks.0.norm3.bias"], state["blocks.1.norm3.bias"] = shared[0], shared[1]
    model = load(tiny.save_pth(state, tmp_path / "a.pth"))
    assert torch.equal(model.head.head.weight, tiny.dit_state()["head.head.weight"])
    assert torch.equal(model.blocks[1].norm3.bias, shared[1])


def test_a_file_of_another_size_names_the_first_key_and_both_shapes(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = WanDiT(replace(tiny.CONFIG, ffn_dim=512))
    with pytest.raises(FileError) as caught:
        load_into(module, tiny.write("turbowan.pth", tmp_path), dtype=torch.float32)
    assert caught.value.code == "key_shape"
    assert "blocks.0.ffn.0.weight" in caught.value.field
    assert (caught.value.got, caught.value.expected) == ("[256, 128]", "[512, 128]")


def test_a_checkpoint_that_did_not_change_is_read_once(tmp_path: Path) -> None:
    path = tiny.write("turbowan.pth", tmp_path)
    first = open_checkpoint(path)
    assert open_checkpoint(path, "dit") is first
    tiny.save_pth(tiny.quant(tiny.dit_state()), path)
    assert open_checkpoint(path).quant and not first.quant
