"""The Settings tab: what happens to a wish that does not fit, and where things are."""

from collections.abc import Mapping
from pathlib import Path

from turbodiff.studio import POLICIES
from webui.markup import Html, action, el, facts
from webui.wording import Words


def draw(policy: str, places: Mapping[str, Path], words: Words) -> Html:
    """The policy as buttons, one of them on; `places` are paths by the key of their name."""
    buttons = [
        action(
            "policy",
            name,
            el("b", words(f"settings.policy_{name}")),
            el("span", words(f"settings.policy_{name}_text")),
            cls="on" if name == policy else "",
            role="radio",
            aria_checked="true" if name == policy else "false",
        )
        for name in POLICIES
    ]
    head = el("div", words("settings.policy"), cls="td-sec")
    chosen = el("div", buttons, cls="td-alts", role="radiogroup", aria_label=words("settings.policy"), id="policy")
    rows = [(words(f"settings.place_{name}"), el("code", place)) for name, place in places.items()]
    where = el("section", el("div", words("settings.places"), cls="td-sec"), facts(rows, cls=""))
    note = el("p", words("settings.policy_note"), cls="td-quiet")
    return el("div", el("section", head, chosen, note), where, cls="td-stack td-html td-narrow")
