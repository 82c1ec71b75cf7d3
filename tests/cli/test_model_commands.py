"""`turbodiff models list` and `models download`: the variants of a model's files, and the one that suits a card."""

import json
import math
import os

import numpy as np
import pytest

from tests.webui import hollow as headers
from tests.weights.test_locate import hollow
from turbodiff.gpu.probe import machine_now
from turbodiff.plan.tiers import fits_of, installed
from turbodiff.spec.models import all_models, find_model
from turbodiff.spec.wording import Words
from turbodiff.weights.fit import network_shapes
from turbodiff.weights.locate import inventory
from turbodiff.weights.look import look


@pytest.fixture(autouse=True)
def a_card_of_24_gb_and_no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TURBODIFF_PRETEND_VRAM", "23.5")
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_list_marks_every_variant_with_its_size_before_the_download(turbodiff, monkeypatch, lang):
    monkeypatch.setenv("LC_ALL", f"{lang}.UTF-8")
    code, said = turbodiff("models", "list")
    assert code == 0
    lines = [line.split() for line in said.out.splitlines()]
    for spec in all_models():
        if spec.bundled:
            continue
        start = next(number for number, line in enumerate(lines) if line[:1] == [spec.display_name])
        own = {line[0]: " ".join(line) for line in lines[start : start + 16] if line and line[1:3][-1:] == ["GB"]}
        for variant, fit in fits_of(spec, machine_now()).items():
            told = own[variant.name]
            assert Words(lang).fit(fit).split("(")[0].split(",")[0].split("，")[0] in told
            assert (Words(lang)("fit.suited") in told) == (fit.suited and fit.mark != "no")


@pytest.mark.parametrize(
    ("chosen", "file"),
    [
        ((), "TurboWan2.1-T2V-14B-480P-quant.pth"), (("--variant", "480p-plain"), "TurboWan2.1-T2V-14B-480P.pth"),
        (("--variant", "720p-quant"), "TurboWan2.1-T2V-14B-720P-quant.pth"),
        (("--variant", "720p-plain"), "TurboWan2.1-T2V-14B-720P.pth"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["download", "pull"])
def test_the_variant_that_is_asked_for_is_fetched_by_default_the_one_that_suits(turbodiff, command, chosen, file):
    code, said = turbodiff("models", command, "Wan2.1-14B", *chosen)
    assert code == 2  # offline: the error lists what would be fetched
    assert f"/resolve/main/{file} " in said.err


def test_a_variant_that_there_is_not_is_told_with_those_that_there_are(turbodiff):
    code, said = turbodiff("models", "download", "Wan2.1-1.3B", "--variant", "720p-quant")
    assert code == 2
    for variant in find_model("Wan2.1-1.3B").variants:
        assert variant.name in said.err


def test_a_model_is_moved_and_deleted_with_every_path_said_before(turbodiff, tmp_path):
    far, file = tmp_path / "far", hollow("Wan2.1-1.3B", tmp_path / "weights" / "turbo.pth")
    code, said = turbodiff("models", "move", "Wan2.1-1.3B", str(file.parent / "sub"))
    assert code == 2 and str(file.parent / "sub") in said.err and "try: " in said.err
    assert turbodiff("models", "move", "Wan2.1-1.3B", str(far))[0] == 0
    assert file.resolve() == far / file.name
    assert "is there already" in turbodiff("models", "move", "Wan2.1-1.3B", str(far))[1].out
    code, said = turbodiff("models", "delete", "Wan2.1-1.3B", "--yes")
    assert code == 0 and f"{file} and {far / file.name}, where it was moved to" in said.out
    assert not file.is_symlink() and not list(far.iterdir())
    code, said = turbodiff("models", "move", "Wan2.1-1.3B", str(tmp_path / "third"))
    assert code == 2 and "nothing of this model can be moved" in said.err and not (tmp_path / "third").exists()


def test_a_move_for_the_page_says_its_error_in_fields(turbodiff, tmp_path):
    hollow("Wan2.1-1.3B", tmp_path / "weights" / "turbo.pth")
    (tmp_path / "file").write_bytes(b"x")
    code, said = turbodiff("models", "move", "Wan2.1-1.3B", str(tmp_path / "file"), "--json")
    assert code == 2 and json.loads(said.out)["error"]["code"] == "move_not_folder" and not said.err


def test_the_list_ends_with_what_was_passed_over_and_does_not_name_thousands(turbodiff, tmp_path):
    for n in range(130):
        (tmp_path / "weights" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "weights" / "a" / f"{n:03}.safetensors").write_text("<html>")
    lines = turbodiff("models", "list")[1].out.splitlines()
    assert sum(line.startswith("passed over") for line in lines) == 101 and lines[-1].endswith("30 more files")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_list_and_a_plan_name_the_file_that_is_here_with_its_own_schedule_and_what_lacks(
    turbodiff, monkeypatch, tmp_path, lang
):
    monkeypatch.setenv("LC_ALL", f"{lang}.UTF-8")
    spec, words = find_model("Wan2.1-1.3B"), Words(lang)
    (tmp_path / "weights").mkdir()
    headers.save(network_shapes(spec, "dit", False, False), tmp_path / "weights" / "wan_plain.safetensors")
    on_disk = installed(machine_now(), inventory())[spec.name]
    assert [reason.key for reason in on_disk.reasons][:1] == ["schedule_base"]
    code, said = turbodiff("models", "list")
    assert code == 0 and words.takes(on_disk.files, on_disk.fit) in said.out
    assert "weights/wan_plain.safetensors" in said.out and words.say(on_disk.reasons[0]) in said.out
    code, said = turbodiff("plan", "a cat", "--model", "Wan2.1-1.3B")
    assert code == 0
    assert "weights/wan_plain.safetensors" in said.out and words.say(on_disk.reasons[0]) in said.out
    assert "Wan2.1_VAE.pth" in said.out and "turbodiff models pull Wan2.1-1.3B" in said.out
    code, said = turbodiff("plan", "a cat", "--model", "Wan2.1-14B", "--pretend-vram", "2", "--pin", "model")
    assert code == 5 and "turbodiff models pull Wan2.1-14B" in said.err.splitlines()[0]


def test_a_gguf_file_without_its_package_is_said_by_plan_list_and_generate(turbodiff, monkeypatch, tmp_path):
    gguf = pytest.importorskip("gguf")
    spec, path = find_model("Wan2.1-1.3B"), tmp_path / "weights" / "wan-Q8_0.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [spec.dit.dim, spec.dit.in_dim, 1, 2, 2])
    code, nbytes = gguf.GGMLQuantizationType.Q8_0, 0
    for name, shape in network_shapes(spec, "dit", False, False).items():
        if name.startswith("blocks.") and len(shape) == 2:  # 34 bytes for 32 numbers
            rows = (shape[0], shape[1] // 32 * 34)
            writer.add_tensor_info(name, rows, np.dtype(np.uint8), math.prod(rows), raw_dtype=code)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float16), 2 * math.prod(shape))
        nbytes += 2 * math.prod(shape) + 64
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + nbytes)
    asked = ("a cat", "--model", spec.display_name)
    assert "weights/wan-Q8_0.gguf" in turbodiff("plan", *asked)[1].out, "it is taken where the package is here"
    monkeypatch.setattr("turbodiff.weights.look.find_spec", lambda name: None)
    look.cache_clear()
    try:
        for command, stream, ends in ((("plan", *asked), "out", 0), (("generate", *asked), "err", 2)):
            code, said = turbodiff(*command)
            told = getattr(said, stream)
            assert code == ends and "wan-Q8_0.gguf" in told and "pip install 'turbodiff[gguf]'" in told, command
        code, said = turbodiff("models", "list")
        assert "wan-Q8_0.gguf" in said.out and "pip install 'turbodiff[gguf]'" in said.out
    finally:
        look.cache_clear()
