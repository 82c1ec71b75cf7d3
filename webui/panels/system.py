"""The System tab as markup."""

from webui.markup import Html, action, each, el, join
from webui.panels.bar import RESTART
from webui.view.system import Holder, Model, System
from webui.wording import Words


def draw(shown: System, ready: bool, words: Words) -> Html:
    """Machine and versions on the left, holders and models on the right."""
    left = join(
        _section(words("system.machine"), el("dl", _pairs(shown.cards), cls="td-facts")),
        _section(words("system.holders"), _holders(shown, words)),
        _section(words("system.versions"), _versions(shown, ready, words)),
    )
    right = _section(words("system.models"), each(_model(model, words) for model in shown.models), _rescan(words))
    return el("div", el("div", left, cls="td-stack"), el("div", right, cls="td-stack"), cls="td-two td-html")


def _section(head: str, body: object, acts: object = "") -> Html:
    return el("section", el("div", head, el("span", acts, cls="td-acts"), cls="td-sec"), body)


def _pairs(rows: tuple[tuple[str, str], ...]) -> Html:
    return each(join(el("dt", name), el("dd", value, cls="td-num")) for name, value in rows)


def _rescan(words: Words) -> Html:
    return action("rescan", "", words("system.rescan"), cls="plain")


def _holders(shown: System, words: Words) -> Html:
    host = (
        el("p", words("system.holders_unknown"), " ", el("code", shown.host_line), cls="td-quiet")
        if shown.host_line
        else None
    )
    if not shown.holders:
        return host or el("p", words("system.holders_none"), cls="td-quiet")
    head = el("tr", *(el("th", words(f"system.{name}")) for name in ("process", "memory", "what")), el("th", ""))
    rows = each(_holder(found, words) for found in shown.holders)
    note = el("p", words("system.holders_note"), cls="td-quiet")
    return join(el("div", el("table", head, rows, cls="td-table"), cls="td-scroll"), note, host)


def _holder(found: Holder, words: Words) -> Html:
    name = f"{found.name} ({found.pid})" if found.pid else found.name
    return el(
        "tr", el("td", name), el("td", found.memory, cls="td-num"), el("td", found.note), el("td", _end(found, words))
    )


def _end(found: Holder, words: Words) -> Html:
    if found.kind == "worker":
        return action("restart", "", RESTART)
    if found.kind == "leftover":
        return action("end_leftover", found.pid, words("bar.end_leftover"))
    return each(
        el("button", line, type="button", cls="td-btn plain", data_do="copy", data_arg=line, title=words("system.copy"))
        for line in found.kill
    )


def _model(model: Model, words: Words) -> Html:
    state = words("system.here" if model.here else "system.missing")
    pill = el("span", state, cls="td-pill good" if model.here else "td-pill")
    head = el("div", el("h3", model.name), pill, cls="td-line")
    about = el("p", model.about, cls="td-quiet", style="margin:0")
    files = each(el("li", el("code", line)) for line in model.files or model.missing)
    details = el("details", el("summary", words("system.missing_list")), el("ul", files)) if files else None
    return el("div", head, about, _offer(model, words), details, cls="td-card", data_model=model.name)


def _offer(model: Model, words: Words) -> Html | None:
    """One button for the files that suit this card, and how far they are."""
    if not model.offer:
        return None
    button = action(
        "download",
        model.id,
        words("system.downloading" if model.running else "system.download"),
        cls="main",
        disabled=model.running or not model.enough_room,
    )
    room = None if model.enough_room else el("span", words("system.no_room"), cls="td-pill bad")
    said = el("code", model.words) if model.words else None
    return join(el("div", el("span", model.offer, cls="td-quiet"), room, button, cls="td-line"), said)


def _versions(shown: System, ready: bool, words: Words) -> Html:
    if not ready:
        return el("p", words("system.reading"), cls="td-quiet")
    return join(
        each(el("div", sentence, cls="td-note warn") for sentence in shown.warnings),
        el("dl", _pairs(shown.facts), cls="td-facts"),
        el("p", words("system.pip"), " ", el("code", shown.pip_line)) if shown.pip_line else None,
        el("p", words("system.not_needed"), cls="td-quiet"),
    )
