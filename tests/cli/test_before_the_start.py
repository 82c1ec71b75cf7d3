"""What cannot work is said by `plan` and refused by `generate` before anything starts, with what to do about it."""

import sys

import pytest

from tests.webui import hollow
from turbodiff.spec.models import all_models, find_model
from turbodiff.spec.wording import Words
from turbodiff.weights.fit import network_shapes

SMALL, PAIR = find_model("wan2.1-1.3b"), find_model("wan2.2-t2v-a14b")


@pytest.fixture(autouse=True)
def weights(monkeypatch, tmp_path):
    """A search root with all files of one small model."""
    monkeypatch.setenv("TURBODIFF_PRETEND_VRAM", "23.5")
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return hollow.models(tmp_path / "weights", SMALL.name)


def pairs(layers, width, out=None):
    """A LoRA of rank 4 on linears `width` wide."""
    halves = {f"diffusion_model.{layer}.lora_A.weight": (4, width) for layer in layers}
    return halves | {f"diffusion_model.{layer}.lora_B.weight": (out or width, 4) for layer in layers}


QUERIES = [f"blocks.{n}.self_attn.q" for n in range(30)]
STABLE = {
    f"lora_unet_down_blocks_0_attentions_0_to_q.lora_{half}.weight": shape
    for half, shape in (("down", (4, 320)), ("up", (320, 4)))
}
UNFIT = {
    "a web page": ("file_foreign", "a web page", None),
    "Stable Diffusion's": ("lora_foreign", "to_q", STABLE),
    "of a wider model": ("lora_shape", "5120", pairs(QUERIES, 5120)),
    "half": ("lora_half", "self_attn.q", {name: of for name, of in pairs(QUERIES, 1536).items() if "lora_A" in name}),
}


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("name", UNFIT)
def test_a_lora_that_cannot_work_is_said_by_the_plan_and_refused_before_the_start(
    turbodiff, monkeypatch, tmp_path, name, lang
):
    monkeypatch.setenv("LC_ALL", f"{lang}.UTF-8")
    code, got, shapes = UNFIT[name]
    got = Words(lang).kind(got)
    lora = tmp_path / "style.safetensors"
    if shapes is None:
        lora.write_text("<!doctype html><p>404")
    else:
        hollow.save(shapes, lora)
    asked = ("a cat", "--model", SMALL.display_name, "--pin", "model", "--lora", str(lora))
    ended, said = turbodiff("plan", *asked)
    (told,) = [line for line in said.out.splitlines() if "LoRA style.safetensors" in line]
    assert (
        ended == 0 and got in told and ("cannot be used" if lang == "en" else "不能用于") in told and code not in told
    )
    ended, said = turbodiff("generate", *asked)
    assert ended == 2 and got in said.err and "models pull" not in said.err
    assert not list(tmp_path.rglob("*.mp4"))
    assert turbodiff("plan", *asked[:-1], f"{lora}:0")[1].out.count("LoRA style") == 0, "strength 0 is none"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_lora_that_fits_in_part_is_a_notice_of_the_plan(turbodiff, monkeypatch, tmp_path, lang):
    monkeypatch.setenv("LC_ALL", f"{lang}.UTF-8")
    lora, asked = tmp_path / "style.safetensors", ("a cat", "--model", SMALL.display_name, "--lora")
    hollow.save(pairs(QUERIES, 1536) | pairs(["head.head"], 1536, 99) | STABLE, lora)
    (told,) = [line for line in turbodiff("plan", *asked, str(lora))[1].out.splitlines() if "LoRA style" in line]
    assert "30" in told and "head.head" in told and "to_q" in told
    hollow.save(pairs(QUERIES, 1536), lora)
    assert "LoRA style" not in turbodiff("plan", *asked, str(lora))[1].out


def test_a_lora_of_one_expert_that_is_asked_for_both_is_refused_with_the_flag_that_works(
    turbodiff, monkeypatch, tmp_path
):
    monkeypatch.setenv("LC_ALL", "en.UTF-8")
    lora, asked = tmp_path / "low.safetensors", ("a cat", "--model", PAIR.display_name, "--pin", "model", "--lora")
    hollow.save({f"low_noise_model.{name}": of for name, of in pairs(QUERIES, 5120).items()}, lora)
    code, said = turbodiff("generate", *asked, str(lora))
    assert code == 2 and f"--lora {lora}:1:low" in said.err
    assert "LoRA low" not in turbodiff("plan", *asked, f"{lora}:low")[1].out


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_an_expert_that_cannot_be_told_is_asked_for_by_plan_and_generate_before_any_download(
    turbodiff, monkeypatch, weights, lang
):
    monkeypatch.setenv("LC_ALL", f"{lang}.UTF-8")
    for n in range(4):  # files of nobody, which come first in the folder
        (weights / f"a{n}.safetensors").write_text("<html>")
    path = weights / "wan2.2_t2v_a14b.safetensors"
    hollow.save(network_shapes(PAIR, "dit", False, False), path)
    asked, command = ("a cat", "--model", PAIR.display_name, "--pin", "model"), f"turbodiff models tell {path} --expert"
    said = turbodiff("plan", *asked)[1]
    assert command in said.out + said.err
    code, said = turbodiff("generate", *asked)
    assert code == 2 and command in said.err and "models pull" not in said.err and "a0" not in said.err


@pytest.mark.parametrize(
    ("package", "extra", "folder", "asked"),
    [
        ("ccvfi", "interpolate", "interpolators", ("--smooth-fps", "30", "--interpolator")),
        ("spandrel", "upscale", "upscalers", ("--upscale", "2", "--upscaler")),
    ],
)
def test_a_network_whose_package_is_missing_is_refused_by_plan_and_generate_with_what_to_install(
    turbodiff, monkeypatch, weights, package, extra, folder, asked
):
    monkeypatch.setitem(sys.modules, package, None)
    (weights / folder).mkdir()
    (weights / folder / "mine.pth").write_bytes(b"x")
    for command in ("plan", "generate"):
        code, said = turbodiff(command, "a red circle", "--model", "demo", *asked, "mine.pth")
        assert code == 2 and f"pip install 'turbodiff[{extra}]'" in said.err and "mine.pth" not in said.err
    assert not list(weights.parent.rglob("*.mp4"))


def test_files_that_nothing_but_models_without_networks_share_are_nobodys_own(turbodiff, weights):
    for network in weights.glob("*1.3B*"):
        network.unlink()
    lines = turbodiff("models", "usage")[1].out.splitlines()
    own = [line.split()[-5:-3] for line in lines if line.endswith("of its own")]
    users = [spec for spec in all_models() if not spec.bundled]
    assert len(own) == len(users) and {tuple(size) for size in own} == {("0.0", "GB")} and "shared with" in lines[1]


def test_a_delete_says_why_it_leaves_a_file(turbodiff, monkeypatch, tmp_path, weights):
    monkeypatch.setenv("TURBODIFF_MODELS", f"{tmp_path / 'first'}:{weights}")
    code, said = turbodiff("models", "delete", SMALL.name, "--yes")
    lines = said.out.splitlines()
    assert code == 0 and lines[0] == "deleted 0 files"
    assert len(lines) == 1 + len(list(weights.iterdir())) and all("not below" in line for line in lines[1:])


def test_a_lora_for_an_expert_of_a_model_with_one_network_is_refused_before_the_start(turbodiff, monkeypatch, tmp_path):
    monkeypatch.setenv("LC_ALL", "en.UTF-8")
    hollow.save(pairs(QUERIES, 1536), lora := tmp_path / "a.safetensors")
    code, said = turbodiff("generate", "a cat", "--model", SMALL.display_name, "--lora", f"{lora}:1:high")
    assert code == 2 and said.err.startswith("error: lora: ") and f"--lora {lora}:1" in said.err, said.err
