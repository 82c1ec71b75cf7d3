"""The three rounds as buttons: what each sets, its predicted seconds against its budget, and what fits instead."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import find_model
from turbodiff.spec.plan import Plan
from webui.view import short_model
from webui.wording import Words

Estimate = Callable[[dict[str, Any]], Plan]

# what is given up, in this order, where a round takes too long or does not fit; the model never for a picture
SHORTER: tuple[dict[str, Any], ...] = (
    {"num_frames": 49},
    {"resolution": "480p"},
    {"resolution": "480p", "num_frames": 49},
    {"resolution": "480p", "num_frames": 33},
    {"model": "wan2.1-1.3b", "resolution": "480p"},
    {"model": "wan2.1-1.3b", "resolution": "480p", "num_frames": 49},
)


@dataclass(frozen=True)
class RoundTile:
    """One round; `instead` and `instead_fields` are what fits its budget where it does not."""

    name: str
    title: str
    what: str
    time: str
    over: bool
    instead: str = ""
    instead_fields: Mapping[str, Any] = field(default_factory=dict)


def fields_of(found: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values in a round: what it sets, the rest as it is."""
    return {**values, **getattr(found, str(values.get("kind") or "t2v")).fields()}


def tiles(rounds: Any, values: Mapping[str, Any], estimate: Estimate, words: Words) -> list[RoundTile]:
    """The rounds for what the form holds."""
    return [_tile(found, fields_of(found, values), estimate, words) for found in rounds]


def _tile(found: Any, fields: dict[str, Any], estimate: Estimate, words: Words) -> RoundTile:
    seconds = _seconds(fields, estimate)
    title, what, budget = words(f"round.{found.name}"), _what(fields, words), words.seconds(found.budget_s)
    if seconds is not None and seconds <= found.budget_s:
        return RoundTile(found.name, title, what, _time("within", seconds, budget, words), False)
    time = words("meter.no") if seconds is None else _time("over", seconds, budget, words)
    for change in SHORTER if not find_model(str(fields["model"])).bundled else ():
        tried = {**fields, **change}
        took = _seconds(tried, estimate) if _is_less(tried, fields) else None
        if took is not None and took <= found.budget_s:
            instead = (
                f"{_what(tried, words)} · {words('unit.frames', n=tried.get('num_frames'))} · {words.seconds(took)}"
            )
            set_too = getattr(found, str(fields.get("kind") or "t2v")).fields()
            return RoundTile(found.name, title, what, time, True, instead, {**set_too, **change})
    return RoundTile(found.name, title, what, time, True)


def _what(fields: Mapping[str, Any], words: Words) -> str:
    name = short_model(find_model(str(fields["model"])).display_name)
    return f"{name} {fields.get('resolution') or fields.get('size')} · {words('meter.steps', n=fields.get('steps'))}"


def _time(how: str, seconds: float, budget: str, words: Words) -> str:
    return words(f"round.{how}", time=words.seconds(seconds), budget=budget)


def _seconds(fields: dict[str, Any], estimate: Estimate) -> float | None:
    """What it takes here, None where it does not fit."""
    try:
        return estimate(fields).seconds
    except TurbodiffError:
        return None


def _is_less(tried: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """Whether a change gives something up, and keeps the kind of clip."""
    same_kind = find_model(str(tried["model"])).kind == find_model(str(fields["model"])).kind
    fewer = int(tried.get("num_frames") or 0) <= int(fields.get("num_frames") or 0)
    return same_kind and fewer and tried != fields
