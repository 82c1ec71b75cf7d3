"""Prompts, presets and wildcards are kept, found again, and survive damage of their files."""

import json
import os

import pytest

from turbodiff.archive.recipes import MAX_BYTES, MAX_LIST_BYTES, MAX_PRESETS, MAX_PROMPTS, Recipes
from turbodiff.spec.errors import RequestError


@pytest.fixture
def recipes(tmp_path):
    return Recipes(tmp_path)


def test_prompts_come_back_newest_first_each_once_by_their_words(recipes):
    recipes.remember(["a cat", " "])
    recipes.remember(["一只狗", "A red cat"])
    recipes.remember(["a cat"])
    assert recipes.prompts() == ["a cat", "一只狗", "A red cat"]
    assert recipes.prompts("CAT a") == ["a cat", "A red cat"] and recipes.prompts("狗") == ["一只狗"]
    recipes.remember(str(number) for number in range(2 * MAX_PROMPTS))
    assert len(recipes.prompts(limit=10 * MAX_PROMPTS)) == MAX_PROMPTS


def test_presets_are_saved_replaced_and_deleted_by_name(recipes):
    recipes.save({"夜景 720p": {"steps": 4}})
    recipes.save({"夜景 720p": {"steps": 2, "prompt": "x"}, "other": {}})
    assert recipes.presets() == {"other": {}, "夜景 720p": {"steps": 2, "prompt": "x"}}
    recipes.delete("other")
    recipes.delete("never there")
    assert list(recipes.presets()) == ["夜景 720p"]


@pytest.mark.parametrize("name", ["", "  ", "\ud800", "../x", "a/b", "x" * 61, "a\nb", "a\0b", "..", "猫" * 60 + "x"])
def test_a_name_never_leads_elsewhere(recipes, tmp_path, name):
    with pytest.raises(RequestError):
        recipes.save({"a good one": {}, name: {}})
    assert not list(tmp_path.rglob("*.json"))


def test_lists_are_read_in_any_encoding_and_damage_is_passed_over(recipes, tmp_path):
    recipes.wildcard_folder.mkdir()
    (recipes.wildcard_folder / "动物.txt").write_bytes("猫\n# not this\n\n狗 \n".encode("gb18030"))
    (recipes.wildcard_folder / "bad.txt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "prompts.json").write_text("[" * 10**5)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "bad.json").write_text("{")
    assert recipes.wildcards()["动物"] == ["猫", "狗"]
    assert recipes.prompts() == [] and recipes.presets() == {}
    recipes.remember(["again"])
    assert recipes.prompts() == ["again"]


def test_presets_come_all_or_none(recipes, tmp_path):
    for many in ({f"n{number}": {} for number in range(MAX_PRESETS + 1)}, {"a": {}, "b": {"prompt": "x" * (1 << 20)}}):
        with pytest.raises(RequestError):
            recipes.save(many)
        assert not list(tmp_path.rglob("*.json"))


def test_what_no_form_holds_and_what_no_page_can_show_stays_out(recipes, tmp_path):
    for folder in (recipes.wildcard_folder, tmp_path / "presets"):
        folder.mkdir()
    for name in (b"wildcards/\xff.txt", b"presets/\xff.json", b"wildcards/\x1b[31m.txt"):
        (tmp_path / os.fsdecode(name)).write_text('{"fields": {}}')
    (recipes.wildcard_folder / "long.txt").write_text("x\n" * MAX_LIST_BYTES)
    (tmp_path / "presets" / "odd.json").write_text('{"fields": {"a": NaN, "b": {}, "c": [[1]], "d": 1, "e": ["x"]}}')
    (tmp_path / "prompts.json").write_text('["\\ud800 a", 5, "b"]')
    assert recipes.presets() == {"odd": {"d": 1, "e": ["x"]}} and json.dumps(recipes.presets(), allow_nan=False)
    assert recipes.prompts() == ["? a", "b"]
    assert [*recipes.wildcards()] == ["long"] and len(recipes.wildcards()["long"]) <= MAX_LIST_BYTES / 2
    assert recipes.wildcards().get("../presets/odd") is None


def test_long_prompts_push_the_oldest_out_and_never_all(recipes, tmp_path):
    for start in range(0, 400, 100):
        recipes.remember(f"{start + number} " + "字" * 7900 for number in range(100))
    kept = recipes.prompts(limit=MAX_PROMPTS)
    assert len(kept) > 100 and kept[0].startswith("300 ") and (tmp_path / "prompts.json").stat().st_size <= MAX_BYTES
