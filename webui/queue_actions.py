"""What a click in the queue does: order, a time before which nothing starts, all that waits, what lost its segment."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from turbodiff.spec.jobs import Where
from webui.actions import Answer, UiState, number_of
from webui.wording import Words

if TYPE_CHECKING:
    from webui.snapshot import StudioReader

MOVES = {"top": "first", "up": "up", "down": "down"}


def act(reader: StudioReader, name: str, argument: str, ui_state: UiState, words: Words) -> Answer | None:
    """What a button of the queue does; None for one that is not of it.

    Raises:
        TurbodiffError: it cannot be done, in the person's words.
    """
    studio, sentence = reader.studio, ""
    waiting = studio.waiting
    match name:
        case "top" | "up" | "down":
            waiting.move(number_of(argument), cast(Where, MOVES[name]))
        case "place":  # "JOB OTHER": to before the other one, to the end without one
            job, _, other = argument.partition(" ")
            waiting.move(number_of(job), number_of(other) if other else "last")
        case "clear":
            sentence = words("run.cleared", n=waiting.clear())
        case "hold":
            until_s = waiting.hold(argument)
            sentence = words("run.held", time=words.clock(until_s)) if until_s else words("run.hold_ended")
        case "drop_chain":  # a segment and those that go on from it
            sentence = words("run.dropped", n=waiting.drop(number_of(argument)))
        case _:
            return None
    return ui_state, sentence
