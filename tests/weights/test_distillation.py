"""What published files are distilled for is told from keys, metadata and names as they are published."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbodiff.gpu.probe import machine_now
from turbodiff.plan.planner import plan_request
from turbodiff.spec.request import make_request
from turbodiff.spec.schedules import PLAIN
from turbodiff.weights.detect import read_header
from turbodiff.weights.distillation import lora_training, training_of
from turbodiff.weights.locate import bundled_root, inventory, resolve_files
from turbodiff.weights.lora_fit import found_lora

PLAIN_KEYS = ("blocks.0.self_attn.q.weight", "patch_embedding.weight")

# Names as their makers publish them: (path, trained for, family, steps that the name tells)
PUBLISHED = [
    ("TurboWan2.1-T2V-1.3B-480P.pth", "rcm", "", 0),
    ("TurboWan2.2-I2V-A14B-high-720P-quant.pth", "rcm", "", 0),
    ("rCM_Wan2.1_T2V_14B_480p.pt", "rcm", "", 0),
    ("Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16.safetensors", "rcm", "", 0),
    ("Wan2.2-Lightning_I2V-A14B-4steps-lora_HIGH_fp16.safetensors", "step-distilled", "lightning", 4),
    ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors", "step-distilled", "lightning", 4),
    ("lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors", "step-distilled", "lightx2v", 0),
    ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors", "step-distilled", "lightx2v", 0),
    ("wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors", "step-distilled", "lightx2v", 4),
    ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors", "step-distilled", "lightx2v", 4),
    ("Wan2.1-T2V-14B-StepDistill-CfgDistill/distill_models/distill_model.safetensors", "step-distilled", "lightx2v", 0),
    ("models--lightx2v--Wan2.1-T2V-14B-StepDistill-CfgDistill/snapshots/0f/model.pth", "step-distilled", "lightx2v", 0),
    ("Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors", "step-distilled", "causvid", 0),
    ("Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors", "step-distilled", "causvid", 0),
    ("Wan21_AccVid_T2V_14B_lora_rank32_fp16.safetensors", "step-distilled", "accvid", 0),
    ("FastWan2.1-T2V-1.3B-Diffusers/transformer/diffusion_pytorch_model.safetensors", "step-distilled", "fastwan", 0),
    ("Wan2_1_self_forcing_dmd_1_3B_fp16.safetensors", "step-distilled", "self-forcing", 0),
    ("Wan2.1_T2V_14B_FusionX_LoRA.safetensors", "step-distilled", "fusionx", 0),
    ("Wan14BT2VFusioniX_fp16_.safetensors", "step-distilled", "fusionx", 0),
    ("my_wan_8steps.safetensors", "step-distilled", "", 8),
    # and what is none of it
    ("wan2.1_t2v_14B_bf16.safetensors", "base", "", 0),
    ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "base", "", 0),
    ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "base", "", 0),
    ("Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors.index.json", "base", "", 0),
    ("my_style_lora_1000steps.safetensors", "base", "", 0),
    ("my_style_lora_40steps.safetensors", "base", "", 0),
    ("lora_epoch10_step500.safetensors", "base", "", 0),
    ("storm_lightnings-free.safetensors", "base", "", 0),
    ("fast_car_lightning_storm.safetensors", "base", "", 0),
    ("lightning_goddess_v2.safetensors", "base", "", 0),
    ("Wan22-Lightning/old/Wan22_Lightning_T2V.safetensors", "step-distilled", "lightning", 0),
    ("lightning_lora_8steps.safetensors", "step-distilled", "lightning", 8),
    ("TurboDiffusion/checkpoints/Wan2.1-T2V-14B.pth", "base", "", 0),
    ("arcmotion_lora.safetensors", "base", "", 0),
    ("wan2.2-t2v-rapid-aio-v10.safetensors", "step-distilled", "", 0),
    ("wan2.2-rapid-mega-aio-nsfw-v3.safetensors", "step-distilled", "", 0),
    ("Wan2.2-Rapid-AllInOne-LowNoise-Q4_K_M.gguf", "step-distilled", "", 0),
    ("rapid_river_style.safetensors", "base", "", 0),
    # its own name before the folder's
    ("Lightning/wan2.2_t2v_high_noise_14B_fp16.safetensors", "base", "", 0),
    ("Wan22-Lightning/Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "base", "", 0),
    ("lightx2v/Wan2.1-T2V-14B-Q4_K_M.gguf", "base", "", 0),
    ("CausVid/wan2.1_t2v_1.3B_lightx2v_4step.safetensors", "step-distilled", "lightx2v", 4),
    ("lightx2v/wan2.1_t2v_14B_merged.safetensors", "step-distilled", "lightx2v", 0),
    (
        "models--x--Wan2.2-Lightning/snapshots/0f/wan2.2_t2v_high_noise_14B.safetensors",
        "step-distilled",
        "lightning",
        0,
    ),
]


@pytest.mark.parametrize(("name", "trained_for", "family", "steps"), PUBLISHED, ids=lambda value: str(value)[:60])
def test_a_published_name_tells_its_distillation(name, trained_for, family, steps):
    told = training_of(PLAIN_KEYS, {}, Path("/data") / name)
    assert (told.trained_for, told.family, told.steps) == (trained_for, family, steps)
    assert told.evidence == ("" if trained_for == "base" else "name")


@pytest.mark.parametrize(
    ("key", "trained_for", "family"),
    [
        ("blocks.0.self_attn.attn_op.local_attn.proj_l.weight", "rcm", ""),
        ("blocks.3.attn1.attn_impl.proj_l.bias", "rcm", ""),
        ("blocks.0.to_gate_compress.weight", "step-distilled", "fastwan"),
    ],
)
def test_keys_tell_before_the_name_does(key, trained_for, family):
    told = training_of((*PLAIN_KEYS, key), {}, Path("lightx2v_4step.safetensors"))
    assert (told.trained_for, told.family, told.evidence) == (trained_for, family, "keys")


Q, GATE, SLA = "blocks.0.self_attn.q.weight", "blocks.0.to_gate_compress.weight", ".attn_op.local_attn.proj_l.weight"
DUMPS = [  # the names of the dicts around the tensors, what stands before each name, a key that tells, the training
    (("generator_ema",), "model.", "", "self-forcing"),
    (("generator",), "model.", "", "self-forcing"),
    (("generator_ema",), "", "", "self-forcing"),
    (("generator", "model"), "", "", "self-forcing"),
    (("state_dict", "generator_ema"), "model._fsdp_wrapped_module.", "", "self-forcing"),
    (("net_ema",), "", f"blocks.0.self_attn{SLA}", "rcm"),
    (("model",), "", GATE, "fastwan"),
    (("model",), "", "", "base"),
    (("ema",), "model.", "", "base"),
    ((), "", "", "base"),
]


def dump(path: Path, weights: dict[str, torch.Tensor], wraps: tuple[str, ...]) -> Path:
    """Weights as a training writes them: in dicts, or flat with the names of those before each name."""
    if path.suffix == ".safetensors":
        save_file({".".join((*wraps, name)): value for name, value in weights.items()}, path)
        return path
    state: dict[str, object] = dict(weights)
    for wrap in reversed(wraps):
        state = {wrap: state}
    torch.save({**state, "step": 3000}, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize(("wraps", "before", "key", "told"), DUMPS, ids=lambda value: str(value)[:40])
def test_what_the_reader_delivers_of_a_dump_tells_its_training(tmp_path, wraps, before, key, told, suffix):
    weights = {f"{before}{name}": torch.zeros(2, 2) for name in (Q, "patch_embedding.weight", *filter(None, [key]))}
    header = read_header(dump(tmp_path / f"model{suffix}", weights, wraps))
    training = training_of(header.written_names, header.metadata, header.path)
    assert (training.family or training.trained_for) == told
    assert training.evidence == ("" if told == "base" else "keys")


@pytest.mark.parametrize("others", [{}, {"critic": {"model.x": torch.zeros(2)}}], ids=["alone", "critic"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("wrap", ["generator_ema", "generator"])
def test_a_self_forcing_dump_runs_in_its_few_steps(tmp_path, wrap, suffix, others):
    weights = load_file(bundled_root() / "dit_t2v.safetensors")
    plain = {f"model.{name}": value for name, value in weights.items() if ".proj_l." not in name}
    path = dump(tmp_path / f"model{suffix}", plain, (wrap,))
    if others and suffix == ".pt":
        torch.save({wrap: plain, **others}, path)
    found = inventory([tmp_path])
    file = found.of("demo", "dit")
    assert file is not None and file.path == str(path)
    assert file.training is not None and file.training.words == "step-distilled, Self-Forcing (keys)"
    run = plan_request(make_request({"prompt": "a red circle", "model": "demo"}), machine_now(), found).request
    assert (run.sampler, run.steps, run.guidance) == ("lcm", 4, 1.0)


def test_the_metadata_and_wrappers_of_shards_are_those_of_the_whole(tmp_path):
    told = {"turbodiff.weights_are": "step-distilled", "turbodiff.steps": "6"}
    save_file({Q: torch.zeros(2, 2)}, tmp_path / "m-1-of-2.safetensors", told)
    dump(tmp_path / "m-2-of-2.bin", {"patch_embedding.weight": torch.zeros(2, 2)}, ("generator",))
    where = {Q: "m-1-of-2.safetensors", "patch_embedding.weight": "m-2-of-2.bin"}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    header = read_header(index)
    assert header.metadata == told and header.inside == ("generator",)
    assert training_of(header.written_names, header.metadata, index).steps == 6


def test_a_lora_on_the_projections_of_a_distilled_network_distils_nothing():
    key = "diffusion_model.blocks.0.self_attn.attn_op.local_attn.proj_l.lora_A.weight"
    assert training_of((key,), {}, Path("style.safetensors"), lora=True) == PLAIN


@pytest.mark.parametrize(
    ("metadata", "trained_for", "steps"),
    [
        ({"turbodiff.weights_are": "step-distilled", "turbodiff.steps": "6"}, "step-distilled", 6),
        ({"turbodiff.weights_are": "base", "title": "Lightning"}, "base", 0),
        ({"ss_output_name": "wan22_lightx2v_4steps"}, "step-distilled", 4),
        ({"modelspec.title": "CausVid 14B"}, "step-distilled", 0),
        ({"modelspec.description": "goes well with Lightning at 4 steps"}, "base", 0),
        ({"ss_sd_model_name": "wan2.1_lightx2v_merged.safetensors"}, "base", 0),
        ({"turbodiff.weights_are": "magic", "turbodiff.steps": "-3"}, "base", 0),
        ({"turbodiff.weights_are": "step-distilled", "turbodiff.steps": "9999"}, "step-distilled", 0),
    ],
)
def test_titles_tell_and_descriptions_do_not(metadata, trained_for, steps):
    told = training_of(PLAIN_KEYS, metadata, Path("x.safetensors"))
    assert (told.trained_for, told.steps) == (trained_for, steps)


def safetensors(path: Path, metadata: object) -> Path:
    tensor = {"a.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    head = json.dumps({"__metadata__": metadata, **tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    return path


def test_a_loras_metadata_are_read_from_its_file_and_again_when_it_changes(tmp_path):
    path = safetensors(tmp_path / "x.safetensors", {"turbodiff.weights_are": "step-distilled", "turbodiff.steps": "4"})
    assert lora_training(path).steps == 4
    safetensors(path, {"turbodiff.weights_are": "step-distilled", "turbodiff.steps": "12"})
    assert lora_training(path).steps == 12


@pytest.mark.parametrize("metadata", [None, [], "x", {"title": 3}, {"title": "a" * 100_000}])
def test_odd_metadata_and_files_say_nothing(tmp_path, metadata):
    assert lora_training(safetensors(tmp_path / "x.safetensors", metadata)) == PLAIN
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    assert lora_training(tmp_path / "broken.safetensors") == PLAIN
    assert lora_training(tmp_path / "gone.safetensors") == PLAIN


def test_two_experts_are_taken_from_one_distillation_where_a_pair_is_here(tmp_path):
    for side in ("high", "low"):
        weights = load_file(bundled_root() / f"dit_i2v_{side}.safetensors")
        plain = {name: value for name, value in weights.items() if ".proj_l." not in name}
        save_file(plain, tmp_path / f"wan_{side}_noise.safetensors")
        if side == "high":  # of the other pair only one file is here, and it would go first
            save_file(weights, tmp_path / f"turbo_{side}_noise.safetensors")
    found = inventory([tmp_path])
    names = {part: Path(file.path).name for part, file in resolve_files("demo-i2v", found).items() if "dit" in part}
    assert names["dit_high"].startswith(("wan_", "dit_")) and names["dit_low"].startswith(("wan_", "dit_"))
    kinds = {found.of("demo-i2v", part).training.trained_for for part in names}
    assert len(kinds) == 1
    only = [file for file in found.files if file.component == "dit_high" and not file.path.startswith(str(tmp_path))]
    assert only and only[0].training.trained_for == "rcm"


def test_the_search_tells_what_each_network_was_distilled_for(tmp_path):
    weights = load_file(bundled_root() / "dit_t2v.safetensors")
    plain = {name: value for name, value in weights.items() if ".proj_l." not in name}
    save_file(plain, tmp_path / "wan_t2v.safetensors")
    save_file(plain, tmp_path / "wan_lightx2v_4step.safetensors")
    (tmp_path / "loras").mkdir()
    safetensors(tmp_path / "loras" / "Wan21_CausVid.safetensors", {})
    found = inventory([tmp_path])
    told = {
        Path(f.path).name: f.training.trained_for for f in found.files if f.model == "demo" and f.component == "dit"
    }
    assert told == {
        "wan_lightx2v_4step.safetensors": "step-distilled", "wan_t2v.safetensors": "base", "dit_t2v.safetensors": "rcm",
    }  # fmt: skip
    assert [lora.training.family for lora in found.loras] == ["causvid"]
    assert found.of("demo", "vae").training is None


def test_the_width_that_a_lora_is_for_is_that_of_most_of_its_layers(tmp_path: Path) -> None:
    def layers(count: int, dim: int, first: int) -> dict[str, torch.Tensor]:
        state = {}
        for block in range(first, first + count):
            state[f"blocks.{block}.self_attn.q.lora_A.weight"] = torch.ones(4, dim)
            state[f"blocks.{block}.self_attn.q.lora_B.weight"] = torch.ones(dim, 4)
        return state

    save_file(layers(1, 128, 0) | layers(5, 96, 1), tmp_path / "other.safetensors")
    save_file({"blocks.0.self_attn.q.diff": torch.ones(96, 96)}, tmp_path / "whole.safetensors")
    found = [found_lora(tmp_path / f"{name}.safetensors", 1) for name in ("other", "whole", "none")]
    assert [lora.dim for lora in found] == [96, 0, 0]
