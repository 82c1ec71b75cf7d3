"""Finished clips: the tile in a strip, the card beside the player, the symptoms and their knobs."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from webui.view import Snapshot
from webui.view.jobs import model_name, size_name
from webui.view.meter import value_text
from webui.wording import Words

STARS = 5
_WORDS = re.compile(r"[\u3400-\u9fff]|\s+|[^\s\u3400-\u9fff]+")
SAME_IDEA = 0.6  # of the shorter prompt's words: the demo's captions share half of theirs with any other
SCOUT_STEPS = 2  # configs/presets.toml: a scout takes two steps


@dataclass(frozen=True)
class Tile:
    """A clip in a grid."""

    clip: str
    poster: str
    caption: str
    note: str
    rating: str


@dataclass(frozen=True)
class Knob:
    """A symptom and the one change that answers it, with the same seed."""

    symptom: str
    label: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """The result card."""

    clip: str
    video: str
    poster: str
    prompt: str
    facts: tuple[tuple[str, str], ...]
    badges: tuple[tuple[str, str], ...]  # kind, sentence
    knobs: tuple[Knob, ...]
    rating: str
    note: str
    demo: bool
    scouted: bool = False  # a first round: ask whether the motion is there
    changed: tuple["Word", ...] = ()  # against the prompt of the round before


def media_url(clip: str, poster: bool = False) -> str:
    """Where our own route serves a clip or its poster."""
    return f"/media/{clip}" + ("/poster" if poster else "")


def tile(clip: Any, words: Words, now_s: float) -> Tile:
    """A clip as a tile."""
    request = clip.request or {}
    note = " · ".join(
        part
        for part in (model_name(request), size_name(request), str(clip.seed), words.ago(max(0, now_s - clip.created_s)))
        if part
    )
    poster = media_url(clip.id, poster=True) if clip.poster else ""
    return Tile(str(clip.id), poster, str(request.get("prompt", "")), note, str(clip.rating or ""))


def tiles(snapshot: Snapshot, words: Words, limit: int = 12) -> list[Tile]:
    """The newest clips."""
    return [tile(clip, words, snapshot.now_s) for clip in snapshot.clips[:limit]]


def card(clip: Any, words: Words, others: Iterable[Any] = ()) -> Card:
    """The card of one clip: settings, what really ran, predicted and measured, what the guard did.

    `others`: the library, to show what changed since the round before.
    """
    before = round_before(clip, others)
    request, result = clip.request or {}, clip.result or {}
    return Card(
        clip=str(clip.id),
        video=media_url(clip.id),
        poster=media_url(clip.id, poster=True) if clip.poster else "",
        prompt=str(request.get("prompt", "")),
        facts=tuple(_facts(clip, request, result, words)),
        badges=tuple(_badges(clip, request, words)),
        knobs=tuple(knobs(request, words)),
        rating=str(clip.rating or ""),
        note=str(clip.note or ""),
        demo=str(request.get("model", "")).startswith("demo"),
        changed=prompt_diff(str(before.request.get("prompt", "")), str(request.get("prompt", ""))) if before else (),
        scouted=int(request.get("steps") or 4) <= SCOUT_STEPS,
    )


@dataclass(frozen=True)
class Word:
    """A piece of a prompt: kept, added or dropped since the clip before."""

    text: str
    how: str  # same | new | gone


def prompt_diff(before: str, after: str) -> tuple[Word, ...]:
    """What changed between two rounds' prompts, word by word (Chinese: character by character); () if nothing did."""
    if not before or before == after:
        return ()
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    pieces = []
    for how, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if how == "equal":
            pieces.append(Word("".join(new[k:m]), "same"))
            continue
        pieces += [Word("".join(old[i:j]), "gone")] if j > i else []
        pieces += [Word("".join(new[k:m]), "new")] if m > k else []
    return tuple(pieces)


def round_before(clip: Any, others: Iterable[Any]) -> Any | None:
    """The newest older clip of the same seed whose prompt is another wording of this one."""
    prompt = str((clip.request or {}).get("prompt", ""))
    for other in others:  # the newest first
        older = other.created_s < clip.created_s and other.seed == clip.seed
        if older and _reworded(str((other.request or {}).get("prompt", "")), prompt):
            return other
    return None


def _reworded(before: str, after: str) -> bool:
    """Whether most words of one prompt stand in the other: a round of the same idea, not another idea."""
    old, new = ([word for word in _WORDS.findall(prompt) if not word.isspace()] for prompt in (before, after))
    kept = sum(block.size for block in SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks())
    return before != after and kept > SAME_IDEA * min(len(old), len(new))


def _facts(clip: Any, request: Mapping[str, Any], result: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    frames, fps = int(request.get("num_frames") or 0), int(request.get("fps") or 16)
    ran = result.get("ran") or {}
    facts = [
        (words("clip.model"), f"{model_name(request)} · {request.get('width')}x{request.get('height')}"),
        (words("clip.length"), f"{words('unit.frames', n=frames)} · {words.seconds(frames / fps)}"),
        (words("clip.seed"), str(clip.seed)),
        (words("clip.steps"), f"{request.get('steps')} · {str(request.get('sampler', '')).upper()}"),
    ]
    if ran.get("attention"):
        facts.append((words("clip.attention"), attention(clip, ran, words)))
    plan = clip.plan or {}
    measured, predicted = ran.get("peak_bytes") or result.get("peak_bytes"), plan.get("peak_bytes")
    if predicted and measured:
        facts.append(
            (words("clip.peak"), words("clip.peak_both", predicted=words.gib(predicted), measured=words.gib(measured)))
        )
    if result.get("seconds"):
        facts.append((words("clip.took"), words.seconds(float(result["seconds"]))))
    return facts


def attention(clip: Any, ran: Mapping[str, Any], words: Words) -> str:
    """Asked and ran, never silently different: "asked sagesla, ran sagesla (triton, sm_120)"."""
    how = ", ".join(str(ran[name]) for name in ("backend", "arch") if ran.get(name))
    did = f"{ran['attention']} ({how})" if how and "(" not in str(ran["attention"]) else str(ran["attention"])
    asked = (clip.request or {}).get("attention", "auto")
    for change in (clip.plan or {}).get("changes", ()):
        if change["field"] == "attention":
            asked = change["from_value"]
    return words("clip.asked_ran", asked=words.or_else(f"value.attention_{asked}", str(asked)), ran=did)


def _badges(clip: Any, request: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    found = []
    if str(request.get("model", "")).startswith("demo"):
        found.append(("accent", words("clip.demo")))
    for change in (clip.plan or {}).get("changes", ()):
        if change.get("lossy"):
            name = words.or_else(f"field.{change['field']}", change["field"])
            before, after = (value_text(change["field"], change[end], words) for end in ("from_value", "to_value"))
            found.append(("warn", words("clip.lowered", field=name, before=before, after=after)))
    for flaw in (clip.result or {}).get("flaws", ()):
        found.append(("warn", words.or_else(f"clip.flaw_{flaw}", str(flaw))))
    return found


def knobs(request: Mapping[str, Any], words: Words) -> list[Knob]:
    """Symptom -> knob: each repeats the same seed with only that changed."""
    found = []
    if request.get("kind") == "i2v" and float(request.get("boundary") or 0.9) > 0.7:
        found.append(Knob(words("clip.noisy"), "Boundary 0.7", {"boundary": 0.7}))
    if request.get("sampler") == "ode":
        found.append(Knob(words("clip.noisy"), "SDE", {"sampler": "sde"}))
    if float(request.get("topk") or 0.1) < 0.15:
        found.append(Knob(words("clip.blurry"), "SLA TopK 0.15", {"topk": 0.15}))
    if int(request.get("steps") or 4) < 4:
        found.append(Knob(words("clip.blurry"), words("meter.steps", n=4), {"steps": 4}))
    found.append(Knob(words("clip.still"), words("clip.add_verb"), {}))
    return found
