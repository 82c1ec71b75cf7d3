"""The types of what programs send: each field of a request or an export from JSON is of its own type, or refused.

A form and flags are typed by hand, so that their text may stand for a number; JSON has numbers, and true is none. A
number without a fraction is a whole one, however it is written: 1.0 is 1, since JSON knows one kind of number alone.
"""

import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from turbodiff.spec.errors import RequestError
from turbodiff.spec.request import FROM_WEIGHTS, Request, field_name


class Takes(NamedTuple):
    """What a field takes: kinds of values, and words that stand for one."""

    kinds: frozenset[str]
    words: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return " or ".join([*sorted(self.kinds), *(f'"{word}"' for word in sorted(self.words))])

    def holds(self, value: object) -> bool:
        """Whether a value is one of these."""
        return (isinstance(value, str) and value in self.words) or not self.kinds.isdisjoint(_kinds_of_value(value))


TEXT, SWITCH, NAMES = (Takes(frozenset((kind,))) for kind in ("text", "true or false", "a list of text"))
# beside the model's own: as flags and TurboDiffusion know them
BESIDE = {"size": TEXT, "ode": SWITCH, "pinned": TEXT, "auto": TEXT, "quant_linear": SWITCH}
WORDS = {"seed": frozenset(("-1", "random")), **dict.fromkeys(FROM_WEIGHTS, frozenset(("auto",)))}


def fields_taken(model: type[BaseModel]) -> dict[str, Takes]:
    """What each field of a model takes from JSON."""
    taken = {name: _taken(field.annotation) for name, field in model.model_fields.items()}
    taken = {name: found if found.kinds else TEXT for name, found in taken.items()}  # its own words are judged later
    if model is Request:
        for name, more in BESIDE.items():
            taken[name] = Takes(taken[name].kinds | more.kinds) if name in taken else more
        taken |= {name: Takes(taken[name].kinds, taken[name].words | words) for name, words in WORDS.items()}
    return taken


def checked(fields: Mapping[str, object], taken: Mapping[str, Takes]) -> dict[str, Any]:
    """The fields of a JSON object under their own names; null and "" say nothing, as everywhere.

    Raises:
        RequestError: a field that is said twice, or one of another type.
    """
    named = dict[str, Any]()
    for key, value in fields.items():
        if (name := field_name(str(key))) in named:
            raise RequestError("a field is said twice", code="field_twice", field=name[:40], try_instead="say it once")
        named[name] = value
        if value is not None and value != "" and name in taken and not taken[name].holds(value):
            raise RequestError(
                "not of the type of this field", code="bad_type", field=name, got=str(value)[:40],
                expected=taken[name], try_instead="leave it out to get the default",
            )  # fmt: skip
    return named


def _taken(annotation: object) -> Takes:
    """What a field of this annotation takes."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _taken(parts[0])
    if origin is Literal:
        words = frozenset(part for part in parts if isinstance(part, str))
        return Takes(frozenset(("a whole number",)) if len(words) < len(parts) else frozenset(), words)
    if origin in (Union, types.UnionType):
        each = [_taken(part) for part in parts]
        return Takes(frozenset[str]().union(*(one.kinds for one in each)),
                     frozenset[str]().union(*(one.words for one in each)))  # fmt: skip
    if origin in (tuple, frozenset):
        return NAMES if parts[0] is str else Takes(frozenset(("a list",)))
    kinds_of = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): ""}
    return Takes(frozenset(filter(None, (kinds_of.get(annotation, ""),))))  # type: ignore[call-overload]


def _kinds_of_value(value: object) -> tuple[str, ...]:
    """The kinds that a value of JSON is of."""
    if isinstance(value, bool):
        return ("true or false",)
    if isinstance(value, int | float):
        return ("a number", "a whole number") if value == value // 1 else ("a number",)
    if isinstance(value, list):
        return ("a list", "a list of text") if all(isinstance(part, str) for part in value) else ("a list",)
    return ("text",) if isinstance(value, str) else ()
