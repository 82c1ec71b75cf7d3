"""LoRA files of every published form on a tiny DiT: the change that the formula says, or one clear error."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.weights import tiny
from tests.weights.lora_formats import ALPHA, FORMS, LAYERS, RANK, halves, named
from turbodiff.models.linear import int8_blocks
from turbodiff.models.wan_dit import WanDiT
from turbodiff.plan.weight_sizes import lora_bytes
from turbodiff.runtime.loras import apply_loras
from turbodiff.spec.errors import FileError
from turbodiff.spec.experts import Expert
from turbodiff.spec.models import Inventory, LoraFit, find_model
from turbodiff.spec.request import Lora
from turbodiff.weights.lora_fit import found_lora, lora_fits
from turbodiff.weights.lora_strength import strengths

LAYER = "blocks.0.self_attn.q"
DEMO, FACTS = find_model("demo"), ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "in_dim", "out_dim")
SPEC = DEMO.model_copy(
    update={
        "dit": DEMO.dit.model_copy(update={name: getattr(tiny.CONFIG, name) for name in FACTS}),
        "text_encoder": DEMO.text_encoder.model_copy(update={"dim": tiny.CONFIG.text_dim}),
    }
)


def said_before(path: Path) -> LoraFit:
    """What the header alone tells."""
    (fit,) = lora_fits(path, SPEC)
    return fit


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    network = WanDiT(tiny.CONFIG)
    network.load_state_dict(tiny.dit_state())
    return network.requires_grad_(False).eval()


def change(network: nn.Module, path: Path, expert: Expert = Expert.SINGLE, **fields: object) -> dict[str, Tensor]:
    """What a LoRA adds to each parameter that it changes; no word of it may be left out."""
    made = apply_loras(network, [Lora(path=str(path), **fields)], expert)
    assert not made.notes
    assert said_before(path).why is None or expert is not Expert.SINGLE
    before = network.state_dict()
    after = made.network.state_dict()
    return {name: after[name] - before[name] for name in before if after[name] is not before[name]
            and not torch.equal(after[name], before[name])}  # fmt: skip


def saved(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)
    return path


@pytest.mark.parametrize("name", FORMS)
def test_a_published_form_is_its_formula(dit, tmp_path, name):
    form = FORMS[name]
    path = saved(form.write(halves()), tmp_path / "lora.safetensors", dict(form.metadata) or None)
    if form.config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(form.config))
    added = change(dit, path)
    assert set(added) == ({f"{layer}.weight" for layer in LAYERS} if form.scale else set())
    for layer, (a, b) in halves().items() if form.scale else ():
        assert torch.allclose(added[f"{layer}.weight"], form.scale * b @ a, atol=1e-6), layer


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / 4


def kinds() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Parts of one layer [128, 128] in every kind, and what they add to `base` by its formula in the papers."""
    d, base = tiny.CONFIG.dim, tiny.dit_state()[f"{LAYER}.weight"]
    a, b = randn(RANK, d), randn(d, RANK + 0)
    pair = {"lora_A.weight": a, "lora_B.weight": b, "alpha": torch.tensor(ALPHA)}
    total = base + 4 * b @ a
    length = torch.rand(d, generator=torch.Generator().manual_seed(0)) + 0.5
    rows = total / total.norm(dim=1, keepdim=True) * length[:, None] - base
    w1, w2, w2a, w2b = randn(8, 4), randn(16, 32), randn(16, RANK), randn(RANK, 32)
    hada = {f"hada_w{i}_{half}": value for i, half, value in (("1", "a", randn(d, 3)), ("1", "b", randn(3, d)),
            ("2", "a", randn(d, 5)), ("2", "b", randn(5, d)))}  # fmt: skip
    loha = (hada["hada_w1_a"] @ hada["hada_w1_b"]) * (hada["hada_w2_a"] @ hada["hada_w2_b"])
    core = randn(RANK, RANK)
    return {
        "DoRA (PEFT)": (pair | {"lora_magnitude_vector": length}, rows),
        "DoRA (diffusers)": (pair | {"lora_magnitude_vector.weight": length}, rows),
        "DoRA (LyCORIS, rows)": (pair | {"dora_scale": length[:, None]}, rows),
        "DoRA (LyCORIS, columns)": (
            pair | {"dora_scale": length[None]},
            total / total.norm(dim=0, keepdim=True) * length[None] - base,
        ),
        "LoHa": (hada | {"alpha": torch.tensor(6.0)}, 2 * loha),
        "LoHa DoRA": (
            hada | {"dora_scale": length[:, None]},
            (base + loha) / (base + loha).norm(dim=1, keepdim=True) * length[:, None] - base,
        ),
        "LoKr of whole factors": ({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e9)}, torch.kron(w1, w2)),
        "LoKr of low rank": (
            {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": torch.tensor(8.0)},
            torch.kron(w1, 2 * w2a @ w2b),
        ),
        "LoCon with a core": (
            {"lora_down.weight": a, "lora_mid.weight": core, "lora_up.weight": b, "alpha": torch.tensor(ALPHA)},
            4 * b @ core @ a,
        ),
        "a whole difference": ({"diff": randn(d, d)}, randn(d, d)),
        "a pair and a difference": (pair | {"diff": randn(d, d)}, 4 * b @ a + randn(d, d)),
    }


@pytest.mark.parametrize("name", kinds())
def test_a_kind_of_change_is_its_formula_and_half_strength_is_half_of_it(dit, tmp_path, name):
    parts, expected = kinds()[name]
    pair = named("diffusion_model.")({"blocks.1.ffn.0": halves()["blocks.0.ffn.0"]})  # a whole difference needs company
    path = saved(
        {f"diffusion_model.{LAYER}.{part}": value for part, value in parts.items()} | pair, tmp_path / "a.safetensors"
    )
    for strength in (1.0, 0.5, -1.0):
        added = change(dit, path, strength=strength)[f"{LAYER}.weight"]
        assert torch.allclose(added, strength * expected, atol=2e-5)


@pytest.mark.parametrize("mode", ["tiles", "tokens"])
@pytest.mark.parametrize("name", kinds())
def test_beside_int8_the_output_is_the_merge_within_what_int8_loses(tmp_path, name, mode):
    network = WanDiT(tiny.CONFIG)
    network.load_state_dict(tiny.dit_state())
    parts, expected = kinds()[name]
    pair = named("diffusion_model.")({"blocks.1.ffn.0": halves()["blocks.0.ffn.0"]})
    path = saved(
        {f"diffusion_model.{LAYER}.{part}": value for part, value in parts.items()} | pair, tmp_path / "a.safetensors"
    )
    plain = network.get_submodule(LAYER)
    x = torch.randn(1, 64, tiny.CONFIG.dim, generator=torch.Generator().manual_seed(2))
    wanted = nn.functional.linear(x, plain.weight + expected, plain.bias)
    layer = apply_loras(int8_blocks(network.requires_grad_(False), mode), [Lora(path=str(path))], Expert.SINGLE).network
    got = layer.get_submodule(LAYER)(x)
    assert (got - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_what_a_lora_holds_beside_int8_is_told_by_its_header(tmp_path, prefix):
    """Blocks hold alike: a file about one block, in which ranks differ, takes more on a card than on disk."""
    d, f = tiny.CONFIG.dim, tiny.CONFIG.ffn_dim
    ranks = {"blocks.1.self_attn.q": (d, d, 8), "blocks.1.ffn.0": (d, f, 4), "blocks.0.ffn.0": (d, f, 16)}
    state = {}
    for layer, (wide, out, rank) in ranks.items():
        state[f"{prefix}{layer}.lora_A.weight"] = randn(rank, wide).half()
        state[f"{prefix}{layer}.lora_B.weight"] = randn(out, rank).half()
    path = saved(state, tmp_path / "few.safetensors")
    network = WanDiT(tiny.CONFIG)
    network.load_state_dict(tiny.dit_state())
    made = apply_loras(int8_blocks(network.requires_grad_(False)), [Lora(path=str(path))], Expert.SINGLE).network
    held = sum(2 * value.numel() for name, value in made.named_parameters() if name.endswith((".down", ".up")))
    found = found_lora(path, path.stat().st_size)
    assert held == found.block_bytes * tiny.CONFIG.num_layers > found.bytes
    inventory = Inventory(loras=(found,))
    assert lora_bytes((Lora(path=str(path)),), SPEC, inventory, Expert.SINGLE) == held


def test_a_convolution_is_read_with_and_without_a_core(dit, tmp_path):
    d = tiny.CONFIG.dim
    down, up, core, flat = randn(2, 16, 1, 1, 1), randn(d, 3, 1, 1, 1), randn(3, 2, 1, 2, 2), randn(3, 16, 1, 2, 2)
    name = "lora_unet_patch_embedding"
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": core, f"{name}.lora_up.weight": up}
    expected = torch.einsum("or...,rs...,si...->oi...", up, core.expand(3, 2, 1, 2, 2), down)
    added = change(dit, saved(state, tmp_path / "core.safetensors"))["patch_embedding.weight"]
    assert torch.allclose(added, expected.flatten(1), atol=1e-5)
    plain = {f"{name}.lora_down.weight": flat, f"{name}.lora_up.weight": up}
    added = change(dit, saved(plain, tmp_path / "plain.safetensors"))["patch_embedding.weight"]
    assert torch.allclose(added, up.flatten(1) @ flat.flatten(1), atol=1e-5)


def test_differences_of_modulation_biases_and_norms_are_added(dit, tmp_path):
    names = {
        "blocks.0.diff_m": "blocks.0.modulation", "head.diff_m": "head.modulation",
        "blocks.1.self_attn.q.diff_b": "blocks.1.self_attn.q.bias", "blocks.1.norm3.w_norm": "blocks.1.norm3.weight",
        "blocks.1.norm3.b_norm": "blocks.1.norm3.bias",
        "blocks.0.cross_attn.norm_k.diff": "blocks.0.cross_attn.norm_k.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
    }  # fmt: skip
    state = {f"diffusion_model.{stored}": torch.ones_like(dit.get_parameter(ours)) for stored, ours in names.items()}
    added = change(dit, saved(state | named("diffusion_model.")(halves()), tmp_path / "a.safetensors"), strength=0.5)
    assert all((added[ours] - 0.5).abs().max() < 1e-6 for ours in names.values())


def test_a_layer_of_another_shape_is_left_out_and_said_and_the_rest_applied(dit, tmp_path):
    wide = {
        "diffusion_model.patch_embedding.lora_A.weight": torch.zeros(4, 36, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_B.weight": torch.zeros(tiny.CONFIG.dim, 4, 1, 1, 1),
    }
    path = saved(wide | named("diffusion_model.")(halves()), tmp_path / "i2v.safetensors")
    made = apply_loras(dit, [Lora(path=str(path))], Expert.SINGLE)
    (note,) = made.notes
    assert note.key == "lora_layers_misfit" and "patch_embedding" in note.text and "36" in note.text
    a, b = halves()[LAYER]
    assert torch.allclose(made.network.get_submodule(LAYER).weight - dit.get_submodule(LAYER).weight, b @ a, atol=1e-6)
    assert torch.equal(made.network.patch_embedding.weight, dit.patch_embedding.weight)
    with pytest.raises(FileError) as caught:
        apply_loras(dit, [Lora(path=str(saved(wide, tmp_path / "only.safetensors")))], Expert.SINGLE)
    assert caught.value.code == "lora_shape"
    why, fit = said_before(tmp_path / "only.safetensors").why, said_before(path)
    assert why is not None and why.code == "lora_shape"
    assert fit.layers == len(halves()) and "patch_embedding" in fit.left_out


def test_a_layer_with_a_part_that_is_not_known_is_left_out_whole(dit, tmp_path):
    state = named("diffusion_model.")(halves()) | {f"diffusion_model.{LAYER}.rescue.weight": torch.zeros(3)}
    state[f"diffusion_model.{LAYER}.mystery"] = torch.zeros(3)
    made = apply_loras(dit, [Lora(path=str(saved(state, tmp_path / "a.safetensors")))], Expert.SINGLE)
    (note,) = made.notes
    assert note.key == "lora_names_unused" and "mystery" in note.text
    assert torch.equal(made.network.get_submodule(LAYER).weight, dit.get_submodule(LAYER).weight)


def test_layers_of_other_networks_are_left_out(dit, tmp_path):
    others = (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "vace_blocks.0.self_attn.q",
        "lora_unet_vace_blocks_0_self_attn_q",
        "diffusion_model.blocks.0.cross_attn.k_img",
        "text_encoder.blocks.0.self_attn.q",
        "vae.head.head",
    )
    state = {f"{name}.lora_{half}.weight": torch.ones(4, 4) for name in others for half in ("down", "up")}
    path = saved(state | named("diffusion_model.")(halves()), tmp_path / "a.safetensors")
    made = apply_loras(dit, [Lora(path=str(path))], Expert.SINGLE)
    (note,) = made.notes
    assert note.key == "lora_names_unused" and note.numbers["n"] == 2 * len(others)
    with pytest.raises(FileError) as caught:
        apply_loras(dit, [Lora(path=str(saved(state, tmp_path / "none.safetensors")))], Expert.SINGLE)
    assert caught.value.code == "lora_foreign"


@pytest.mark.parametrize(("high", "low"), [("transformer.", "transformer_2."), ("pipe.dit.", "pipe.dit2."),
    ("high_noise_model.", "low_noise_model."), ("lora_transformer_", "lora_transformer_2_")])  # fmt: skip
def test_a_file_for_both_experts_gives_each_its_own(dit, tmp_path, high, low):
    style = "flat" if high.endswith("_") else "wan"
    doubled = {layer: (2 * a, b) for layer, (a, b) in halves().items()}
    path = saved(named(high, style)(halves()) | named(low, style)(doubled), tmp_path / "a.safetensors")
    of_high, of_low = change(dit, path, Expert.HIGH), change(dit, path, Expert.LOW)
    assert all(torch.allclose(2 * of_high[name], of_low[name], atol=1e-5) for name in of_high) and of_high


def test_the_order_of_loras_changes_not_one_bit(dit, tmp_path):
    first = saved(named("diffusion_model.")(halves()), tmp_path / "a.safetensors")
    parts, _ = kinds()["DoRA (PEFT)"]
    second = saved({f"{LAYER}.{part}": value for part, value in parts.items()}, tmp_path / "b.safetensors")
    loras = [Lora(path=str(first), strength=0.7), Lora(path=str(second))]
    one, other = (
        apply_loras(dit, order, Expert.SINGLE).network.get_submodule(LAYER).weight for order in (loras, loras[::-1])
    )
    assert torch.equal(one, other) and not torch.equal(one, dit.get_submodule(LAYER).weight)


DAMAGE = {
    "half of a pair": (lambda s: s.pop(f"diffusion_model.{LAYER}.lora_B.weight"), "lora_half"),
    "half of a LoHa": (lambda s: s.update({"diffusion_model.head.head.hada_w1_a": torch.ones(1)}), "lora_half"),
    "half of a LoKr": (lambda s: s.update({"diffusion_model.head.head.lokr_w1": torch.ones(1, 1)}), "lora_half"),
    "NaN": (lambda s: s[f"diffusion_model.{LAYER}.lora_A.weight"].view(-1)[3].fill_(torch.nan), "lora_nan"),
    "infinite": (lambda s: s[f"diffusion_model.{LAYER}.lora_A.weight"].view(-1)[3].fill_(-torch.inf), "lora_nan"),
    "NaN alpha": (lambda s: s.update({f"diffusion_model.{LAYER}.alpha": torch.tensor(torch.nan)}), "lora_nan"),
    "two alphas": (lambda s: s.update({f"diffusion_model.{LAYER}.alpha": torch.tensor([1.0, 2])}), "lora_alpha"),
    "no alpha in it": (lambda s: s.update({f"diffusion_model.{LAYER}.alpha": torch.zeros(0)}), "lora_alpha"),
    "overflow": (lambda s: [s[f"diffusion_model.{LAYER}.lora_{half}.weight"].fill_(3e38) for half in "AB"], "lora_nan"),
    "int8": (
        lambda s: s.update({f"diffusion_model.{LAYER}.lora_A.weight": torch.ones(4, 128, dtype=torch.int8)}),
        "lora_dtype",
    ),
    "OFT": (lambda s: s.update({f"diffusion_model.{LAYER}.oft_blocks": torch.ones(2)}), "lora_algorithm"),
    "GLoRA": (lambda s: s.update({f"diffusion_model.{LAYER}.a1.weight": torch.ones(2)}), "lora_algorithm"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_error_that_names_file_and_key(dit, tmp_path, name):
    damage, code = DAMAGE[name]
    state = named("diffusion_model.")(halves())
    damage(state)
    with pytest.raises(FileError) as caught:
        apply_loras(dit, [Lora(path=str(saved(state, tmp_path / "broken.safetensors")))], Expert.SINGLE)
    assert caught.value.code == code and caught.value.got.startswith("broken.safetensors: ")
    why = said_before(tmp_path / "broken.safetensors").why
    in_numbers = code == "lora_nan" or name in ("two alphas", "no alpha in it")
    assert (why is None) if in_numbers else (why is not None and why.code == code)


CONFIGS = {
    "NaN": ({"r": 4, "lora_alpha": float("nan")}, "lora_alpha"),
    "text": ({"r": 4, "lora_alpha": "strong"}, "lora_alpha"),
    "a list": ([1], "lora_alpha"),
    "PiSSA": ({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, "lora_algorithm"),
    "rsLoRA without alpha": ({"r": 4, "use_rslora": True}, "lora_alpha"),
    "DoRA without lengths": ({"r": 4, "lora_alpha": 4, "use_dora": True}, "lora_alpha"),
    "another rank": ({"r": 8, "lora_alpha": 8}, "lora_alpha"),
    "another rank of one": ({"r": 4, "lora_alpha": 8, "rank_pattern": {"ffn.0": 2}}, "lora_alpha"),
    **{
        begun: ({"r": 4, "lora_alpha": 4, "init_lora_weights": begun}, "lora_algorithm")
        for begun in ("pissa", "olora", "OLoRA", "corda", "loftq", "lora_ga", "something new")
    },
    "KaSA": ({"r": 4, "lora_alpha": 4, "kasa_config": {"gamma": 1}}, "lora_algorithm"),
    "repeated layers": ({"r": 4, "lora_alpha": 4, "layer_replication": [[0, 2], [1, 2]]}, "lora_algorithm"),
    "a slow expression": ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+$": 1}}, "lora_alpha"),
    "many patterns": ({"r": 4, "lora_alpha": 4, "alpha_pattern": {f"x{i}": 1 for i in range(9999)}}, "lora_alpha"),
}


@pytest.mark.parametrize("where", ["beside", "lora_adapter_metadata", "lora_config"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_cannot_be_read_is_one_error(dit, tmp_path, name, where):
    config, code = CONFIGS[name]
    if (name, where) == ("a list", "lora_config"):
        pytest.skip("only a name says that this is a config")
    metadata = {where: json.dumps(config)} if where != "beside" else None
    path = saved(named("")(halves()), tmp_path / "a.safetensors", metadata)
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileError) as caught:
        apply_loras(dit, [Lora(path=str(path))], Expert.SINGLE)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": 16}'}, 4),
        ({"lora_adapter_metadata": '{"transformer": {"r": 4, "lora_alpha": 16}}'}, 4),
        ({"lora_alpha": "16", "use_rslora": "true"}, 8),
        ({"alpha": "16"}, 4),
    ],
)
def test_a_config_without_its_rank_counts_with_that_of_the_tensors(tmp_path, metadata, scale):
    found = strengths(tmp_path / "a.safetensors", metadata, ["blocks.0.lora_A.weight"], {"blocks.0": 4})
    assert found.of("blocks.0").scale("blocks.0", 4) == scale


AT_16 = json.dumps({"r": 4, "lora_alpha": 16})


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_config": AT_16, "alpha": "4"},
        {"a": AT_16, "b": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})},
        {"alpha": "16", "network_alpha": "4"},
        {"lora_alpha": "16", "ss_network_alpha": "4.0"},
        {"a": json.dumps({"default": {"r": 4, "lora_alpha": 16}, "other": {"r": 4, "lora_alpha": 4}})},
        {"a": json.dumps({"transformer.lora_alpha": 16, "transformer_2.lora_alpha": 4})},
        {"a": json.dumps({"lora_alpha": 4, "use_rslora": True}), "lora_alpha": "4", "use_rslora": "False"},
        {"a": json.dumps({"lora_alpha": 4, "alpha_pattern": {"q": 2}}), "lora_alpha": "4", "alpha_pattern": "{}"},
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_configs_that_disagree_are_refused_where_the_tensors_do_not_tell(dit, tmp_path, metadata, beside):
    if beside:
        (tmp_path / "adapter_config.json").write_text(AT_16)
    path = saved(named("diffusion_model.")(halves()), tmp_path / "a.safetensors", metadata)
    with pytest.raises(FileError) as caught:
        apply_loras(dit, [Lora(path=str(path))], Expert.SINGLE)
    assert caught.value.code == "lora_alpha" and ", " in caught.value.got
    with_alpha = named("diffusion_model.", alpha=ALPHA)(halves())
    assert change(dit, saved(with_alpha, path, metadata))  # the tensors tell


def test_a_config_inside_against_one_beside_is_refused(dit, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    path = saved(named("diffusion_model.")(halves()), tmp_path / "a.safetensors", {"lora_config": AT_16})
    with pytest.raises(FileError, match=r"lora_config lora_alpha 16.*adapter_config.json lora_alpha 8"):
        apply_loras(dit, [Lora(path=str(path))], Expert.SINGLE)


@pytest.mark.parametrize("name", ["a", "adapter_model"])
@pytest.mark.parametrize("rank", [4, 8])
def test_a_config_beside_several_files_counts_for_those_of_its_rank_and_is_said(dit, tmp_path, name, rank):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 4 * rank}))
    (tmp_path / "other.safetensors").touch()
    path = saved(named("diffusion_model.")(halves()), tmp_path / f"{name}.safetensors")
    if (name, rank) == ("adapter_model", 8):  # PEFT's own name: the config is its own, and is not of these tensors
        with pytest.raises(FileError, match="r 8, but"):
            apply_loras(dit, [Lora(path=str(path))], Expert.SINGLE)
        return
    made = apply_loras(dit, [Lora(path=str(path))], Expert.SINGLE)
    a, b = halves()[LAYER]
    scale = 4 if rank == 4 else 1
    added = made.network.get_submodule(LAYER).weight - dit.get_submodule(LAYER).weight
    assert torch.allclose(added, scale * b @ a, atol=1e-5)
    assert [note.key for note in made.notes] == (["lora_config_shared"] if (name, rank) == ("a", 4) else [])


PEFT_CONFIGS = [
    {"r": 4, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"r": 8, "lora_alpha": 4, "alpha_pattern": {"self_attn.q": 2, r".*\.ffn\.0": 6}},
    {"r": 8, "lora_alpha": 4, "rank_pattern": {"q": 2, r"blocks\.\d+\.ffn.2": 3}, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "init_lora_weights": "orthogonal"},
]


@pytest.mark.parametrize("config", PEFT_CONFIGS, ids=str)
def test_a_file_that_peft_writes_is_what_peft_computes(dit, tmp_path, config):
    """The oracle, where it is installed: the weights that PEFT merges from its own file."""
    peft = pytest.importorskip("peft")
    network = WanDiT(tiny.CONFIG)
    network.load_state_dict(tiny.dit_state())
    told = peft.LoraConfig(target_modules=["q", "v", "ffn.0", "ffn.2"], **config)
    model = peft.get_peft_model(network, told)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    added = change(dit, tmp_path / "adapter_model.safetensors")
    merged = model.merge_and_unload().state_dict()
    assert len(added) > 8
    for name, value in added.items():
        assert torch.allclose(value, merged[name] - dit.state_dict()[name], atol=1e-5), name


@pytest.mark.filterwarnings("ignore::UserWarning")  # that it changes the weights, which is what is tried
@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_what_peft_began_in_the_weights_below_is_refused_until_it_is_converted_back(dit, tmp_path, begun):
    peft = pytest.importorskip("peft")
    network = WanDiT(tiny.CONFIG)
    network.load_state_dict(tiny.dit_state())
    told = peft.LoraConfig(target_modules=["q", "ffn.0"], r=4, lora_alpha=8, init_lora_weights=begun)
    model = peft.get_peft_model(network, told)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "begin")
    model.peft_config["default"].init_lora_weights = begun
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data += torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) / 20
    model.save_pretrained(tmp_path / "as_it_is")
    model.save_pretrained(tmp_path / "back", path_initial_model_for_weight_conversion=str(tmp_path / "begin"))
    with pytest.raises(FileError, match=begun):
        change(dit, tmp_path / "as_it_is" / "adapter_model.safetensors")
    added = change(dit, tmp_path / "back" / "adapter_model.safetensors")
    merged = model.merge_and_unload().state_dict()
    for name, value in added.items():
        assert torch.allclose(value, merged[name] - dit.state_dict()[name], atol=1e-5), name


def test_a_whole_network_is_not_a_lora(dit, tmp_path):
    with pytest.raises(FileError) as caught:
        apply_loras(dit, [Lora(path=str(saved(tiny.dit_state(), tmp_path / "dit.safetensors")))], Expert.SINGLE)
    assert caught.value.code == "lora_foreign"


@pytest.mark.parametrize("name", ["x" * 100 + "_{i}", "_" * 2000 + "{i}", "a." * 900 + "{i}"])
def test_names_in_masses_are_bounded_work(dit, tmp_path, name):
    state = {f"{name.format(i=i)}.lora_down.weight": torch.zeros(1) for i in range(1000)} | named("")(halves())
    start_s = time.process_time()
    made = apply_loras(dit, [Lora(path=str(saved(state, tmp_path / "a.safetensors")))], Expert.SINGLE)
    assert made.notes[0].numbers["n"] == 1000 and len(made.notes[0].text) < 2000
    assert time.process_time() - start_s < 30  # names of a length of their own are not taken apart
