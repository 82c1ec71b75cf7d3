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
        _section(words("system.selftest"), _selftest(shown, words), _selftest_button(shown, words)),
        _section(words("system.kernels"), _kernels(shown, ready, words)),
        _section(words("system.versions"), _versions(shown, ready, words)),
    )
    models = join(_best(shown, words), each(_model(model, not shown.best, words) for model in shown.models))
    right = _section(words("system.models"), models, _rescan(words))
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
    return join(draw_holders(shown.holders, words), host)


def draw_holders(holders: tuple[Holder, ...], words: Words) -> Html:
    """Programs that hold memory, each with the line that ends it where one may be offered."""
    if not holders:
        return Html("")
    head = el("tr", *(el("th", words(f"system.{name}")) for name in ("process", "memory", "what")), el("th", ""))
    note = el("p", words("system.holders_note"), cls="td-quiet")
    table = el("table", head, each(_holder(found, words) for found in holders), cls="td-table")
    return join(el("div", table, cls="td-scroll"), note)


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


def _model(model: Model, main: bool, words: Words) -> Html:
    state = words("system.here" if model.here else "system.missing")
    pill = el("span", state, cls="td-pill good" if model.here else "td-pill")
    head = el("div", el("h3", model.name), pill, cls="td-line")
    about = el("p", model.about, cls="td-quiet", style="margin:0")
    files = each(el("li", el("code", line)) for line in model.files or model.missing)
    details = el("details", el("summary", words("system.missing_list")), el("ul", files)) if files else None
    return el("div", head, about, _offer(model, main, words), details, cls="td-card", data_model=model.name)


def _best(shown: System, words: Words) -> Html | None:
    """One button for what this card runs best."""
    best = shown.best
    if best is None:
        return None
    label = words("system.downloading" if best.running else "system.download_best", model=best.name)
    button = action("download", best.id, label, cls="main", disabled=best.running or not best.enough_room)
    what = el("div", el("h3", words("system.best", model=best.name)), el("span", best.offer, cls="td-quiet"))
    said = el("code", best.words) if best.words else None
    manual = el(
        "details", el("summary", words("system.manual")), el("ul", each(el("li", el("code", f)) for f in best.files))
    )
    return el("div", el("div", what, button, cls="td-line"), said, manual, cls="td-card", id="best-download")


def _selftest_button(shown: System, words: Words) -> Html:
    label = words("system.selftest_running" if shown.checking else "system.selftest_go")
    return action("selftest", "", label, disabled=shown.checking, cls="plain")


def _selftest(shown: System, words: Words) -> Html:
    """What the last self-test found."""
    if not shown.checks:
        return el("p", words("system.selftest_reading" if shown.checking else "system.selftest_text"), cls="td-quiet")
    rows = each(
        el(
            "div",
            el(
                "span",
                words("system.good" if check.good else "system.bad"),
                cls=f"td-pill {'good' if check.good else 'bad'}",
            ),
            el("span", check.name),
            el("code", check.detail, cls="what"),
        )
        for check in shown.checks
    )
    return el("div", rows, cls="td-list", id="selftest")


def _kernels(shown: System, ready: bool, words: Words) -> Html:
    if not shown.kernels:
        return el("p", words("system.kernels_none" if ready else "system.reading"), cls="td-quiet")
    return el("dl", each(join(el("dt", op), el("dd", why)) for op, why in shown.kernels), cls="td-facts", id="kernels")


def _offer(model: Model, main: bool, words: Words) -> Html | None:
    """One button for the files that suit this card, and how far they are."""
    if not model.offer:
        return None
    button = action(
        "download",
        model.id,
        words("system.downloading" if model.running else "system.download"),
        cls="main" if main else "",
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
