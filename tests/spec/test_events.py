import pytest

from turbodiff.spec.events import MAX_LINE_BYTES, Event, read_event


def test_an_event_survives_its_line():
    event = Event(job=3, attempt=2, type="step", fields={"i": 1, "n": 4})
    assert read_event(event.line()) == event
    assert "\n" not in event.line()


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match="version"):
        read_event('{"v": 99, "type": "step"}')


def test_what_a_newer_worker_adds_is_left_out():
    line = Event(type="result").line()[:-1] + ', "new": 1}'
    assert read_event(line).type == "result"


def test_a_line_never_exceeds_the_limit():
    with pytest.raises(AssertionError):
        Event(type="notice", fields={"text": "x" * MAX_LINE_BYTES}).line()
