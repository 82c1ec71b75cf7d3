"""The three rounds as buttons: what each sets, and its predicted seconds against the seconds a person grants it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.models import find_model
from turbodiff.spec.plan import Plan
from webui.view import short_model
from webui.wording import Words

SHOWN = ("scout", "polish", "deliver")
BETWEEN = "between"  # offered where the delivery takes too long or does not fit


@dataclass(frozen=True)
class RoundTile:
    """One round."""

    name: str
    title: str
    what: str
    time: str
    over: bool


def fields_of(found: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The form's values in a round: what it sets, the rest as it is."""
    return {**values, **getattr(found, str(values.get("kind") or "t2v")).fields()}


def tiles(
    rounds: Any, values: Mapping[str, Any], estimate: Callable[[dict[str, Any]], Plan], words: Words
) -> list[RoundTile]:
    """The rounds for what the form holds; none for the demo, whose clips take seconds anyway."""
    if find_model(str(values["model"])).bundled:
        return []
    made = {found.name: _tile(found, fields_of(found, values), estimate, words) for found in rounds}
    over = "deliver" in made and made["deliver"].over
    return [made[name] for name in (*SHOWN, *((BETWEEN,) if over else ())) if name in made]


def _tile(found: Any, fields: dict[str, Any], estimate: Callable[[dict[str, Any]], Plan], words: Words) -> RoundTile:
    name = short_model(find_model(str(fields["model"])).display_name)
    what = f"{name} {fields['resolution']} · {words('meter.steps', n=fields['steps'])}"
    budget = words.seconds(found.budget_s)
    try:
        seconds = estimate(fields).seconds
    except TurbodiffError:
        return RoundTile(found.name, words(f"round.{found.name}"), what, words("meter.no"), True)
    over = seconds > found.budget_s
    time = words("round.over" if over else "round.within", time=words.seconds(seconds), budget=budget)
    return RoundTile(found.name, words(f"round.{found.name}"), what, time, over)
