"""The status bar on every tab."""

from webui.markup import Html, action, each, el, join
from webui.view.bar import Bar, Gauge
from webui.wording import Words

RESTART = "重启应用"  # literal in both languages
OTHER = {"en": "zh", "zh": "en"}


def draw(bar: Bar, words: Words) -> Html:
    """The bar as markup."""
    pill = el(
        "span", el("span", cls="td-dot"), bar.queue, cls="td-pill accent" if bar.busy else "td-pill", role="status"
    )
    return el(
        "div",
        el("div", "turbo", el("i", "diff"), cls="name"),
        el("div", bar.card, el("small", bar.card_note), cls="card"),
        each(_gauge(gauge) for gauge in bar.gauges),
        pill,
        el("span", bar.restarted, cls="td-pill good", role="status") if bar.restarted else None,
        each(_leftover(pid, sentence, words) for pid, sentence in bar.leftovers),
        el("div", _buttons(words), cls="end"),
        cls="td-bar",
    )


def _gauge(gauge: Gauge) -> Html:
    spans = each(
        el("span", cls=part.kind, style=f"width:{part.share:.1%}", title=part.title) for part in gauge.segments
    )
    row = el("div", el("span", gauge.label), el("b", gauge.text, cls="td-num"), cls="row")
    titles = " · ".join(part.title for part in gauge.segments)
    return el("div", row, el("div", spans, cls="td-track"), cls="td-gauge", title=titles)


def _leftover(pid: int, sentence: str, words: Words) -> Html:
    return el("span", sentence, action("end_leftover", pid, words("bar.end_leftover"), cls="plain"), cls="td-pill warn")


def _buttons(words: Words) -> Html:
    aid = _local("aid", "", words("bar.firstaid"), words("bar.firstaid_tip"))
    restart = action("restart", "", RESTART, title=words("bar.restart_tip"), data_ask=words("bar.restart_ask"))
    theme = _local("theme", "", el("span", "◐", aria_hidden="true"), words("bar.theme_tip"))
    keys = _local("help", "", el("span", "?", aria_hidden="true"), words("bar.help_tip"))
    language = _local("lang", OTHER[words.lang], "中文" if words.lang == "en" else "EN", words("bar.lang_tip"))
    return join(aid, restart, language, theme, keys)


def _local(name: str, argument: str, label: str | Html, tip: str) -> Html:
    return el(
        "button", label, type="button", cls="td-btn plain", data_do=name, data_arg=argument, title=tip, aria_label=tip
    )


def draw_help(words: Words) -> Html:
    """The list of keys, hidden until asked for, and the few words that page.js needs."""
    rows = [("Ctrl+Enter", "bar.help_go"), ("/", "bar.help_prompt"), ("?", "bar.help_keys")]
    listed = each(el("p", el("kbd", key), " ", words(sentence)) for key, sentence in rows)
    close = _local("help", "", words("bar.close"), words("bar.close"))
    box = el("div", el("h3", words("bar.help_title")), listed, close)
    return join(
        el("div", box, id="help", cls="td-help", hidden=True, role="dialog", aria_label=words("bar.help_title")),
        el("div", words("run.offline"), id="offline", cls="td-note warn", role="status", hidden=True),
        el("span", id="words", data_copied=words("bar.copied"), data_seed=words("create.seed_info"), hidden=True),
    )
