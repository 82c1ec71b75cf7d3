"""Which words of a prompt the demo model was not trained on; its captions: turbodiff/demo/README.md."""

import re

# colours, shapes, motions and grounds of its captions with their paraphrases, and what joins them to sentences
_ENGLISH = (
    "red green blue yellow purple white orange cyan black gray grey navy brown circle disc ball square box triangle"
    " star moves move moving moved is slides sliding goes going rises falls right left up down upward downward to the"
    " grows growing gets bigger larger becomes expands shrinks shrinking smaller contracts a an one on in front of"
    " with over background ground against and while it there by toward towards shape which that"
)
KNOWN = frozenset(_ENGLISH.split())
GROUNDS = ("black", "gray", "grey", "navy", "brown")
ZH_GROUNDS = ("黑", "灰", "深蓝", "棕")
ZH_KNOWN = (
    "红|绿|蓝|黄|紫|白|橙|青|黑|灰|棕|深|色|正方形|方形|方块|圆形|圆圈|圆|三角形|三角|五角星|星形|星星|逐渐|向|往|左|右|上|下|"
    "边|方|这|那|只|移动|变大|变小|放大|缩小|一|个|颗|的|在|背景|里|前|中|正|并|着"
)
_GROUND = re.compile(r"\b([a-z]+) (?:background|ground)\b")
_ZH_GROUND = re.compile(r"([\u3400-\u9fff]{1,2})色?的?背景")


def unknown_words(prompt: str) -> tuple[str, ...]:
    """Words of a prompt that no caption of the demo holds, and grounds that it never saw; each once, in their order."""
    text = re.sub(r"[():\d.]+", " ", prompt.lower())  # without the marks of prompt weights
    found = [f"{ground} background" for ground in _GROUND.findall(text) if ground in KNOWN and ground not in GROUNDS]
    found += [word for word in re.findall(r"[a-z]+", text) if word not in KNOWN]
    found += [f"{name}色背景" for name in _ZH_GROUND.findall(text.replace("色", "")) if not name.endswith(ZH_GROUNDS)]
    found += re.findall(r"[\u3400-\u9fff]+", re.sub(ZH_KNOWN, " ", text))
    return tuple(dict.fromkeys(found))
