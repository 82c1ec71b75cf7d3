"""How a file's weights were trained to be sampled, from its header and its name alone: nothing of a tensor is read.

Asked in this order: keys that only one kind of training leaves, what the metadata says, what the file is called. The
list of weights and the plan ask the same two functions. A file that says nothing is plain Wan.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from turbodiff.spec.errors import FileError
from turbodiff.spec.schedules import PLAIN, Evidence, TrainedFor, Training
from turbodiff.weights.detect import read_header

# Metadata of ours, which scripts/train_demo/train_lora.py writes: what the weights are, and the steps they take
OUR_KIND, OUR_STEPS, OUR_FAMILY = "turbodiff.weights_are", "turbodiff.steps", "turbodiff.family"
KINDS: Mapping[str, TrainedFor] = {"rcm": "rcm", "base": "base", "step-distilled": "step-distilled"}
# Metadata that holds a file's own title; descriptions and base models name other people's files as well
TITLES = ("modelspec.title", "ss_output_name", "title", "name", "model_name", "general.name", "distillation")
MAX_TITLE_CHARS = 200
MAX_STEPS = 16  # "1000steps" in a name counts the steps of a training

# A piece of some key -> the training and family that leave it. proj_l: SLA's linear branch, distilled with rCM
# (TurboDiffusion); to_gate_compress: FastVideo's sparse attention; generator: the dumps of Self-Forcing and CausVid
KEYS: Mapping[str, tuple[TrainedFor, str]] = {
    ".proj_l.": ("rcm", ""),
    ".to_gate_compress.": ("step-distilled", "fastwan"),
    ".generator_ema.": ("step-distilled", "self-forcing"),
    ".generator.": ("step-distilled", "self-forcing"),
}
# Words of published names, the narrow ones first; a word stands alone or between signs, digits and capitals
_OWN = r"(?<![a-z])(?:{})(?![a-z])"
NAMES: tuple[tuple[re.Pattern[str], TrainedFor, str], ...] = (
    (re.compile(_OWN.format(r"r-?cm|turbowan\w*")), "rcm", ""),
    (re.compile(r"fast-?wan"), "step-distilled", "fastwan"),
    # lightning is also weather: it counts beside Wan's own number or the steps
    (re.compile(_OWN.format(r"seko") + r"|wan-?2-?[12]-?lightning"), "step-distilled", "lightning"),
    (re.compile(_OWN.format("lightning") + r".*(?<![\da-z])\d{1,2}-?steps?(?![a-z\d])"), "step-distilled", "lightning"),
    (re.compile(r"(?<![\da-z])\d{1,2}-?steps?(?![a-z\d]).*" + _OWN.format("lightning")), "step-distilled", "lightning"),
    (re.compile(r"light-?x2v|(?:cfg-?)?step-?distill|cfg-?distill"), "step-distilled", "lightx2v"),
    (re.compile(r"self-?forcing"), "step-distilled", "self-forcing"),
    (re.compile(r"caus-?vid"), "step-distilled", "causvid"),
    (re.compile(r"acc-?vid(?:eo)?"), "step-distilled", "accvid"),
    (re.compile(r"fusion(?:i)?-?x"), "step-distilled", "fusionx"),
    # Phr00t's Rapid-AllInOne: merges of several of the above, for 4 steps without guidance
    (
        re.compile(
            _OWN.format("rapid") + r".*(?<![a-z])(?:aio|all-?in-?one|mega)|wan-?2-?[12].*" + _OWN.format("rapid")
        ),
        "step-distilled",
        "",
    ),
    (re.compile(_OWN.format(r"dmd2?")), "step-distilled", "self-forcing"),
)
STEPS_WORD = re.compile(r"(?<![\da-z])(\d{1,2})-?steps?(?![a-z\d])")
GENERIC_WORD = re.compile(_OWN.format(r"distill(?:ed)?"))
# The name of plain Wan and no word more, as wan2.1_t2v_14B_fp16 and Wan2.2-T2V-A14B-HighNoise-Q4_K_M
PLAIN_NAME = re.compile(
    r"wanx?-?2-?[12](?:-|[ti]2v|a?14b|1-?3b|480p|720p|high|low|noise|fp\d+|bf16|e4m3fn|e5m2|scaled|kj|int8|comfy|"
    r"iq\d|q\d|k|[sml]|xs|xxs|nl|\d|model|diffusers)*"
)
# Folders that only hold: the one above them carries the name (diffusers' and LightX2V's trees)
HOLDERS = frozenset(
    ("transformer", "transformer_2", "high_noise_model", "low_noise_model", "distill_models", "distill_fp8",
     "distill_int8")
)  # fmt: skip
CACHE_FOLDER = "models--"  # of the Hugging Face cache, before the repository's name


def training_of(keys: Iterable[str], metadata: Mapping[str, str], path: Path, *, lora: bool = False) -> Training:
    """How the weights in a file were trained to be sampled; PLAIN where nothing tells.

    Args:
        keys: names of its tensors as they are written, with those of the dicts around them. metadata: of its header.
        path: its name and folders are asked last.
        lora: one that merely trains the modules of a distilled network has such keys too, and proves nothing by them.
    """
    told: Training | None = None
    if (kind := KINDS.get(str(metadata.get(OUR_KIND)))) is not None:
        steps, family = str(metadata.get(OUR_STEPS, "")), str(metadata.get(OUR_FAMILY, ""))
        count = int(steps) if re.fullmatch(r"\d{1,2}", steps, re.ASCII) and 1 <= int(steps) <= MAX_STEPS else 0
        told = Training(kind, family[:MAX_TITLE_CHARS], count, "metadata")
    if told is None and not lora:
        pieces = {piece for key in keys for piece in KEYS if piece in f".{key}"}
        told = next((Training(*KEYS[piece], evidence="keys") for piece in KEYS if piece in pieces), None)
    if told is None:
        titles = (str(metadata[name])[:MAX_TITLE_CHARS] for name in TITLES if name in metadata)
        told = next(filter(None, (_from_name(title, "metadata") for title in titles)), None)
    return told or _from_path(path) or PLAIN


@lru_cache(512)
def _lora_training(path: Path, _size: int, _mtime_ns: int) -> Training:
    try:
        header = read_header(path)
    except FileError:  # said when the LoRA is read
        return _from_path(path) or PLAIN
    return training_of(header.written_names, header.metadata, path, lora=True)


def lora_training(path: Path | str) -> Training:
    """Whether a LoRA distils, and how what it makes of plain Wan is sampled; read again when the file changes."""
    path = Path(path)
    try:
        stat = path.stat()
    except OSError:
        return _from_path(path) or PLAIN
    return _lora_training(path, stat.st_size, stat.st_mtime_ns)


def _from_path(path: Path) -> Training | None:
    """What the file is called; else its folder, past those that only hold; else its repository in a cache.

    A name that says no more than "distill" or "4steps" is made precise by a folder. A file that is called as plain Wan
    is says so itself: a folder `Lightning` may hold the LoRA and what it goes onto.
    """
    own = _from_name(path.stem, "name")
    if own and (own.family or own.trained_for == "rcm"):
        return own
    above = [folder for folder in path.parts[:-1][::-1] if folder.lower() not in HOLDERS]
    repositories = [folder for folder in above if folder.startswith(CACHE_FOLDER)]
    nearest = above[:1] if not PLAIN_NAME.fullmatch(_signs(path.stem)) else []
    for folder in (*nearest, *repositories):
        told = _from_name(folder, "name")
        if told and (told.family or told.trained_for == "rcm"):  # "4steps" of a folder may be about anything
            return told._replace(steps=(own.steps if own else 0) or told.steps)
    return own


def _from_name(name: str, evidence: Evidence) -> Training | None:
    """What a title or a file's name says."""
    plain = _signs(name)
    counted = STEPS_WORD.search(plain)
    steps = int(counted[1]) if counted and 1 <= int(counted[1]) <= MAX_STEPS else 0
    for pattern, trained_for, family in NAMES:
        if pattern.search(plain):
            return Training(trained_for, family, steps, evidence)
    return Training("step-distilled", "", steps, evidence) if steps or GENERIC_WORD.search(plain) else None


def _signs(name: str) -> str:
    """In lower case, with one sign between words."""
    return re.sub(r"[\s_.-]+", "-", name.lower())
