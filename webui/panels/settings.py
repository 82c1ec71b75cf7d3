"""The Settings tab: what happens to a wish that does not fit, and where things are."""

from webui.markup import Html, action, each, el, join
from webui.wording import Words

POLICIES = ("auto", "ask", "never")


def draw(policy: str, places: tuple[tuple[str, str], ...], words: Words) -> Html:
    """The policy as three buttons, one of them on; `places` are names and folders."""
    buttons = each(_choice(name, name == policy, words) for name in POLICIES)
    head = el("div", words("settings.policy"), cls="td-sec")
    chosen = el("div", buttons, cls="td-alts", role="radiogroup", aria_label=words("settings.policy"), id="policy")
    shown = el("dl", each(join(el("dt", name), el("dd", el("code", place))) for name, place in places), cls="td-facts")
    where = el("section", el("div", words("settings.places"), cls="td-sec"), shown)
    note = el("p", words("settings.policy_note"), cls="td-quiet")
    return el("div", el("section", head, chosen, note), where, cls="td-stack td-html td-narrow")


def _choice(name: str, on: bool, words: Words) -> Html:
    return action(
        "policy",
        name,
        el("b", words(f"settings.policy_{name}")),
        el("span", words(f"settings.policy_{name}_text")),
        cls="on" if on else "",
        role="radio",
        aria_checked="true" if on else "false",
    )
