import json

import pytest

from turbodiff.spec.events import (
    MAX_LINE_BYTES,
    NoticeEvent,
    PhaseEvent,
    StepEvent,
    make_event,
    read_event,
)

STEP = StepEvent(job=3, attempt=2, i=1, n=4, t=1.5, expert="single", dt_s=0.5, eta_s=1.5)


def test_an_event_survives_its_line() -> None:
    assert read_event(STEP.line()) == STEP
    assert "\n" not in STEP.line()


def test_a_line_is_an_envelope_with_the_fields_that_were_given() -> None:
    raw = json.loads(PhaseEvent(job=3, attempt=2, t_s=7.5, name="write", state="start").line())
    fields = {"name": "write", "state": "start"}
    assert raw == {"v": 1, "job": 3, "attempt": 2, "type": "phase", "t_s": 7.5, "fields": fields}


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version"):
        read_event('{"v": 99, "type": "step"}')


def test_an_event_without_its_fields_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="preview event not understood: jpeg: Field required"):
        make_event("preview", {"png": "AAAA", "i": 1})
    with pytest.raises(ValueError, match="not understood"):
        make_event("rumour", {})


def test_what_a_newer_worker_adds_is_left_out_of_the_envelope_and_kept_in_the_fields() -> None:
    raw = json.loads(STEP.line())
    again = read_event(json.dumps({**raw, "new": 1, "fields": {**raw["fields"], "watts": 300}}))
    assert again.type == "step" and again.i == 1
    assert json.loads(again.line()) == {**raw, "fields": {**raw["fields"], "watts": 300}}


def test_a_line_never_exceeds_the_limit() -> None:
    with pytest.raises(AssertionError):
        NoticeEvent(key="long", text="x" * MAX_LINE_BYTES).line()
