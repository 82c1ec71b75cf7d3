"""The stage: player, the running job, the queue, recent clips."""

import json

from webui.markup import Html, action, each, el, join, void
from webui.panels.bar import RESTART
from webui.view.clips import STARS, Card, Knob, Tile
from webui.view.jobs import Failure, Progress, Row
from webui.wording import Words

SYSTEM_TAB = 3  # its place among the tabs of page.py
STATE_PILLS = {"running": "accent", "verifying": "accent", "failed": "bad", "parked": "warn"}


def draw_side(card: Card | None, comparing: bool, words: Words) -> Html:
    """The gallery's side: the chosen clip with its card."""
    if card is None:
        return Html("")
    label = words("gallery.stop" if comparing else "gallery.compare")
    compare = el("div", action("compare", card.clip, label), cls="td-acts")
    return el("div", draw_player(card, "", words, quiet=True), compare, draw_card(card, words, "side"), cls="td-stack")


def draw_player(card: Card | None, preview: str, words: Words, quiet: bool = False) -> Html:
    """The clip, else the newest preview of the running job (a data: URL), else what to do first.

    `quiet`: does not start by itself.
    """
    if preview:
        return el("div", void("img", src=preview, alt=""), cls="td-player")
    if card is None:
        empty = el("div", el("b", words("clip.empty_title")), words("clip.empty_text"), cls="empty")
        return el("div", empty, cls="td-player")
    video = el(
        "video",
        src=card.video,
        poster=card.poster,
        controls=True,
        loop=True,
        playsinline=True,
        preload="metadata",
        autoplay=not quiet,
        muted=True,
        aria_label=card.prompt[:120],
    )
    badge = el("span", words("clip.demo"), cls="td-pill badge") if card.demo else None
    return el("div", video, badge, cls="td-player", data_clip=card.clip)


def draw_progress(progress: Progress, words: Words) -> Html:
    """The running job: phases, step i of n, time left, stop."""
    chips = each(_chip(chip.name, chip.state, chip.note) for chip in progress.chips)
    buttons = join(
        action("stop_and_decode", progress.job, words("run.decode"), title=words("run.decode_tip"))
        if progress.can_decode
        else None,
        action("cancel", progress.job, words("run.stop"), title=words("run.stop_tip")),
    )
    bar = el(
        "div",
        el("span", style=f"width:{progress.share:.1%}"),
        cls="td-prog",
        role="progressbar",
        aria_valuenow=f"{progress.share:.0%}".rstrip("%"),
        aria_valuemin="0",
        aria_valuemax="100",
        aria_label=progress.line,
    )
    line = el("div", el("span", progress.line), el("span", progress.eta, cls="td-num"), cls="td-line", role="status")
    head = el("div", el("h3", progress.title), el("div", buttons, cls="td-acts"), cls="td-line")
    notes = each(el("div", text, cls="td-note", role="status") for text in progress.notices)
    steps = el("div", chips, cls="td-steps")
    return el("div", head, steps, bar, line, notes, cls="td-card td-html", data_job=progress.job)


def _chip(name: str, state: str, note: str) -> Html:
    cls = {"done": "td-pill good", "now": "td-pill now"}.get(state, "td-pill")
    return el("span", f"{name} {note}".strip(), cls=cls, data_state=state)


def draw_failure(failure: Failure, holders: Html, words: Words) -> Html:
    """A failed job: what happened and the three ways out; `holders` is who has the memory."""
    actions = join(
        step(
            words("run.aid_1"), words("run.aid_1_text"), action("restart", "", RESTART, title=words("bar.restart_tip"))
        ),
        step(words("run.aid_2"), words("run.aid_2_text"), _to_holders(words)),
        holders,
        step(words("run.aid_3"), smaller_text(failure, words), smaller_button(failure, words)),
    )
    retry = action("retry", failure.job, words("run.retry"), cls="main" if not failure.memory else "")
    return el(
        "div",
        el("h3", failure.title),
        el("div", failure.what, cls="td-note bad", role="alert"),
        el("p", failure.advice, cls="td-quiet", style="margin:0"),
        actions if failure.memory else None,
        el("div", retry, cls="td-acts"),
        cls="td-card failed td-html",
        data_job=failure.job,
    )


def step(head: str, sentence: str, button: Html) -> Html:
    """One step of the first aid."""
    return el("div", el("div", el("b", head), el("div", sentence, cls="td-quiet")), button, cls="td-line td-step")


def _to_holders(words: Words) -> Html:
    return el("button", words("run.show"), type="button", cls="td-btn", data_do="tab", data_arg=SYSTEM_TAB)


def smaller_button(failure: Failure, words: Words) -> Html:
    """The third step for a job that memory stopped."""
    return action("retry_smaller", failure.job, words("run.aid_3_button"), cls="main")


def smaller_text(failure: Failure, words: Words) -> str:
    """What the third step changes."""
    if "model" in failure.smaller:
        return words("run.aid_3_text")
    return words("run.aid_3_i2v" if "resolution" in failure.smaller else "run.aid_3_demo")


def draw_card(card: Card, words: Words, where: str = "stage") -> Html:
    """The result card: settings, what really ran, symptoms, rating, note."""
    facts = each(join(el("dt", name), el("dd", value, cls="td-num")) for name, value in card.facts)
    badges = each(el("span", sentence, cls=f"td-pill {kind}") for kind, sentence in card.badges)
    head = el("div", el("h3", card.prompt), _stars(card, words), cls="td-line")
    buttons = join(
        action("reuse", card.clip, words("clip.reuse"), form=True),
        action("neighbour", card.clip, words("clip.neighbours"), title=words("clip.seed_tip")),
        action(
            "animate", card.clip, words("clip.i2v_from_this"), form=True, title=words("clip.i2v_tip"), data_time=True
        ),
        el(
            "a",
            words("clip.open_file"),
            href=card.video,
            download=True,
            cls="td-btn plain",
            style="text-decoration:none",
        ),
    )
    return el(
        "div",
        head,
        el("div", badges, cls="td-steps") if card.badges else None,
        el("dl", facts, cls="td-facts"),
        _changed(card, words) if card.changed else None,
        _question(card, words) if card.scouted else None,
        _knobs(card, words),
        el("div", buttons, cls="td-acts"),
        _note(card, f"note-{where}", words),
        cls="td-card td-html",
        data_clip=card.clip,
    )


def _changed(card: Card, words: Words) -> Html:
    """The prompt against the round before."""
    tags = {"new": "ins", "gone": "del"}
    pieces = each(el(tags[word.how], word.text) if word.how in tags else word.text for word in card.changed)
    return el("div", el("span", words("clip.changed") + " ", cls="td-quiet"), pieces, cls="td-diff td-words")


def _question(card: Card, words: Words) -> Html:
    """After a scout there is one question only."""
    yes = action("round", f"polish {card.clip}", words("round.yes"), form=True, cls="main")
    no = action("neighbour", card.clip, words("round.no"))
    return el("div", el("b", words("round.question")), el("div", yes, no, cls="td-acts"), cls="td-note td-line")


def _stars(card: Card, words: Words) -> Html:
    filled = card.rating.count("★")
    return el("span", each(_star(card.clip, n, n <= filled, words) for n in range(1, STARS + 1)), cls="td-stars")


def _star(clip: str, n: int, on: bool, words: Words) -> Html:
    tip = words("clip.rate", n=n)
    return action("rate", f"{clip} {n}", "★", cls="on" if on else "", title=tip, aria_label=tip)


def _knobs(card: Card, words: Words) -> Html:
    chips = each(_knob(card.clip, knob) for knob in card.knobs)
    return el(
        "details", el("summary", words("clip.symptoms")), el("div", chips, cls="td-chips", style="margin-top:10px")
    )


def _knob(clip: str, knob: Knob) -> Html:
    label = (el("span", knob.symptom, cls="td-quiet"), " → ", knob.label)
    if not knob.fields:
        return action("edit", clip, *label, form=True)
    return action("knob", json.dumps({"clip": clip, "fields": dict(knob.fields)}), *label)


def _note(card: Card, field_id: str, words: Words) -> Html:
    field = void(
        "input",
        type="text",
        id=field_id,
        value=card.note,
        placeholder=words("clip.note"),
        aria_label=words("clip.note"),
        cls="td-input",
    )
    return el(
        "div",
        field,
        action("note", card.clip, words("clip.note_save"), data_from=field_id, cls="plain"),
        cls="td-line",
    )


def draw_queue(rows: list[Row], paused: bool, words: Words) -> Html:
    """The queue with its buttons; nothing at all when there is nothing to say."""
    if not rows and not paused:
        return Html("")
    pause = (
        action("resume", "", words("run.resume")) if paused else action("pause", "", words("run.pause"), cls="plain")
    )
    head = el("div", words("run.queue"), el("span", pause, cls="td-acts"), cls="td-sec")
    body = (
        el("div", each(_row(row, words) for row in rows), cls="td-list")
        if rows
        else el("p", words("run.queue_empty"), cls="td-quiet")
    )
    return el("div", head, body, cls="td-html", id="queue-list")


def _row(row: Row, words: Words) -> Html:
    pill = el("span", words(f"run.state_{row.state}"), cls=f"td-pill {STATE_PILLS.get(row.state, '')}")
    what = el("span", row.note, cls="what", title=f"{row.note} · {row.title}")
    names = {"first": "top"}
    buttons = each(action(names.get(act, act), row.job, words(f"run.{act}"), cls="plain") for act in row.acts)
    return el(
        "div", pill, what, el("span", row.title, cls="td-quiet wide"), buttons, data_job=row.job, data_state=row.state
    )


def draw_strip(tiles: list[Tile], chosen: str, words: Words, big: bool = False) -> Html:
    """Clips as posters; a click shows one."""
    if not tiles:
        return el("div", words("clip.none"), cls="td-blank") if big else Html("")
    grid = el("div", each(_tile(tile, chosen) for tile in tiles), cls="td-strip td-big-grid" if big else "td-strip")
    return el("div", None if big else el("div", words("clip.recent"), cls="td-sec"), grid, cls="td-html")


def _tile(tile: Tile, chosen: str) -> Html:
    picture = void("img", src=tile.poster, alt="", loading="lazy") if tile.poster else None
    return el(
        "button",
        el("span", picture, cls="pic"),
        el("span", tile.caption, cls="cap"),
        el("small", " ".join(part for part in (tile.rating, tile.note) if part)),
        type="button",
        cls="td-tile on" if tile.clip == chosen else "td-tile",
        data_act="choose",
        data_arg=tile.clip,
        aria_label=tile.caption[:100],
        title=tile.caption,
    )


def draw_log(lines: tuple[str, ...], words: Words) -> Html:
    """Lines of the log, coloured by their level."""
    if not lines:
        return el("div", words("log.empty"), cls="td-log")
    return el("div", each(el("div", line, cls=_level(line), data_level=_level(line)) for line in lines), cls="td-log")


def _level(line: str) -> str:
    for level in ("CRITICAL", "ERROR", "WARNING", "DEBUG"):
        if f"[{level}]" in line:
            return level
    return "INFO"
