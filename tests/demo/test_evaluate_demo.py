"""The evaluator asks the product and judges the finished file."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts.train_demo.captions import held_out_captions

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate_demo.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_only_held_out_captions_are_asked_half_of_them_in_chinese(script: ModuleType) -> None:
    chosen = script.chosen_captions(206)
    assert {caption for caption, _ in chosen} == set(held_out_captions())
    chinese = sum(sentence == caption.chinese for caption, sentence in chosen)
    assert chinese == 103
    assert len(set(chosen)) == 206


def test_flags_become_request_fields(script: ModuleType) -> None:
    words = ["--steps", "2", "--topk=0.5", "--ode", "--attention", "sla"]
    assert script.parse_fields(words) == {"steps": "2", "topk": "0.5", "ode": True, "attention": "sla"}


def test_a_stray_word_is_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit):
        script.parse_fields(["steps", "2"])


def test_means_are_over_the_clips_and_languages_apart(script: ModuleType) -> None:
    facts = {"colour": True, "shape": True, "motion": True, "background": True}
    marks = [{**facts, "zh": False}, {**facts, "shape": False, "zh": True}]
    marks = [mark | {"first_psnr": psnr, "flicker": 0.1} for mark, psnr in zip(marks, (30.0, 20.0), strict=True)]
    result = script.summary({"model": "demo-i2v"}, marks, 1.234)
    assert (result["shape"], result["motion"], result["mean"]) == (50.0, 100.0, 87.5)
    assert (result["english"], result["chinese"]) == (100.0, 75.0)
    assert (result["first_psnr"], result["flicker"], result["s_per_clip"]) == (25.0, 0.1, 1.23)
    assert "first_psnr" in script.table([result])


def test_the_product_shows_the_ground_that_the_caption_names(script: ModuleType, tmp_path: Path) -> None:
    product = script.Product("cpu", tmp_path)
    result = script.evaluate(product, {}, 2, 0, tmp_path / "sheet.png")
    assert result["background"] == 100.0
    assert result["colour"] >= 50.0
    assert (tmp_path / "sheet.png").stat().st_size > 0
