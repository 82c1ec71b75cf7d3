"""LoRAs on the demo's transformer: everybody's names, merged or beside INT8, and off again without a trace."""

import pytest
import torch
from safetensors.torch import save_file
from turbodiff_kernels.quant import dequantize_tiles

from tests.weights import tiny
from turbodiff.models.linear import Int8Linear, to_int8
from turbodiff.runtime import offload
from turbodiff.runtime.denoise import Network, denoise
from turbodiff.runtime.loras import apply_loras, loras_for
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.text import TextRows
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.experts import Expert
from turbodiff.spec.plan import Levers
from turbodiff.spec.request import Lora, make_request
from turbodiff.weights import keymaps
from turbodiff.weights.lora import read_lora

RANK, ALPHA = 4, 2.0
MODULES = ("blocks.0.self_attn.q", "blocks.0.ffn.2", "blocks.3.cross_attn.v", "head.head")
CPU = torch.device("cpu")


@pytest.fixture
def dit(models, attempt_of):
    attempt_of()
    return models.get_or_load("dit")


def shapes_of(dit):
    return {
        name: tuple(layer.weight.shape) for name, layer in dit.named_modules() if isinstance(layer, torch.nn.Linear)
    }


def halves(dit, modules=MODULES, rank=RANK):
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(dit)
    return {
        module: (
            torch.randn(rank, shapes[module][1], generator=generator) / 16,
            torch.randn(shapes[module][0], rank, generator=generator) / 16,
        )
        for module in modules
    }


def file_of(pairs, path, rename=lambda name: f"diffusion_model.{name}", down="lora_down", up="lora_up", alpha=ALPHA):
    state = {}
    for module, (a, b) in pairs.items():
        state |= {f"{rename(module)}.{down}.weight": a.clone(), f"{rename(module)}.{up}.weight": b.clone()}
        state |= {} if alpha is None else {f"{rename(module)}.alpha": torch.tensor(alpha)}
    save_file(state, path)
    return str(path)


def velocity(dit, levers=None):
    torch.manual_seed(1)
    with torch.inference_mode(), offload.dit_on_device(dit, CPU, levers or Levers()) as blocks:
        network = Network(PlacedDit(dit, blocks, ()), CPU, TextRows(torch.randn(1, 8, 128), 8))
        return network(torch.randn(1, 16, 2, 8, 8), torch.full((1, 1), 800.0))


def diffusers(module):
    return "transformer." + tiny.inverse(keymaps.names_from("dit", "diffusers"))[module]


LAYOUTS = {
    "comfy": {},
    "kohya": {"rename": lambda name: "lora_unet_" + name.replace(".", "_")},
    "peft": {"rename": lambda name: f"base_model.model.{name}", "down": "lora_A", "up": "lora_B"},
    "peft adapter": {"rename": lambda name: name, "down": "lora_A.default", "up": "lora_B.default"},
    "diffusers": {"rename": diffusers, "down": "lora_A", "up": "lora_B"},
    "old diffusers": {"rename": diffusers, "down": "lora.down", "up": "lora.up"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everybodys_names_mean_the_same_pairs(dit, tmp_path, layout):
    pairs = halves(dit)
    read = read_lora(file_of(pairs, tmp_path / "a.safetensors", **LAYOUTS[layout]), shapes_of(dit))
    assert not read.unknown and set(read.changes) == set(pairs)
    for module, (down, up) in pairs.items():
        (pair,) = read.changes[module]
        assert torch.equal(pair.down, down) and torch.equal(pair.up, up) and pair.scale == ALPHA / RANK


def test_a_merge_adds_alpha_over_rank_times_strength(dit, tmp_path):
    pairs = halves(dit)
    path = file_of(pairs, tmp_path / "a.safetensors")
    changed = apply_loras(dit, [Lora(path=path, strength=0.5)], Expert.SINGLE).network
    for module, (down, up) in pairs.items():
        expected = dit.get_submodule(module).weight + 0.5 * ALPHA / RANK * up @ down
        assert torch.allclose(changed.get_submodule(module).weight, expected, atol=1e-6)
    assert changed.blocks[1].self_attn.q.weight is dit.blocks[1].self_attn.q.weight


DIFFERENCES = {
    "blocks.1.norm3.weight": "blocks.1.norm3.diff",
    "blocks.1.norm3.bias": "blocks.1.norm3.diff_b",
    "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
    "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
    "blocks.2.modulation": "blocks.2.modulation.diff",
    "patch_embedding.weight": "patch_embedding.diff",
}


def with_differences(dit, path, **layout):
    """The file of `halves`, and beside it whole differences of all ones; the patch embedding's as a convolution."""
    from safetensors.torch import load_file

    state = load_file(file_of(halves(dit), path, **layout))
    rename = layout.get("rename", lambda name: f"diffusion_model.{name}")
    for name, stored in DIFFERENCES.items():
        value = torch.ones_like(dit.get_parameter(name))
        module, _, ending = stored.rpartition(".")
        state[f"{rename(module)}.{ending}"] = value.view(-1, 16, 1, 2, 2) if "patch" in name else value
    save_file(state, path)
    return str(path)


@pytest.mark.parametrize("layout", ["comfy", "kohya"])
def test_whole_differences_of_weights_and_biases_are_added(dit, tmp_path, layout):
    path = with_differences(dit, tmp_path / "a.safetensors", **LAYOUTS[layout])
    changed = apply_loras(dit, [Lora(path=path, strength=0.5), Lora(path=path, strength=0.25)], Expert.SINGLE)
    assert not changed.notes
    for name in DIFFERENCES:
        assert torch.equal(changed.network.get_parameter(name), (dit.get_parameter(name).float() + 0.75)), name
    down, up = halves(dit)["blocks.0.self_attn.q"]
    expected = dit.blocks[0].self_attn.q.weight + 0.75 * ALPHA / RANK * up @ down
    assert torch.allclose(changed.network.blocks[0].self_attn.q.weight, expected, atol=1e-6), "and its pair with it"
    assert changed.network.blocks[3].norm3.bias is dit.blocks[3].norm3.bias


def test_int8_takes_differences_of_biases_and_of_weights(attempt_of, models, dit, tmp_path):
    path = with_differences(dit, tmp_path / "a.safetensors")
    from safetensors.torch import load_file

    step = torch.full((1024, 256), 1e-3)
    save_file(load_file(path) | {"diffusion_model.blocks.0.ffn.0.diff": step}, path)
    models.open(attempt_of().request.model_copy(update={"quant_linear": "on"}))
    int8 = models.get_or_load("dit")
    changed = apply_loras(int8, [Lora(path=path)], Expert.SINGLE)
    assert not changed.notes
    branch = changed.network.blocks[0].self_attn.q
    assert branch.down is not None
    assert torch.equal(branch.bias, int8.blocks[0].self_attn.q.bias + 1)
    before, after = (
        dequantize_tiles(layer.int8_weight, layer.scale)
        for layer in (int8.blocks[0].ffn[0], changed.network.blocks[0].ffn[0])
    )
    assert abs((after - before).mean().item() - 1e-3) < 1e-4, "a step far below INT8's own survives on average"
    assert (after - before - 1e-3).abs().max() < 1.6 * int8.blocks[0].ffn[0].scale.max()


def test_a_difference_of_another_shape_is_one_error(dit, tmp_path):
    save_file({"diffusion_model.blocks.0.norm3.diff": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(FileError) as caught:
        apply_loras(dit, [Lora(path=str(tmp_path / "a.safetensors"))], Expert.SINGLE)
    assert caught.value.code == "lora_shape" and "norm3.diff [3] for [256]" in caught.value.got


def test_strengths_scale_the_change_and_it_comes_off_without_a_trace(dit, tmp_path):
    path = file_of(halves(dit), tmp_path / "a.safetensors")
    before = velocity(dit)
    weights = {name: value.clone() for name, value in dit.state_dict().items()}
    change = [
        (velocity(apply_loras(dit, [Lora(path=path, strength=strength)], Expert.SINGLE).network) - before).norm().item()
        for strength in (0.5, 1.0)
    ]
    assert 0 < change[0] < change[1]
    assert torch.equal(velocity(dit), before)
    assert all(torch.equal(value, weights[name]) for name, value in dit.state_dict().items())


def test_two_loras_add_up(dit, tmp_path):
    path = file_of(halves(dit), tmp_path / "a.safetensors")
    twice = apply_loras(dit, [Lora(path=path), Lora(path=path, strength=0.5)], Expert.SINGLE).network
    once = apply_loras(dit, [Lora(path=path, strength=1.5)], Expert.SINGLE).network
    assert torch.allclose(velocity(twice), velocity(once), atol=1e-5)


def test_a_branch_beside_int8_is_the_merge_within_what_int8_loses(tmp_path):
    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 128)
    down, up = torch.randn(RANK, 256) / 16, torch.randn(128, RANK) / 16
    x = torch.randn(2, 40, 256)
    expected = torch.nn.functional.linear(x, plain.weight + up @ down, plain.bias)
    layer = to_int8(plain, "tiles")
    without = layer(x)
    layer.add_low_rank(down, up)
    beside = layer(x)
    assert (beside - expected).norm() / expected.norm() < 0.02
    assert (without - expected).norm() / expected.norm() > 0.05


def test_int8_blocks_wear_branches_and_stream_through_one_slot(attempt_of, models, tmp_path):
    plain = attempt_of()
    dit = models.get_or_load("dit")
    path = file_of(halves(dit), tmp_path / "a.safetensors")
    changed = apply_loras(dit, [Lora(path=path)], Expert.SINGLE).network
    models.open(plain.request.model_copy(update={"quant_linear": "on"}))
    int8 = models.get_or_load("dit")
    before = velocity(int8)
    branched = apply_loras(int8, [Lora(path=path)], Expert.SINGLE).network
    assert branched.blocks[5].ffn[2].down is not None
    assert isinstance(int8.blocks[0].ffn[2], Int8Linear) and int8.blocks[0].ffn[2].down is None
    whole = velocity(branched)
    assert (whole - velocity(changed)).norm() < 0.5 * (whole - before).norm()
    assert torch.equal(velocity(branched, Levers(experts="streamed", blocks_resident=1)), whole)
    assert torch.equal(velocity(int8), before)


def test_a_clip_with_strength_nought_is_the_clip_without_and_one_file_serves_both(attempt_of, dit, tmp_path):
    path = file_of(halves(dit), tmp_path / "a.safetensors")
    text = TextRows(torch.randn(1, 512, 128), 8)
    without, full, half, nought, again = (
        denoise(attempt_of(steps=1, loras=loras), text, None)
        for loras in ([], [{"path": path}], [{"path": path, "strength": 0.5}], [{"path": path, "strength": 0}], [])
    )
    assert torch.equal(without, nought) and torch.equal(without, again)
    assert not torch.equal(without, full) and not torch.equal(full, half)


def test_names_without_a_place_are_one_notice_and_a_foreign_file_one_error(attempt_of, dit, tmp_path):
    pairs = halves(dit)
    shapes = shapes_of(dit)
    state = {f"lora_te_layer_{i}.lora_down.weight": torch.zeros(4, 4) for i in range(9)}
    good = {f"diffusion_model.{name}.lora_A.weight": a for name, (a, _) in pairs.items()}
    good |= {f"diffusion_model.{name}.lora_B.weight": b for name, (_, b) in pairs.items()}
    save_file(state | good, tmp_path / "some.safetensors")
    save_file(state, tmp_path / "none.safetensors")
    attempt = attempt_of(steps=1, loras=[{"path": str(tmp_path / "some.safetensors")}])
    denoise(attempt, TextRows(torch.randn(1, 512, 128), 8), None)
    (notice,) = attempt.send.of("notice")
    assert "9 names not used" in notice.text and "and 4 more" in notice.text
    with pytest.raises(FileError) as caught:
        read_lora(tmp_path / "none.safetensors", shapes)
    assert caught.value.code == "lora_foreign" and "and 4 more" in caught.value.got


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda state: state.pop("diffusion_model.blocks.0.ffn.2.lora_up.weight"), "lora_half"),
        (lambda state: state.update({"diffusion_model.head.head.alpha": torch.tensor([1.0, 2.0])}), "lora_alpha"),
        (lambda state: state.update({"diffusion_model.head.head.alpha": torch.tensor(torch.nan)}), "lora_nan"),
        (lambda state: state["diffusion_model.head.head.lora_up.weight"].fill_(torch.inf), "lora_nan"),
        (lambda state: state.update({"diffusion_model.head.head.oft_blocks": torch.zeros(3, 4)}), "lora_algorithm"),
        (
            lambda state: state.update(
                {"diffusion_model.head.head.lora_up.weight": torch.zeros(64, 4, dtype=torch.int8)}
            ),
            "lora_dtype",
        ),
    ],
)
def test_each_damage_is_one_error_that_names_the_key(dit, tmp_path, damage, code):
    from safetensors.torch import load_file

    path = file_of(halves(dit), tmp_path / "a.safetensors")
    state = load_file(path)
    damage(state)
    save_file(state, path)
    with pytest.raises(FileError) as caught:
        read_lora(path, shapes_of(dit))
    assert caught.value.code == code and "diffusion_model." in caught.value.got


def test_each_expert_wears_its_own():
    fields = {"prompt": "x", "model": "Wan2.2-A14B", "image": "cat.jpg"}
    request = make_request(
        {**fields, "loras": [{"path": "h", "expert": "high"}, {"path": "b"}, {"path": "0", "strength": 0}]}
    )
    assert [lora.path for lora in loras_for(request, Expert.HIGH)] == ["h", "b"]
    assert [lora.path for lora in loras_for(request, Expert.LOW)] == ["b"]
    with pytest.raises(RequestError):
        loras_for(make_request({"prompt": "x", "loras": [{"path": "h", "expert": "high"}]}), Expert.SINGLE)


def test_one_file_for_both_experts_gives_each_its_part(dit, tmp_path):
    pairs = halves(dit, MODULES[:1])
    first = file_of(pairs, tmp_path / "1.safetensors", diffusers, "lora_A", "lora_B", None)
    second = file_of(
        {name: (2 * a, b) for name, (a, b) in pairs.items()}, tmp_path / "2.safetensors",
        lambda name: diffusers(name).replace("transformer.", "transformer_2."), "lora_A", "lora_B", None,
    )  # fmt: skip
    from safetensors.torch import load_file

    save_file(load_file(first) | load_file(second), tmp_path / "both.safetensors")
    high, low = (read_lora(tmp_path / "both.safetensors", shapes_of(dit), expert) for expert in ("high", "low"))
    (module,) = pairs
    (of_high,), (of_low,) = high.changes[module], low.changes[module]
    assert torch.equal(2 * of_high.down, of_low.down)
    assert not high.unknown and not low.unknown and of_high.scale == 1.0


def test_a_merge_keeps_the_dtype(tmp_path):
    layer = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)})
    torch.nn.init.ones_(layer["q"].weight)
    path = file_of({"q": (torch.ones(1, 4), torch.ones(3, 1))}, tmp_path / "a.safetensors", alpha=2.0)
    changed = apply_loras(layer, [Lora(path=path)], Expert.SINGLE).network
    assert torch.equal(changed["q"].weight, torch.full((3, 4), 3, dtype=torch.bfloat16))
