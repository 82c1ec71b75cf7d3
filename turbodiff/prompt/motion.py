"""Does a sentence say that something moves? Word lists, English and Chinese (motion.toml); a doubt counts as motion.

Advice that comes too often is not read, so the lists err on the side of hearing a verb. A camera move is motion, too.
"""

import re
import tomllib
from functools import cache
from pathlib import Path

CAMERA = re.compile(
    r"\bcamera\b.{0,60}?\b(?:mov|pan|tilt|push|pull|zoom|orbit|circl|follow|track|dolly|rise|fall|fly|glid|rotat|sweep)\w*"
    r"|\b(?:pans|panning|zooms?|zooming|dolly|dollies|tracking shot|crane shot|fly-?through|orbit shot|time-?lapse)\b"
    r"|(?:镜头|运镜|视角|画面).{0,6}?(?:推|拉|摇|移|跟|升|降|旋转|环绕|靠近|远离|放大|缩小|变)|延时摄影|推近|拉远",
    re.IGNORECASE,
)
# Words that ask for a picture that stands still; a camera that stands still is no such wish
STILLNESS = re.compile(
    r"\b(?:motionless|unmoving|immobile|freeze[- ]frame|still[- ]life|nothing moves)\b"
    r"|\bwithout (?:any )?(?:motion|movement)\b"
    r"|\bno (?:motion|movement)\b|\bfrozen in (?:time|place|motion)\b"
    r"|\b(?:a|one) still (?:image|picture|photo\w*|frame)\b"
    r"|\b(?:stands?|standing|sits?|sitting|lies|lying|holds?|holding|stays?|staying|keeps?|remains?|perfectly|completely"
    r"|absolutely|totally|entirely) still\b"
    r"|(?<!镜头)(?<!机位)(?<!相机)(?:完全|保持|处于)?静止|(?<!镜头)(?<!机位)(?<!相机)不动|纹丝不动|定格|静物|凝固",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)*")


def has_motion(text: str) -> bool:
    """Whether a clean prompt, or a part of one, names an action, a change or a camera move."""
    words = _WORD.findall(text.lower())
    if CAMERA.search(text) or any(map(_is_motion, words, ["", *words])):
        return True
    chinese = _any_of("zh_nouns").sub("", text)
    return bool(_any_of("zh_verbs").search(chinese) or _zh_verb().search(chinese))


def asks_for_stillness(text: str) -> bool:
    """Whether a prompt says that nothing should move; a fixed camera alone does not."""
    return STILLNESS.search(text) is not None


def _is_motion(word: str, before: str) -> bool:
    if word.endswith("ing") and len(word) > 4:
        return word not in _words("still_ing")
    bases = set(_bases(word)) & _words("verbs")
    is_noun = word in bases and word in _words("nouns") and before in _words("before_nouns")
    is_plural = word.endswith("s") and bool(bases & _words("plurals"))
    return word in _words("irregular") or (bool(bases) and not is_noun and not is_plural)


def _bases(word: str) -> list[str]:
    """What an English verb form may come from: chases -> chase, stopped -> stop, carries -> carry."""
    bases = [word]
    if word.endswith("s"):
        bases += [word[:-1], word[:-2], word[:-3] + "y"]
    if word.endswith("ed"):
        bases += [word[:-1], word[:-2], word[:-3], word[:-3] + "y"]
    return bases


@cache
def _table() -> dict[str, str]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


@cache
def _words(name: str) -> frozenset[str]:
    return frozenset(_table()[name].split())


@cache
def _any_of(name: str) -> re.Pattern[str]:
    return re.compile("|".join(sorted(_words(name), key=len, reverse=True)))


@cache
def _zh_verb() -> re.Pattern[str]:
    """A character of action, or any verb with 着 that does not merely stand or wear."""
    table = _table()
    return re.compile(f"[{table['zh_verb_characters']}]|[\u4e00-\u9fff](?<![{table['zh_still_before_zhe']}])着")
