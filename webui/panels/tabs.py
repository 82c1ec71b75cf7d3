"""The tabs that need no view of their own: the seed archive, the log (its last lines are below the stage, too), the
settings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from webui.markup import Html, action, blank, download, el, facts, link, local, poster
from webui.panels.stage import media_url
from webui.wording import Words

if TYPE_CHECKING:
    from turbodiff.studio import Seed

COLUMNS = ("prompt", "seed", "model", "resolution", "rating", "note")  # in the guide's order
LEVELS = ("CRITICAL", "ERROR", "WARNING", "DEBUG")  # every other line is INFO


def draw_seeds(found: Iterable[Seed], posters: Collection[str], searched: bool, words: Words) -> Html:
    """The archive as a table; `posters` are the clips that have one, `searched`: rows were looked for."""
    rows = []
    for seed in found:
        clip = Path(seed.path).stem if seed.path else ""  # "": the row came from a file
        cells = [el("td", getattr(seed.row, name), cls="td-num" if name == "seed" else "") for name in COLUMNS]
        use = action("use_seed", seed.id, words("seeds.use"), form=True, cls="plain")
        picture = poster(media_url(clip, poster=True) if clip in posters else "", "td-mini")
        rows.append(el("tr", el("td", picture), cells, el("td", use)))
    if not rows:
        return blank(words("seeds.no_match")) if searched else blank(words("seeds.none"), words("clip.first"))
    head = el("tr", el("th", ""), [el("th", words(f"seeds.{name}")) for name in COLUMNS], el("th", ""))
    return el("div", el("table", head, rows, cls="td-table"), cls="td-scroll td-html", data_rows=len(rows))


def draw_log(lines: tuple[str, ...], words: Words) -> Html:
    """Lines of the log, coloured by their level."""
    shown = []
    for line in lines:
        level = next((name for name in LEVELS if f"[{name}]" in line), "INFO")
        shown.append(el("div", line, cls=level, data_level=level))
    return el("div", shown or words("log.empty"), cls="td-log", tabindex="0", data_none=words("log.no_match"))


def draw_log_tools(words: Words) -> Html:
    """Level filter, copy and the support bundle; the first two all in the browser."""
    levels = [
        local("level", name, words(f"log.{name}"), cls="on" if name == "all" else "")
        for name in ("all", "warnings", "errors")
    ]
    copy = local("copylog", "", words("log.copy"), cls="plain")
    bundle = download(link("/support.zip"), words("log.bundle"), title=words("log.bundle_tip"))
    return el("div", levels, copy, bundle, cls="td-toolbar td-html")


def draw_logs(names: Collection[str], chosen: str, words: Words) -> Html:
    """The log files as buttons with one on, and what is in that one."""
    buttons = []
    for name in names:
        on, checked = ("on", "true") if name == chosen else ("", "false")
        buttons.append(action("log", name, name, cls=on, role="radio", aria_checked=checked))
    group = el("div", buttons, cls="td-acts", role="radiogroup", aria_label=words("log.tab"))
    about = el("span", words(f"log.{chosen.removesuffix('.log')}"), cls="td-quiet")
    return el("div", group, about, cls="td-toolbar td-html")


def draw_settings(
    policy: str, policies: Iterable[str], places: Mapping[str, Path], webhook: tuple[str, str] | None, words: Words
) -> Html:
    """What happens to a wish that does not fit, as buttons with one on; `places` are paths by the key of their name,
    `webhook` is whom it tells and what came of the newest delivery."""
    buttons = []
    for name in policies:
        label = (el("b", words(f"settings.policy_{name}")), el("span", words(f"settings.policy_{name}_text")))
        on, checked = ("on", "true") if name == policy else ("", "false")
        buttons.append(action("policy", name, label, cls=on, role="radio", aria_checked=checked))
    head = el("div", words("settings.policy"), cls="td-sec")
    chosen = el("div", buttons, cls="td-alts", role="radiogroup", aria_label=words("settings.policy"), id="policy")
    rows = [(words(f"settings.place_{name}"), el("code", place)) for name, place in places.items()]
    where = el("section", el("div", words("settings.places"), cls="td-sec"), facts(rows, cls=""))
    note = el("p", words("settings.policy_note"), cls="td-quiet")
    wishes = [
        local(
            "wish", name, el("b", words(f"settings.{name}")), el("span", words(f"settings.{name}_text")),
            data_wish=name, aria_pressed="false",
        )
        for name in ("sound", "notify")
    ]  # fmt: skip
    hook = el("p", words("settings.webhook_none"), cls="td-quiet", id="webhook")
    if webhook is not None:
        host, last = webhook
        told = words("settings.webhook", host=host, last=last or words("settings.webhook_quiet"))
        hook = el("div", told, cls="td-note", id="webhook")
    head_done = el("div", words("settings.done"), cls="td-sec")
    done = el("section", head_done, el("div", wishes, cls="td-alts td-wishes"), hook)
    return el("div", el("section", head, chosen, note), done, where, cls="td-stack td-html td-narrow")
