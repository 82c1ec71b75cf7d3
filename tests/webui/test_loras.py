"""The LoRAs of the form: sliders per expert, what a file says of itself, and where to put files when there is none."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from turbodiff.studio import Studio
from turbodiff.weights.locate import LoraFile
from turbodiff.weights.lora_facts import MAX_WORD_CHARS, MAX_WORDS, LoraFacts, lora_facts
from webui.panels.form_help import draw_loras, lora_lines
from webui.wording import Words

PAIR = {f"diffusion_model.head.head.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "gh1bli style, soft light"}, ("gh1bli style", "soft light")),
        ({"ss_tag_frequency": json.dumps({"10_cat": {"cat": 3, "ohwx": 9}})}, ("ohwx", "cat")),
        ({"ss_tag_frequency": "[" * 100_000}, ()),
        ({"ss_tag_frequency": json.dumps({"x": {"a": "many"}, "y": 3})}, ()),
        ({"modelspec.trigger_phrase": "a\x00b," + "long " * 500 + ",c" * 500}, None),
    ],
)
def test_trigger_words_come_from_the_metadata_within_limits(tmp_path, metadata, words):
    save_file(PAIR, tmp_path / "a.safetensors", metadata)
    found = lora_facts(tmp_path / "a.safetensors").words
    assert found == words if words is not None else len(found) <= MAX_WORDS
    assert all(len(word) <= MAX_WORD_CHARS and word.isprintable() for word in found)


@pytest.mark.parametrize(
    ("parts", "dense"),
    [
        (("lora_down.weight", "lora_up.weight", "alpha"), False),
        (("lora_A.weight", "lora_B.weight", "diff_b"), False),
        (("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"), True),
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), True),
        (("lokr_w1", "lokr_w2"), True),
        (("diff",), True),
    ],
)
def test_a_change_that_is_no_low_rank_is_known_from_the_header(tmp_path, parts, dense):
    save_file({f"blocks.0.ffn.0.{part}": torch.zeros(4, 4) for part in parts}, tmp_path / "a.safetensors")
    assert lora_facts(tmp_path / "a.safetensors").dense is dense


def test_an_expert_is_proposed_by_the_name_and_a_broken_file_says_nothing(tmp_path):
    for name in ("Wan2.2-style_HighNoise.safetensors", "wan2.2_style_low_noise.safetensors"):
        save_file(PAIR, tmp_path / name)
    assert [lora_facts(path).expert for path in sorted(tmp_path.iterdir())] == ["high", "low"]
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 99)
    assert lora_facts(tmp_path / "broken.safetensors") == lora_facts(tmp_path / "none.safetensors") == LoraFacts()


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_sliders_stand_for_each_expert_and_hostile_words_are_text(tmp_path, lang):
    words, file = Words(lang), LoraFile("<b>.safetensors", tmp_path / "x", 1)
    facts = LoraFacts("<script>", ("<img src=x>",), "high")
    chosen = [{"name": file.name, "strength": 0.5, "expert": "low"}]
    lines = lora_lines([file], lambda name: (facts, b"jpeg"), chosen, words)
    assert lines[0].strengths == (0.0, 0.5)
    for two_experts, sliders in ((True, 2), (False, 1)):
        drawn = str(draw_loras(lines, "models/loras", two_experts, words))
        assert (
            drawn.count('type="range"') == sliders
            and "<script>" not in drawn
            and "<img src=x" not in drawn
            and "data:image/jpeg" in drawn
        )
    assert "models/loras" in str(draw_loras([], "models/loras", True, words))


def data_url(data: bytes, kind: str = "jpeg") -> dict[str, str]:
    return {"modelspec.thumbnail": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}


def test_a_picture_comes_from_beside_or_from_the_metadata_and_a_hostile_one_is_none(tmp_path):
    drawn = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(drawn, "JPEG")
    studio = Studio(tmp_path / "state")
    cases = {"good": data_url(drawn.getvalue()), "svg": data_url(b"<svg onload='x'/>", "svg+xml"), "none": {"x": "y"},
             "cut": data_url(drawn.getvalue()[:80]), "web": {"modelspec.thumbnail": "https://example.com/a.png"},
             "text": {"modelspec.thumbnail": "data:image/png;base64,@@@"}}  # fmt: skip
    for name, metadata in cases.items():
        save_file(PAIR, tmp_path / f"{name}.safetensors", metadata)
        made = studio.lora_picture(tmp_path / f"{name}.safetensors")
        assert (made or b"").startswith(b"\xff\xd8") == (name == "good"), name
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "none.png")
    assert (studio.lora_picture(tmp_path / "none.safetensors") or b"").startswith(b"\xff\xd8")
    studio.close()
