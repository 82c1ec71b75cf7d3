"""First aid as markup: three steps, on every tab, shown when its button in the status bar is pressed."""

from webui.markup import Html, action, el, join
from webui.panels.bar import RESTART
from webui.panels.run import smaller_button, smaller_text, step
from webui.panels.system import draw_holders
from webui.view.aid import Aid
from webui.wording import Words


def draw(shown: Aid, restarted: str, words: Words) -> Html:
    """The three steps; `restarted` says what the last restart brought back."""
    restart = action("restart", "", RESTART, title=words("bar.restart_tip"))
    said = el("span", restarted, cls="td-pill good", role="status") if restarted else None
    steps = join(
        step(words("run.aid_1"), words("run.aid_1_text"), join(said, restart)),
        step(words("run.aid_2"), words("run.aid_2_text"), Html("")),
        draw_holders(shown.holders, words),
        _host(shown, words),
        _smaller(shown, words),
    )
    close = el("button", words("bar.close"), type="button", cls="td-btn plain", data_do="aid")
    head = el("div", el("h3", words("bar.firstaid")), close, cls="td-line")
    return el("div", head, steps, cls="td-card td-html", role="region", aria_label=words("bar.firstaid"))


def _host(shown: Aid, words: Words) -> Html | None:
    if not shown.host_line or shown.holders:
        return None
    return el("p", words("system.holders_unknown"), " ", el("code", shown.host_line), cls="td-quiet")


def _smaller(shown: Aid, words: Words) -> Html:
    if shown.failed is not None:
        return step(words("run.aid_3"), smaller_text(shown.failed, words), smaller_button(shown.failed, words))
    button = action("smaller", "", words("run.aid_3_fill"), form=True)
    return step(words("run.aid_3"), words("run.aid_3_text"), button)
