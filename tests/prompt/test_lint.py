"""Advice on prompts: the guide's own sentences (requirements.md rows 43 to 50), and many that deserve no advice."""

import time
import tomllib
from pathlib import Path

import pytest

import webui
from turbodiff.prompt.lint import has_motion, is_chinese, lint
from turbodiff.prompt.weights import parse


def chips(prompt: str, tokens: int | None = None) -> set[str]:
    return {advice.key for advice in lint(prompt, tokens)}


def rewrite(prompt: str, key: str) -> str:
    return next(advice.rewrite for advice in lint(prompt) if advice.key == key)


def test_row_43_chinese_is_told_apart_and_never_a_chip() -> None:
    assert is_chinese("宇航员在月球表面跳跃") and not is_chinese("an astronaut jumps on the moon")
    assert is_chinese("一只猫 chases 蝴蝶") and not is_chinese("")
    assert chips("宇航员在月球表面跳跃") == set()


def test_row_44_the_bad_example_gets_both_chips_and_the_good_one_none() -> None:
    for comma in ",，":
        assert chips(f"一只猫在草地上{comma}旁边有树{comma}天空是蓝色的") == {"no_verb", "flat_list"}
        assert chips(f"一只橙色的猫{comma}追逐着蝴蝶{comma}阳光洒在草地上{comma}微风轻拂树叶") == set()


@pytest.mark.parametrize(
    "example", ["猫追逐蝴蝶", "夕阳染红了天空", "a cat chases a butterfly", "the sunset turns the sky red"]
)
def test_row_46_what_the_chip_proposes_gets_no_chip(example: str) -> None:
    tip = tomllib.loads((Path(webui.__file__).parent / "wording" / "lint.toml").read_text("utf-8"))["no_verb_tip"]
    assert example in "".join(tip) and chips(example) == set()


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a cat on the grass",
        "猫",
        "猫在草地上",
        "a cat and a dog and a bird",
        "猫和狗和鸟",
        "a cat, a tree and a sky and fog",
    ],
)
def test_a_rewrite_takes_its_chip_away(prompt: str) -> None:
    for advice in lint(prompt):
        if advice.rewrite:
            assert advice.key not in chips(advice.rewrite), advice
            assert "no_verb" not in chips(advice.rewrite) and "flat_list" not in chips(advice.rewrite), advice


def test_row_45_advice_is_advice() -> None:
    keys = {"no_verb", "flat_list", "too_long", "too_short", "camera_contradicts", "weight_range"}
    assert chips("a cat", tokens=900) <= keys, "nothing says that a prompt fails or hangs"


@pytest.mark.parametrize(
    "prompt",
    [
        "猫追逐蝴蝶", "夕阳染红了天空", "轻盈地弹跳", "地球缓缓旋转", "霓虹灯倒影摇曳", "风吹起和服下摆",
        "tracking shot of a castle",
        "a cat chases a butterfly", "the sunset turns the sky red", "she ran home", "the wind carries leaves",
        "镜头缓缓推近一座城堡", "固定的城堡，镜头环绕", "the camera slowly pushes in on a castle",
        "a drone shot, the camera orbits the tower", "延时摄影，城市天际线", "他正在看书", "火车驶过大桥",
    ],
)  # fmt: skip
def test_row_46_verbs_and_camera_moves_are_motion(prompt: str) -> None:
    assert has_motion(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "猫在草地上", "天空是蓝色的", "一个穿着红裙的女人站在走廊里", "飞机在跑道上",
        "山谷里的河流和瀑布旁的行人", "一位戴着帽子的舞者", "a man at the start of the race",
        "a cat on the grass", "the sky is blue", "a woman wearing a hat standing in a building in the morning",
        "a house at the lake with waves", "a portrait of a king with a ring", "masterpiece, best quality, 8k",
    ],
)  # fmt: skip
def test_row_46_states_and_things_are_not(prompt: str) -> None:
    assert not has_motion(prompt)
    assert "no_verb" in chips(prompt)


def test_row_46_one_click_adds_a_motion() -> None:
    for prompt in ("猫在草地上。", "a cat on the grass, ", "a (cat:1.3) on the grass"):
        better = rewrite(prompt, "no_verb")
        assert has_motion(better) and better.startswith(prompt.rstrip(" ,。"))
    assert parse(rewrite("a (cat:1.3) on the grass", "no_verb")).spans[0].weight == 1.3


@pytest.mark.parametrize(
    ("prompt", "better"),
    [
        ("a cat and a dog and a bird run", "a cat, a dog, a bird run"),
        ("猫和狗和鸟在草地上奔跑", "猫，狗，鸟在草地上奔跑"),
        ("温和的阳光下,和服少女和一只猫以及一只狗奔跑", "温和的阳光下,和服少女，一只猫，一只狗奔跑"),
        ("a (cat:1.3) and a dog and (rain:0.5) falls", "a (cat:1.3), a dog, (rain:0.5) falls"),
    ],
)
def test_row_47_commas_replace_and(prompt: str, better: str) -> None:
    assert rewrite(prompt, "flat_list") == better
    assert "flat_list" not in chips(better)


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat and a dog run over the grass", "a black and white cat walks up and down the long stairs",
        "柔和的光线下，和平鸽飞过温和的海面", "一只猫和一只狗奔跑过草地",
        "a cat runs, the grass sways, the sky is blue",
    ],
)  # fmt: skip
def test_row_47_ordinary_sentences_are_no_lists(prompt: str) -> None:
    assert chips(prompt) == set()


def test_row_48_a_weight_out_of_range_is_said() -> None:
    (advice,) = lint("a (red:5) circle moves right")
    assert advice.key == "weight_range" and advice.numbers == {"got": 5.0, "low": 0.1, "high": 3.0}
    assert chips("a (red:1.5) circle moves right") == set()


def test_row_49_and_50_no_chip_promises_anything() -> None:
    for advice in lint("一只猫在草地上,旁边有树,天空是蓝色的"):
        assert not any("%" in str(value) or "90" in str(value) for value in advice.numbers.values())


def test_a_prompt_that_the_encoder_cuts_is_counted() -> None:
    prompt = "a cat runs over the green hill"
    assert chips(prompt, tokens=512) == set() and chips(prompt, tokens=None) == set()
    (advice,) = lint(prompt, tokens=600)
    assert (advice.key, advice.numbers) == ("too_long", {"tokens": 600, "limit": 512, "over": 88})


@pytest.mark.parametrize(
    ("prompt", "better"),
    [
        ("the camera zooms in, a cat jumps high, the camera zooms out", ""),
        ("static camera, the camera slowly orbits a statue", "the camera slowly orbits a statue"),
        ("镜头推近一座古老的城堡,镜头拉远", "镜头推近一座古老的城堡"),
        ("镜头向左移动，镜头向右移动，一辆红色的车驶过", "镜头向左移动，一辆红色的车驶过"),
        ("the camera pans left while it pans right over the sea", ""),
        ("固定镜头，镜头环绕着一座巨大的雕像", "镜头环绕着一座巨大的雕像"),
    ],
)
def test_a_camera_that_does_two_opposite_things_is_said(prompt: str, better: str) -> None:
    assert "camera_contradicts" in chips(prompt)
    if better:
        assert rewrite(prompt, "camera_contradicts") == better
        assert "camera_contradicts" not in chips(better)


@pytest.mark.parametrize(
    "prompt",
    [
        "the camera zooms in, then zooms out on the running cat", "镜头先推近，然后拉远，猫在奔跑",
        "a red car drives left, a blue car drives right", "static camera, a cat jumps over the fence",
        "the camera pans left over the rising sea", "一只鸟向左飞，一只鸟向右飞",
    ],
)  # fmt: skip
def test_moves_in_turn_or_of_things_do_not_contradict(prompt: str) -> None:
    assert "camera_contradicts" not in chips(prompt)


def test_a_few_words_are_too_short() -> None:
    assert "too_short" in chips("a cat runs") and "too_short" in chips("猫跑")
    assert "too_short" not in chips("宇航员在月球表面跳跃")
    assert chips("") == chips("  \n") == set()


def test_a_wall_of_text_is_read_at_once() -> None:
    started_s = time.monotonic()
    for text in ("a cat and " * 800, "镜头推近" * 2000, "camera " * 1100, "和" * 8000, "((a:1)" * 1300):
        lint(text)
    assert time.monotonic() - started_s < 10
