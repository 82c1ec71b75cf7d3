"""The Log tab, and the log's last lines below the stage."""

from webui.markup import Html, download, el, local
from webui.wording import Words

LEVELS = ("CRITICAL", "ERROR", "WARNING", "DEBUG")  # every other line is INFO


def draw(lines: tuple[str, ...], words: Words) -> Html:
    """Lines of the log, coloured by their level."""
    shown = []
    for line in lines:
        level = next((name for name in LEVELS if f"[{name}]" in line), "INFO")
        shown.append(el("div", line, cls=level, data_level=level))
    return el("div", shown or words("log.empty"), cls="td-log")


def draw_tools(words: Words) -> Html:
    """Level filter, copy and the support bundle; the first two all in the browser."""
    levels = [
        local("level", name, words(f"log.{name}"), cls="on" if name == "all" else "")
        for name in ("all", "warnings", "errors")
    ]
    copy = local("copylog", "", words("log.copy"), cls="plain")
    bundle = download("/support.zip", words("log.bundle"), title=words("log.bundle_tip"))
    run_log = el("span", words("log.run_log", name="webui_test.log"), cls="td-quiet")
    return el("div", levels, copy, bundle, run_log, cls="td-toolbar td-html")
