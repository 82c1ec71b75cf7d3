"""The shell speaks the language of its environment, from the tables that the page has; `--json` speaks none."""

import json
import re
from datetime import datetime

import pytest
from PIL import Image

from turbodiff.cli.calibration import _told
from turbodiff.cli.machine import CHECKS
from turbodiff.gpu.card_measurements import CardMeasurement
from turbodiff.spec.errors import RequestError, TurbodiffError
from turbodiff.spec.models import all_models
from turbodiff.spec.wording import PROSE, Words, shell_language
from turbodiff.weights.locate import bundled_root
from webui.wording import Words as PageWords

ZH = PageWords("zh")
HAN = re.compile("[\u4e00-\u9fff]")
NAMES = ("LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE")


@pytest.fixture
def speak(monkeypatch, tmp_path):
    """Sets the variables of the locale, and no others; no weights, a card of 24 GB."""
    monkeypatch.setenv("TURBODIFF_PRETEND_VRAM", "23.5")
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def choose(**variables):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return choose


@pytest.mark.parametrize(
    ("variables", "lang"),
    [
        ({}, "en"), ({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "en_US.UTF-8", "LC_ALL": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_GB.UTF-8"}, "en"), ({"LANGUAGE": "zh_CN:en"}, "zh"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN"}, "zh"), ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en"}, "en"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "de:zh:en"}, "zh"), ({"LC_ALL": "C", "LANGUAGE": "zh_CN"}, "en"),
        ({"LC_ALL": "C.UTF-8", "LANGUAGE": "zh_CN"}, "zh"),
    ],
)  # fmt: skip
def test_the_language_is_that_of_the_environment(speak, variables, lang):
    speak(**variables)
    assert shell_language() == lang


@pytest.mark.parametrize("variable", ["LANG", "LC_ALL", "LANGUAGE"])
@pytest.mark.parametrize(
    ("argv", "code", "status"),
    [
        (("plan", "a cat", "--steps", "0"), "bad_steps", 2), (("plan", "a cat", "--model", "x"), "unknown_model", 2),
        (("generate", "a cat", "--model", "Wan2.1-14B"), "weights_missing", 2),
        (("models", "pull", "Wan2.1-14B"), "offline", 2), (("jobs", "show", "7"), "job_unknown", 2),
        (("restart",), "not_running", 1), (("service", "install", "--root-path", "x"), "bad_root_path", 2),
    ],
)  # fmt: skip
def test_an_error_is_the_pages_sentence_in_the_language_of_the_shell(turbodiff, speak, variable, argv, code, status):
    speak(**{variable: "zh_CN.UTF-8"})
    ended, said = turbodiff(*argv)
    start = ZH.sentences[f"error.{code}"][1].split("{")[0]
    assert ended == status and said.err.startswith("错误：") and start in said.err, said.err
    speak()
    assert not HAN.search(turbodiff(*argv)[1].err)


def test_what_an_error_tells_is_told_in_both_languages():
    error = RequestError(
        "unknown model", code="unknown_model", field="model", got="x", expected="Demo | Wan",
        try_instead="--model demo, or another one",
    )  # fmt: skip
    for lang in ("en", "zh"):
        said = Words(lang).error_line(error)
        assert all(part in said for part in ("model", "x", "Demo | Wan", "--model demo")), said
    assert "another one" not in Words("zh").error_line(error)
    future = Words("zh").error_line(TurbodiffError("it rained", code="from_the_future", got="5 mm"))
    assert "rained" not in future and "from_the_future" in future and "5 mm" in future


def test_the_list_speaks_one_language_and_describes_each_model_as_the_page_does(turbodiff, speak, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "foreign.safetensors").write_bytes(b"x")
    listed = {}
    for lang in ("en", "zh"):
        speak(LANG=f"{lang}.UTF-8")
        code, said = turbodiff("models", "list")
        assert code == 0
        listed[lang] = said.out
        for spec in all_models():
            assert PageWords(lang).model(spec) in said.out
        assert "foreign.safetensors" in said.out
    assert not HAN.search(listed["en"])
    of_a_file = re.compile(r"^ {4}(\S+\.(pth|safetensors|model)\b|-> )")  # names and repositories
    for line in listed["zh"].splitlines():
        assert HAN.search(line) or of_a_file.search(line), line


@pytest.mark.parametrize(
    "argv",
    [
        ("gpu",), ("doctor",), ("plan", "a cat", "--model", "Wan2.1-14B"), ("models", "usage"), ("jobs", "pause"),
        ("models", "verify", str(bundled_root() / "vae.safetensors")), ("jobs", "resume"), ("calibrate", "--clear"),
        ("calibrate", "--quick"), ("service", "uninstall", "--dry-run"),
    ],
    ids=lambda argv: " ".join(argv[:2]),
)  # fmt: skip
def test_what_a_command_prints_is_no_english_where_chinese_is_spoken(turbodiff, speak, argv):
    speak(LANG="zh_CN.UTF-8")
    ended, said = turbodiff(*argv)
    assert ended == 0 and HAN.search(said.out), said
    for line in said.out.splitlines():
        assert not PROSE.search(re.sub(r"(pip|export|turbodiff) .*|pretended card of|/\S+", "", line)), line
    speak()
    assert not HAN.search(turbodiff(*argv)[1].out)


def test_what_is_said_before_a_start_is_no_english_where_chinese_is_spoken(turbodiff, speak, tmp_path):
    Image.new("RGB", (96, 64), "navy").save(tmp_path / "x.png")
    argv = ("generate", "a cat", "--model", "wan2.2-a14b", "--image", str(tmp_path / "x.png"))
    speak(LANG="zh_CN.UTF-8")
    ended, said = turbodiff(*argv)
    proposal, missing = said.err.splitlines()
    assert ended == 2 and "背景简单" in proposal and "--boundary" in proposal and "no files" not in missing
    assert not PROSE.search(proposal) and HAN.search(missing)
    speak()
    told = turbodiff(*argv)[1].err
    assert not HAN.search(told) and "plain background" in told and "got no files for dit_high" in told


def test_what_was_found_of_a_card_and_what_a_check_says_have_words_in_both_languages():
    found = {"name": "NVIDIA X", "total_bytes": 24 << 30, "driver": "580", "torch": "2.9", "kernels": {"sage": ""}}
    card = CardMeasurement.model_validate({**found, "at": datetime.now().astimezone(), "seconds": 41.0})
    spoken = {lang: list(_told(card, Words(lang))) for lang in ("en", "zh")}
    assert spoken["en"][0] == "NVIDIA X, driver 580, torch 2.9, in 41 s" and len(spoken["en"]) == 11
    for line, english in zip(spoken["zh"], spoken["en"], strict=True):
        assert HAN.search(line) and not HAN.search(english) and not PROSE.search(line)
    for check in CHECKS:
        assert HAN.search(Words("zh")(f"shell.check_{check}")) and f"shell.found_{check}" in Words("zh").sentences


def test_json_is_the_same_in_every_language(turbodiff, speak):
    told = []
    for lang in ("en", "zh"):
        speak(LANG=f"{lang}.UTF-8")
        told.append(json.loads(turbodiff("plan", "a cat", "--model", "Wan2.1-14B", "--json")[1].out))
    assert told[0] == told[1]
