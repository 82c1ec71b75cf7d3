"""Finished clips: the player, the card with its symptoms and knobs, the strip of the newest posters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING
from urllib.parse import quote

from turbodiff.spec.clips import rating_parts
from turbodiff.spec.events import Event, PreviewEvent
from turbodiff.spec.request import Request
from turbodiff.spec.schedules import RCM_SAMPLERS
from webui.markup import Html, action, download, el, facts, link, poster, void
from webui.panels.meter import diff, short_model
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import ClipView, Snapshot

STARS = 5
_WORDS = re.compile(r"[\u3400-\u9fff]|\s+|[^\s\u3400-\u9fff]+")
SAME_IDEA = 0.6  # of the shorter prompt's words: the demo's captions share half of theirs with any other
SCOUT_STEPS = 2  # configs/presets.toml: a scout takes two steps
DIFF_TAGS = {"new": "ins", "gone": "del"}


@dataclass(frozen=True)
class Knob:
    """A symptom and the one change that answers it, with the same seed."""

    symptom: str
    label: str
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Word:
    """A piece of a prompt: kept, added or dropped since the clip before."""

    text: str
    how: str  # same | new | gone


@dataclass(frozen=True)
class Card:
    """The result card."""

    clip: ClipView
    facts: tuple[tuple[str, str], ...]
    badges: tuple[tuple[str, str], ...]  # kind, sentence
    knobs: tuple[Knob, ...]
    demo: bool
    changed: tuple[Word, ...]  # against the prompt of the round before


def media_url(clip: str, poster: bool = False) -> str:
    """Where our own route serves a clip or its poster."""
    return link(f"/media/{quote(clip)}" + ("/poster" if poster else ""))


def poster_url(clip: ClipView) -> str:
    """Where the clip's poster is served, "" where it has none."""
    return media_url(clip.id, poster=True) if clip.poster else ""


def size_name(request: Request) -> str:
    """ "480p", or the pixels of a size of one's own."""
    return request.resolution if request.resolution != "custom" else f"{request.width}x{request.height}"


def model_name(request: Request) -> str:
    """The display name of a request's model, short; "?" where the record of a clip does not say."""
    return short_model(request.model) if request.model else "?"


def card(clip: ClipView, words: Words, others: Iterable[ClipView] = ()) -> Card:
    """The card of one clip: settings, what really ran, predicted and measured, what the guard did.

    `others`: the library, to show what changed since the round before.
    """
    before, request = round_before(clip, others), clip.request
    demo = request.model.startswith("demo")
    badges = [("accent", words("clip.demo"))] if demo else []
    for row in (diff(change, words) for change in clip.changes if change.lossy):
        badges.append(("warn", words("clip.lowered", field=row.label, before=row.before, after=row.after)))
    badges += [("warn", words("clip.exchanged_int8"))] if clip.sidecar.ran.exchange == "int8" else []
    badges += [("warn", words.or_else(f"flaw.{finding}", finding)) for finding in clip.sidecar.warnings]
    changed = prompt_diff(before.request.prompt, request.prompt) if before else ()
    return Card(clip, tuple(_facts(clip, words)), tuple(badges), tuple(knobs(request, words)), demo, changed)


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


def round_before(clip: ClipView, others: Iterable[ClipView]) -> ClipView | None:
    """The newest older clip of the same seed whose prompt is another wording of this one."""
    words = _prompt_words(clip.request.prompt)
    for other in others:  # the newest first
        if other.created_s >= clip.created_s or other.request.seed != clip.request.seed:
            continue
        old = _prompt_words(other.request.prompt)
        kept = sum(block.size for block in SequenceMatcher(None, old, words, autojunk=False).get_matching_blocks())
        if other.request.prompt != clip.request.prompt and kept > SAME_IDEA * min(len(old), len(words)):
            return other
    return None


def _prompt_words(prompt: str) -> list[str]:
    return [word for word in _WORDS.findall(prompt) if not word.isspace()]


def _facts(clip: ClipView, words: Words) -> Iterable[tuple[str, str]]:
    request, ran, measured = clip.request, clip.sidecar.ran, clip.sidecar.measured
    frames = clip.sidecar.whole_frames
    yield words("clip.model"), f"{model_name(request)} · {request.width}x{request.height}"
    yield words("clip.length"), f"{words('unit.frames', n=frames)} · {words.seconds(frames / request.fps)}"
    yield words("clip.seed"), str(request.seed)
    yield words("clip.steps"), f"{request.steps} · {request.sampler.upper()}"
    if ran.attention:  # asked and ran, never silently different: "asked sagesla, ran sagesla (triton, sm_120)"
        how = ", ".join(filter(None, (ran.backend, ran.arch)))
        did = f"{ran.attention} ({how})" if how and "(" not in ran.attention else ran.attention
        changed = [change.from_value for change in clip.changes if change.field == "attention"]
        asked = str(changed[-1] if changed else request.attention)
        asked = words.or_else(f"value.attention_{asked}", asked)
        yield words("clip.attention"), words("clip.asked_ran", asked=asked, ran=did)
    plan = clip.sidecar.plan
    if plan and measured.peak_bytes:
        both = {"predicted": words.gib(plan.peak_bytes), "measured": words.gib(measured.device_bytes)}
        yield words("clip.peak"), words("clip.both", **both)
    if plan and measured.seconds:
        both = {"predicted": words.seconds(plan.seconds), "measured": words.seconds(measured.seconds)}
        yield words("clip.took"), words("clip.both", **both)
    elif measured.seconds:
        yield words("clip.took"), words.seconds(measured.seconds)


def knobs(request: Request, words: Words) -> Iterable[Knob]:
    """Symptom -> knob: each repeats the same seed with only that changed."""
    if request.kind == "i2v" and request.boundary > 0.7:
        yield Knob(words("clip.noisy"), "Boundary 0.7", {"boundary": 0.7})
    if request.sampler == "ode":
        yield Knob(words("clip.noisy"), "SDE", {"sampler": "sde"})
    if request.topk < 0.15:
        yield Knob(words("clip.blurry"), "SLA TopK 0.15", {"topk": 0.15})
    if request.steps < 4 and request.sampler in RCM_SAMPLERS:
        yield Knob(words("clip.blurry"), words("meter.steps", n=4), {"steps": 4})
    yield Knob(words("clip.still"), words("clip.add_verb"), {})


def preview(events: Iterable[Event]) -> str:
    """The newest preview of a running job as a data URL, "" while there is none."""
    jpegs = [event.jpeg for event in events if isinstance(event, PreviewEvent)]
    return f"data:image/jpeg;base64,{jpegs[-1]}" if jpegs and jpegs[-1] else ""


def draw_player(card: Card | None, preview: str, words: Words, autoplay: bool = True) -> Html:
    """The newest preview of the running job (a data URL), else the clip, else what to do first."""
    if preview:
        return el("div", void("img", src=preview, alt=""), cls="td-player")
    if card is None:
        return _draw_black("empty", words)
    prompt = card.clip.request.prompt
    video = draw_video(card.clip, preload="metadata", autoplay=autoplay, aria_label=prompt[:120])
    badge = el("span", words("clip.demo"), cls="td-pill badge") if card.demo else None
    return el("div", video, badge, cls="td-player", data_clip=card.clip.id)


def draw_making(words: Words) -> Html:
    """The player of a first clip that has no preview yet."""
    return _draw_black("making", words)


def _draw_black(what: str, words: Words) -> Html:
    said = el("div", el("b", words(f"clip.{what}_title")), words(f"clip.{what}_text"), cls="empty")
    return el("div", said, cls="td-player")


def draw_video(clip: ClipView, **attributes: object) -> Html:
    """A player without sound that goes round, with `loop=False` once."""
    source = {"src": media_url(clip.id), "poster": poster_url(clip), "loop": True}
    return el("video", **{**source, **attributes}, controls=True, muted=True, playsinline=True)


def draw_card(card: Card, words: Words, where: str = "stage") -> Html:
    """The result card: settings, what really ran, symptoms, rating, note."""
    clip, request, stars = card.clip.id, card.clip.request, []
    given, said = rating_parts(card.clip.sidecar.rating)
    for n in range(1, STARS + 1):
        tip, on = words("clip.rate", n=n), n <= given.count("★")
        # with the words that stand beside them: a click on a star loses none that were not saved
        star = action(
            "rate", f"{clip} {n}", "★", cls="on" if on else "", title=tip, aria_label=tip, data_from=f"praise-{where}"
        )
        stars.append(star)
    badges = [el("span", sentence, cls=f"td-pill {kind}") for kind, sentence in card.badges]
    tip = words("clip.i2v_tip")
    buttons = (
        action("reuse", clip, words("clip.reuse"), form=True),
        action("neighbour", clip, words("clip.neighbours"), title=words("clip.seed_tip")),
        action("animate", clip, words("clip.i2v_from_this"), form=True, title=tip, data_time=True),
        action("continue", clip, words("storyboard.continue"), form=True, title=words("storyboard.continue_tip")),
        el("a", words("clip.open_file"), href=media_url(clip), target="_blank", rel="noopener", cls="td-btn plain"),
        download(media_url(clip), words("clip.save_file")),
    )
    # after a scout there is one question only: is the motion there?
    yes = action("round", f"polish {clip}", words("round.yes"), form=True, cls="main")
    no = action("neighbour", clip, words("round.no"))
    question = el("div", el("b", words("round.question")), el("div", yes, no, cls="td-acts"), cls="td-note td-line")
    told = []
    for name, value in (("praise", said), ("note", card.clip.sidecar.note)):
        field_id, hint = f"{name}-{where}", words(f"clip.{name}")
        field = void("input", type="text", id=field_id, value=value, placeholder=hint, aria_label=hint, cls="td-input")
        save = action(name, clip, words(f"clip.{name}_save"), data_from=field_id, cls="plain")
        told.append(
            el("div", el("span", stars, cls="td-stars") if name == "praise" else None, field, save, cls="td-line")
        )
    chips = []
    for knob in card.knobs:
        label = (el("span", knob.symptom, cls="td-quiet"), " → ", knob.label)
        packed = json.dumps({"clip": clip, "fields": dict(knob.fields)})
        edit = action("edit", clip, label, form=True)
        chips.append(action("knob", packed, label) if knob.fields else edit)
    symptoms = el("div", chips, cls="td-chips", style="margin-top:10px")
    pieces = [el(DIFF_TAGS[word.how], word.text) if word.how in DIFF_TAGS else word.text for word in card.changed]
    changed = el("span", words("clip.changed") + " ", cls="td-quiet")
    return el(
        "div",
        el("h3", request.prompt),
        el("div", badges, cls="td-steps") if badges else None,
        facts(card.facts),
        el("div", changed, pieces, cls="td-diff td-words") if pieces else None,
        question if request.steps <= SCOUT_STEPS else None,
        el("details", el("summary", words("clip.symptoms")), symptoms),
        el("div", buttons, cls="td-acts"),
        told,
        cls="td-card td-html",
        data_clip=clip,
    )


def draw_strip(snapshot: Snapshot, limit: int, chosen: str, words: Words) -> Html:
    """The newest clips as posters; a click shows one."""
    if not snapshot.clips:
        return Html("")
    shown = []
    for clip in snapshot.clips[:limit]:
        request, made = clip.request, words.ago(max(0, snapshot.now_s - clip.created_s))
        about = " · ".join((model_name(request), size_name(request), str(request.seed), made))
        parts = (
            el("span", poster(poster_url(clip)), cls="pic"),
            el("span", request.prompt, cls="cap"),
            el("small", " ".join(filter(None, (clip.sidecar.rating, about)))),
        )
        click = {"type": "button", "cls": "td-tile on" if clip.id == chosen else "td-tile", "data_act": "choose"}
        said = {"data_arg": clip.id, "title": f"{request.prompt} · {about}"}
        shown.append(el("button", parts, **click, **said))
    return el("div", el("div", words("clip.recent"), cls="td-sec"), el("div", shown, cls="td-strip"), cls="td-html")
