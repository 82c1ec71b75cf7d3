"""HTML as text: what a person or a file wrote is escaped, only `Html` passes as it is."""

import html
import os
from collections.abc import Iterable, Iterator

from turbodiff.spec.text import whole


class Html(str):
    """Markup that we made; every other string is text and gets escaped."""

    __slots__ = ()


# Gradio evaluates ${...} and {{...}} of an HTML component as a template, so user text must not hold them
_TEMPLATE = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"})
ROOT_PATH = "TURBODIFF_ROOT_PATH"  # the page's process sets it from --root-path
_PLAIN_LINK = "text-decoration:none"


def text(value: object) -> Html:
    """Any value as text that is safe between tags and inside a quoted attribute."""
    if isinstance(value, Html):
        return value
    said = html.escape(str(value))
    return Html((said if said.isascii() else whole(said)).translate(_TEMPLATE))


def el(tag: str, *children: object, **attributes: object) -> Html:
    """One element: `cls` is class, underscores become dashes, True is a bare attribute, None and False leave it out."""
    return Html(f"{void(tag, **attributes)}{join(*children)}</{tag}>")


def void(tag: str, **attributes: object) -> Html:
    """One element without content, such as img or input; attributes as those of `el`."""
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is None or value is False or (value == "" and name != "alt"):
            continue  # an empty alt says that a picture is decoration: without it a reader spells out its address
        name = "class" if name == "cls" else name.rstrip("_").replace("_", "-")
        parts.append(f" {name}" if value is True else f' {name}="{text(value)}"')
    return Html("".join(parts) + ">")


def join(*parts: object) -> Html:
    """Parts one after the other, lists and generators of parts in their order; None, False and empty parts vanish."""
    found = []
    for part in parts:
        if isinstance(part, list | tuple | Iterator):
            found.append(join(*part))
        elif part is not None and part is not False:
            found.append(text(part))
    return Html("".join(found))


def action(
    name: str, argument: object, *label: object, cls: str = "", form: bool = False, **attributes: object
) -> Html:
    """A button that page.js hands to the server: `form` ones fill the form, the others act on the studio."""
    kind = {"data_form" if form else "data_act": name}
    return el("button", *label, type="button", cls=f"td-btn {cls}".strip(), data_arg=argument, **kind, **attributes)


def local(name: str, argument: object, *label: object, cls: str = "", **attributes: object) -> Html:
    """A button that page.js answers in the browser."""
    return el(
        "button", *label, type="button", cls=f"td-btn {cls}".strip(), data_do=name, data_arg=argument, **attributes
    )


def download(href: str, label: str, cls: str = "td-btn plain", **attributes: object) -> Html:
    """A link that looks like a button and saves what it points to."""
    return el("a", label, href=href, **{"download": True, **attributes}, cls=cls, style=_PLAIN_LINK)


def link(path: str) -> str:
    """The path of one of our routes as a browser asks for it: behind the prefix of a reverse proxy, if there is one."""
    return os.environ.get(ROOT_PATH, "") + path


def facts(rows: Iterable[tuple[object, object]], cls: str = "td-num", **attributes: object) -> Html:
    """Names and values as a definition list; `cls` is the class of a value."""
    pairs = [(el("dt", name), el("dd", value, cls=cls)) for name, value in rows]
    return el("dl", pairs, cls="td-facts", **attributes)


def poster(src: str, cls: str = "") -> Html | None:
    """The poster of a clip, None where it has none."""
    return void("img", src=src, alt="", loading="lazy", cls=cls) if src else None


def blank(said: str, first: str = "") -> Html:
    """What an empty list says; `first` names the button that leads to the first tab, "" for none."""
    button = local("tab", 0, first, cls="main") if first else None
    return el("div", el("p", said), button, cls="td-blank")


def note(sentence: str, kind: str = "") -> Html:
    """One sentence in a coloured box, read out by screen readers; nothing where there is none to say."""
    return el("div", sentence, cls=f"td-note {kind}".strip(), role="status") if sentence else Html("")
