"""Prompts, presets and wildcards are kept, found again, and survive damage of their files."""

import pytest

from turbodiff.archive.recipes import MAX_PROMPTS, Recipes
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
    recipes.save("夜景 720p", {"steps": 4})
    recipes.save("夜景 720p", {"steps": 2, "prompt": "x"})
    recipes.save("other", {})
    assert recipes.presets() == {"other": {}, "夜景 720p": {"steps": 2, "prompt": "x"}}
    recipes.delete("other")
    recipes.delete("never there")
    assert list(recipes.presets()) == ["夜景 720p"]


@pytest.mark.parametrize("name", ["", "  ", "../x", "a/b", "x" * 61, "a\nb", "a\0b", "..", "猫" * 60 + "x"])
def test_a_name_never_leads_elsewhere(recipes, tmp_path, name):
    with pytest.raises(RequestError):
        recipes.save(name, {})
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
