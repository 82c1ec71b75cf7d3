"""HTML as text: what a person or a file wrote is escaped, only `Html` passes as it is."""

import html
from typing import Any


class Html(str):
    """Markup that we made; every other string is text and gets escaped."""

    __slots__ = ()


# Gradio evaluates ${...} and {{...}} of an HTML component as a template, so user text must not hold them
_TEMPLATE = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"})


def text(value: object) -> Html:
    """Any value as text that is safe between tags and inside a quoted attribute."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)).translate(_TEMPLATE))


def el(tag: str, *children: object, **attributes: Any) -> Html:
    """One element: `cls` is class, underscores become dashes, True is a bare attribute, None and False leave it out."""
    return Html(f"<{tag}{_attributes(attributes)}>{join(*children)}</{tag}>")


def void(tag: str, **attributes: Any) -> Html:
    """One element without content, such as img or input."""
    return Html(f"<{tag}{_attributes(attributes)}>")


def join(*parts: object) -> Html:
    """Parts one after the other; None, False and empty parts vanish."""
    return Html("".join(text(part) for part in parts if part is not None and part is not False))


def each(parts: Any) -> Html:
    """An iterable of parts, joined."""
    return join(*parts)


def action(name: str, argument: object, *label: object, cls: str = "", form: bool = False, **attributes: Any) -> Html:
    """A button that page.js hands to the server: `form` ones fill the form, the others act on the studio."""
    kind = "data_form" if form else "data_act"
    return el(
        "button", *label, type="button", cls=f"td-btn {cls}".strip(), data_arg=argument, **{kind: name}, **attributes
    )


def _attributes(attributes: dict[str, Any]) -> str:
    parts = []
    for name, value in attributes.items():
        if value is None or value is False or (value == "" and name != "alt"):
            continue  # an empty alt says that a picture is decoration: without it a reader spells out its address
        name = "class" if name == "cls" else name.rstrip("_").replace("_", "-")
        parts.append(f" {name}" if value is True else f' {name}="{text(value)}"')
    return "".join(parts)
