"""An expert is told by a word about noise, a person or the metadata; a name about anything else hides nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from turbodiff.weights import experts
from turbodiff.weights.lora_facts import lora_facts

TWINS = [  # (folder/name, side) of a network of which there are only pairs
    ("Wan2.2-I2V-A14B-HighNoise-Q4_K_M.gguf", "high"),
    ("Wan2.2-I2V-A14B-LowNoise-Q4_K_M.gguf", "low"),
    ("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "high"),
    ("wan2.2_i2v_low_noise_14B_fp16.safetensors", "low"),
    ("Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "high"),
    ("TurboWan2.2-I2V-A14B-low-720P-quant.pth", "low"),
    ("smoothMixWan2214BI2V_i2vHighV20.safetensors", "high"),
    ("smoothMixWan2214BI2V_i2vV20Low.safetensors", "low"),
    ("DasiwaWAN22I2V14B_midnightflirtHigh.safetensors", "high"),
    ("wan22I2Vhighnoise.safetensors", "high"),
    ("WAN22_I2V_HN_v2.safetensors", "high"),
    ("WAN22-I2V-LN.safetensors", "low"),
    ("mix-H.safetensors", "high"),
    ("wan2.2_high_noise_low_vram.safetensors", "high"),
    ("wan2.2_low_noise_high_quality.safetensors", "low"),
    ("wan2.2_i2v_high_Q3_K_L.gguf", "high"),
    ("Wan2.2_i2v_H_Q5_K_S.gguf", "high"),
    ("Wan2.2-I2V-A14B-LowNoise-Q3_K_L.gguf", "low"),
    ("mix_L.safetensors", "low"),
    ("noise_low.safetensors", "low"),
    ("high_quality_low_noise.safetensors", "low"),
    ("low_vram_high_noise.safetensors", "high"),
    ("low_vram/wan22_high_noise.safetensors", "high"),
    ("high_noise_model/diffusion_pytorch_model.safetensors", "high"),
    ("Low Noise/model.safetensors", "low"),
    ("HN/model.safetensors", "high"),
    ("high/model.safetensors", "high"),
    ("low_vram/model.safetensors", ""),
    ("High Quality/model.safetensors", ""),
    ("HighRes/model.safetensors", ""),
    ("lowRAM/model.safetensors", ""),
    ("wan22_high_quality.safetensors", ""),
    ("wan22_lowsteps.safetensors", ""),
    ("high_to_low.safetensors", ""),
    ("slownoise.safetensors", ""),
    ("follow.safetensors", ""),
    ("HighLightMix.safetensors", ""),
    ("wan2.2_i2v_高噪_v2.safetensors", "high"),
    ("wan2.2图生视频低噪声模型.safetensors", "low"),
    ("高噪音.safetensors", "high"),
    ("万相2.2低噪音fp8.gguf", "low"),
    ("Wan2.2-噪声高.safetensors", "high"),
    ("HIGH噪声.safetensors", "high"),
    ("Wan2.2_高雜訊.safetensors", "high"),
    ("Wan2.2_低ノイズ.safetensors", "low"),
    ("高噪/模型.safetensors", "high"),
    ("低噪声模型/wan22.safetensors", "low"),
    ("高噪模型/v2/wan22.safetensors", "high"),
    ("Wan2.2_高.safetensors", "high"),
    ("高/wan.safetensors", "high"),
    ("低/wan.safetensors", "low"),
    ("高清_低噪.safetensors", "low"),
    ("低显存_高噪.safetensors", "high"),
    ("wan22_高清.safetensors", ""),
    ("wan22_低显存.safetensors", ""),
    ("wan22_low显存版.safetensors", ""),
    ("wan22_High清晰度.safetensors", ""),
    ("高清/wan22.safetensors", ""),
    ("低显存版/wan22.safetensors", ""),
    ("高质量.safetensors", ""),
    ("降噪.safetensors", ""),
    ("高噪点胶片.safetensors", ""),
    ("高低噪通用.safetensors", ""),
    ("高噪低噪通用.safetensors", ""),
    ("高/低噪/wan.safetensors", "low"),
    ("高、低噪.safetensors", ""),
    ("wan22_high_low_noise.safetensors", ""),
    ("wan22_high-and-low-noise.safetensors", ""),
    ("high_noise_and_low_noise.safetensors", ""),
    ("HighLowNoise.safetensors", ""),
]


@pytest.mark.parametrize(("name", "side"), TWINS)
def test_a_network_of_a_pair_is_told_by_noise_alone(name: str, side: str, tmp_path: Path) -> None:
    assert experts.expert_of(tmp_path / name, {}, alone=False)[0] == side


ALONE = [  # of a network that a single model could be, too
    ("Wan14B_High_v2.safetensors", "", False),
    ("mix-H.safetensors", "", False),
    ("Wan2.1-T2V-14B-low.safetensors", "", False),
    ("Wan2.1_14B_VeryHighQuality.safetensors", "", False),
    ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high", True),
    ("Wan2.2-T2V-A14B-LowNoise-Q8_0.gguf", "low", True),
    ("Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "low", True),
    ("Wan2.2-T2V-A14B.safetensors", "", True),
    ("anything_highnoise.safetensors", "high", False),
    ("人物_高.safetensors", "", False),
    ("人物_高清.safetensors", "", False),
    ("人物_高噪声.safetensors", "high", False),
    # its own name and title before the folder's
    ("High/Wan2_1-T2V-14B.safetensors", "", False),
    ("high_noise_model/wan2.1_t2v_14B_fp16.safetensors", "", False),
    ("Wan2.2/Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", "", False),
    ("Wan2.2-T2V-A14B/low/wan21_t2v.gguf", "", False),
    ("低噪/WanX2.1-T2V-14B.pth", "", False),
    ("Wan2.1/wan2.2_t2v_low_noise_14B.safetensors", "low", True),
    ("low/wan2.2_t2v_high_noise_14B.safetensors", "high", True),
    ("transformer_2/wan2.2_high_noise.safetensors", "high", True),
    # only where nothing else tells: the nearest folder
    ("AniSora_v3_high/diffusion_pytorch_model.safetensors", "high", False),
    ("AniSora_v3_low/diffusion_pytorch_model.safetensors", "low", False),
    ("AniSora_v3_high/transformer/diffusion_pytorch_model.safetensors", "high", False),
    ("AniSora_v3_high/mine/model.safetensors", "", False),
    ("AniSora_v3_High_Quality/model.safetensors", "", False),
    ("高清_人物/model.safetensors", "", False),
    ("人物_高/model.safetensors", "high", False),
]


@pytest.mark.parametrize(("name", "side", "twin"), ALONE)
def test_a_single_network_is_not_hidden_by_its_name(name: str, side: str, twin: bool, tmp_path: Path) -> None:
    (tmp_path / "transformer_2").mkdir()
    assert experts.expert_of(tmp_path / name, {}, alone=True) == (side, twin)


def test_the_other_one_beside_it_makes_a_pair(tmp_path: Path) -> None:
    high = tmp_path / "mix_High_v2.safetensors"
    assert experts.expert_of(high, {}, alone=True)[0] == ""
    (tmp_path / "mix_Low_v2.safetensors").touch()
    assert experts.expert_of(high, {}, alone=True)[0] == "high"


def test_the_other_one_beside_it_makes_a_pair_in_chinese(tmp_path: Path) -> None:
    low = tmp_path / "人物-低.safetensors"
    assert experts.expert_of(low, {}, alone=True)[0] == ""
    (tmp_path / "人物-高.safetensors").touch()
    assert experts.expert_of(low, {}, alone=True)[0] == "low"


def test_the_other_folder_beside_it_makes_a_pair(tmp_path: Path) -> None:
    high = tmp_path / "AniSora_high_v3.2" / "model.safetensors"
    assert experts.expert_of(high, {}, alone=True)[0] == ""
    (tmp_path / "AniSora_low_v3.2").mkdir()
    assert experts.expert_of(high, {}, alone=True)[0] == "high"


def test_a_title_of_wan21_comes_before_the_folder_and_shapes_before_a_name(tmp_path: Path) -> None:
    path = tmp_path / "High" / "model.gguf"
    assert experts.expert_of(path, {"general.name": "Wan2.1 T2V 14B"}, alone=True) == ("", False)
    named = path.with_name("Wan2_1-T2V-14B.safetensors")
    assert experts.expert_of(named, {}, alone=False)[0] == "high", "of these sizes there are only pairs"


@pytest.mark.parametrize(
    ("prefixes", "side"),
    [
        (("transformer.", "transformer_2."), ""),
        (("high_noise_model.", "low_noise_model."), ""),
        (("pipe.dit.", "pipe.dit2."), ""),
        (("transformer_2.",), "low"),
        (("low_noise_model.",), "low"),
        (("high_noise_model.",), "high"),
        (("diffusion_model.",), "high"),  # nothing but the name tells
    ],
)
def test_the_keys_of_a_lora_come_before_its_name(prefixes: tuple[str, ...], side: str, tmp_path: Path) -> None:
    path = tmp_path / "style_高噪.safetensors"
    state = {
        f"{before}blocks.0.self_attn.q.lora_{half}.weight": torch.ones(4, 4) for before in prefixes for half in "AB"
    }
    save_file(state, path)
    assert lora_facts(path).expert == side


@pytest.mark.parametrize("side", ["high", "low"])
def test_the_dict_around_a_loras_tensors_tells_its_side_as_a_prefix_does(side: str, tmp_path: Path) -> None:
    state = {f"blocks.0.self_attn.q.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    torch.save({f"{side}_noise_model": state}, tmp_path / "style.pt")
    assert lora_facts(tmp_path / "style.pt").expert == side


def test_a_person_comes_before_names_and_metadata_before_folders(tmp_path: Path) -> None:
    path = tmp_path / "low_noise" / "a_high_noise.safetensors"
    path.parent.mkdir()
    path.touch()
    assert experts.expert_of(path, {}, alone=False)[0] == "high"
    experts.tell(path, "low")
    assert experts.expert_of(path, {}, alone=False)[0] == "low"
    plain = path.with_name("a.safetensors")
    assert experts.expert_of(plain, {"general.name": "Wan2.2 I2V A14B HighNoise"}, alone=False)[0] == "high"
    assert experts.expert_of(plain, {}, alone=False)[0] == "low"


def test_a_name_against_the_metadata_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a_low_noise.gguf"
    assert experts.expert_of(path, {"general.name": "High Noise"}, alone=False) == ("", True)


@pytest.mark.parametrize("text", ["", "expert = 3", "expert = [", 'expert = "both"', "\x00", "[" * 5000])
def test_a_word_that_cannot_be_read_is_no_word(text: str, tmp_path: Path) -> None:
    (tmp_path / "a_high_noise.pth.toml").write_text(text)
    assert experts.expert_of(tmp_path / "a_high_noise.pth", {}, alone=False)[0] == "high"
