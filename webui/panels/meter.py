"""The fit meter beside the controls that move it."""

from webui.form import PINS
from webui.markup import Html, action, each, el, join
from webui.view.meter import Diff, Meter, PhaseBar
from webui.wording import Words

ALT = "fill"


def draw(meter: Meter, words: Words) -> Html:
    """The meter as markup."""
    problem = el("div", meter.problem, cls="td-note warn", role="status") if meter.problem else None
    if not meter.phases:
        return el("div", problem, cls="td-html")
    head = el(
        "div",
        el("b", meter.verdict),
        el("span", meter.numbers, cls="td-num"),
        el("span", meter.side, cls="side"),
        cls="head",
    )
    body = join(
        problem,
        head,
        el("div", el("span", style=f"width:{meter.share:.1%}"), cls="td-big", role="img", aria_label=meter.numbers),
        el("div", el("span", meter.binding, cls="td-quiet"), cls="td-line"),
        _changes(meter.diffs, words) if meter.diffs else None,
        _choices(meter, words) if meter.choices and meter.urgent else None,
        _why(meter, words),
    )
    return el("div", body, cls=f"td-meter td-html {meter.band}", data_band=meter.band)


def _changes(diffs: tuple[Diff, ...], words: Words) -> Html:
    rows = each(
        el(
            "div",
            el("span", f"{row.label}: "),
            el("del", row.before),
            " → ",
            el("ins", row.after),
            el("span", " · " + words("meter.lossy"), cls="td-quiet") if row.lossy else None,
            _lock(row, words) if row.lossy and row.field in PINS else None,
        )
        for row in diffs
    )
    return el("div", el("b", words("meter.changed")), rows, cls="td-diff", id="changes")


def _lock(row: Diff, words: Words) -> Html:
    """Keep this field as it was asked."""
    return action("pin", row.field, words("meter.lock"), form=True, cls="plain", title=words("create.pins_info"))


def _choices(meter: Meter, words: Words) -> Html:
    buttons = each(
        action(ALT, _packed(choice.fields), el("b", choice.label), el("span", choice.note, cls="td-num"), form=True)
        for choice in meter.choices
    )
    return el("div", el("span", words("meter.instead"), cls="td-quiet"), buttons, cls="td-alts", id="alternatives")


def _why(meter: Meter, words: Words) -> Html:
    rows = each(_phase(phase) for phase in meter.phases)
    reasons = el("ul", each(el("li", sentence) for sentence in meter.why)) if meter.why else None
    grid = el("div", rows, cls="td-phases", aria_label=words("meter.phases"))
    calm = _choices(meter, words) if meter.choices and not meter.urgent else None
    return el("details", el("summary", words("meter.why")), grid, reasons, calm)


def _phase(phase: PhaseBar) -> Html:
    cls = "binding" if phase.binding else ""
    bar = el("span", style=f"width:{phase.share:.1%}", cls="peak" if phase.binding else "")
    return join(
        el("span", phase.name, cls=cls),
        el("div", bar, cls="bar"),
        el("span", phase.size, cls=f"td-num {cls}"),
        el("span", phase.time, cls="td-num td-quiet"),
    )


def _packed(fields: object) -> str:
    import json

    return json.dumps(fields, ensure_ascii=False)
