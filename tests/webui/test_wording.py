"""Both languages say everything, and neither speaks the other's."""

import ast
import re
import string
from pathlib import Path
from typing import get_args

import pytest
from literals import LITERAL
from turbodiff_kernels import backend

from tests.sources import syntax_tree
from turbodiff.media.pictures import AdviceKey
from turbodiff.plan.explain import REASON_KEYS
from turbodiff.spec.events import Notice
from turbodiff.spec.models import all_models
from turbodiff.spec.request import Request
from turbodiff.spec.wording import shared_catalogue
from turbodiff.weights import kinds
from webui.wording import Words, catalogue, language_of

ROOT = Path(__file__).resolve().parents[2]
HAN = re.compile("[\u4e00-\u9fff]")


def names_in(sentence):
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}


def test_both_languages_say_every_sentence_with_the_same_numbers():
    for key, (english, chinese) in catalogue().items():
        assert names_in(english) == names_in(chinese), key
        assert english.strip() and chinese.strip(), key


def test_english_has_no_chinese_and_chinese_no_english_words():
    for key, (english, chinese) in catalogue().items():
        if key != "bar.lang_tip":  # each names the other language in that language
            assert not HAN.search(english), key
            assert not re.search(r"[A-Za-z]{2,}", LITERAL.sub(" ", chinese)), key


def test_every_reason_of_the_planner_has_a_sentence_with_its_own_numbers():
    for key, numbers in REASON_KEYS.items():
        english, _ = catalogue()[f"reason.{key}"]
        assert names_in(english) <= set(numbers), key


# functions that make an error or a notice of a code among their arguments
SAYERS = re.compile(r"(Error|_bad|bad_\w+|_refused|refuse|\bsay)$")
CODE = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+")


def sources():
    """What may reach a person, on the page or in a shell."""
    return (ROOT / "turbodiff").rglob("*.py")


def codes_in_the_source():
    page = "\n".join(path.read_text("utf-8") for path in (ROOT / "webui").rglob("*.py"))
    found = set(re.findall(r"\bcode=\"([a-z0-9_]+)\"", page))
    for path in sources():
        text = path.read_text("utf-8")
        found |= set(re.findall(r"\bcode=\"([a-z0-9_]+)\"", text))
        for call in (node for node in ast.walk(syntax_tree(path)) if isinstance(node, ast.Call)):
            if SAYERS.search(ast.unparse(call.func)):
                words = [part.value for part in call.args if isinstance(part, ast.Constant)]
                found |= {word for word in words if isinstance(word, str) and CODE.fullmatch(word)}
    return sorted(found)


def test_every_error_code_has_a_sentence():
    found = codes_in_the_source()
    assert {"picture_broken", "lora_half", "does_not_fit"} <= set(found)  # by keyword and by place
    assert not [code for code in found if f"error.{code}" not in shared_catalogue()]


def test_every_field_of_a_request_that_is_refused_is_named_in_both_languages():
    for field in Request.model_fields:
        told = {"code": f"bad_{field}", "field": field, "what": "not a legal value", "got": "../x"}
        for lang in ("en", "zh"):
            said = Words(lang).error(told)
            assert said not in ("not a legal value", Words(lang)("error.other", code=told["code"])), said


def test_every_kind_of_file_that_is_none_of_ours_has_a_name_in_both_languages():
    told = {name for *_, name in (*kinds.OTHERS, *kinds.FAMILY, *kinds.NOT_WEIGHTS)}
    named = {name for name in told if re.search("^(an?|the|another) |[a-z]{3,} [a-z]{2,} ", name)}  # others are names
    assert named <= {key.removeprefix("kind.") for key in shared_catalogue() if key.startswith("kind.")} <= told
    assert (
        Words("zh").error({"code": "file_foreign", "field": "x", "got": "a web page"})
        == "文件 x 不是需要的类型：网页。"
    )


def test_every_proposal_of_the_advisor_has_a_sentence_with_its_own_numbers():
    for key in get_args(AdviceKey):
        assert names_in(catalogue()[f"picture.{key}"][0]) <= {"edges", "border_edges", "entropy_bits"}, key


def test_what_the_worker_says_is_shown_in_english_only_to_those_who_read_it():
    said = Notice(key="from_the_future", text="it rained")
    assert Words("en").notice(said) == "it rained"
    assert not re.search("[A-Za-z]", Words("zh").notice(said))
    assert "LoRA" in Words("zh").notice(Notice(key="lora_names_unused", numbers={"file": "a", "n": 1, "names": "b"}))


def test_every_reason_for_a_kernel_has_a_sentence_with_its_own_words():
    for key, sentence in backend.REASONS.items():
        assert names_in(catalogue()[f"system.kernel_{key}"][0]) == names_in(sentence), key


def test_every_key_that_the_page_asks_for_is_there():
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "webui").rglob("*.py"))
    asked = set(re.findall(r"words\(\s*\"([a-z0-9_.]+)\"", source))
    assert len(asked) > 60
    assert not asked - set(catalogue())
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "turbodiff").rglob("*.py"))
    asked = set(re.findall(r"\b(?:words|self)\(\s*\"([a-z0-9_]+\.[a-z0-9_]+)\"", source))
    assert len(asked) > 20
    assert not asked - set(shared_catalogue()), "a shell asks for words of the page"


def test_durations_are_spoken_in_the_language_of_the_page():
    assert Words("en").seconds(200) == "3 min 20 s"
    assert Words("zh").seconds(200) == "3 分 20 秒"
    assert Words("zh").seconds(300) == "5 分钟"
    assert Words("en").seconds(4.21) == "4.2 s"


def test_an_unknown_reason_or_error_still_says_something():
    rain = {"code": "from_the_future", "what": "it rained"}
    assert Words("en").error(rain) == "it rained"
    assert "rained" not in Words("zh").error(rain)
    assert "from_the_future" in Words("zh").error(rain)
    assert Words("en").reason("from_the_future", {}) == "from_the_future"


def test_reasons_speak_of_sizes_in_gib_and_of_phases_by_name():
    numbers = dict.fromkeys(REASON_KEYS["binding_phase"], 3 << 30) | {"phase": "vae_decode"}
    assert Words("en").reason("binding_phase", numbers).startswith("Decode decides: 3.0 GiB of 3.0 GiB")
    assert "VAE 解码" in Words("zh").reason("binding_phase", numbers)


@pytest.mark.parametrize(
    ("tag", "lang"), [("zh-CN,zh;q=0.9", "zh"), ("zh", "zh"), ("en-GB", "en"), ("", "en"), ("de", "en")]
)
def test_the_language_follows_the_browser(tag, lang):
    assert language_of(tag) == lang


def test_every_model_says_in_both_languages_what_it_is_for():
    for spec in all_models():
        assert f"model.{spec.name.replace('.', '_').replace('-', '_')}" in catalogue(), spec.name
