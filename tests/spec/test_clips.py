"""Sidecars and results: what is written is read again, and what others wrote opens."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from tests.plan.machines import ask, card, disk
from turbodiff.plan.planner import plan_request
from turbodiff.spec.clips import UNKNOWN_REQUEST, ClipResult, Measured, Predicted, Ran, Sidecar, read_record
from turbodiff.spec.request import Request

REQUEST = ask("wan2.1-1.3b", resolution="720p")
PLAN = plan_request(REQUEST, card(5), disk())
SIDECAR = Sidecar(
    v=1, created=datetime(2026, 11, 23, tzinfo=UTC), job=3, attempt=1, request=REQUEST, plan=PLAN,
    ran=Ran(attention="sla", backend="triton", weights={"vae": "vae.pth"}), versions={"torch": "2.8"}, sha256="0" * 64,
    frames=17, width=128, height=128, fps=16, warnings=("frozen",), predicted=Predicted(peak_bytes=1, seconds=2.0),
    measured=Measured(seconds=1.5, peak_bytes=2, phase_seconds={"write": 0.1}),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


def document() -> dict[str, Any]:
    return json.loads(SIDECAR.model_dump_json())


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in inner for found in ((*place, key), *places(part, (*place, key)))]


def test_a_sidecar_is_written_key_for_key_as_it_was_set_and_read_again() -> None:
    written = document()
    assert list(written)[:6] == ["v", "created", "job", "attempt", "request", "plan"]
    assert not {"rating", "note"} & set(written), "they are a person's, later"
    assert written["ran"] == {"attention": "sla", "backend": "triton", "weights": {"vae": "vae.pth"}}
    assert written["plan"] == json.loads(PLAN.model_dump_json())
    assert read_record(Sidecar, document()) == SIDECAR
    assert read_record(ClipResult, {"path": "a.mp4", "sha256": "0"}).model_dump() == {"path": "a.mp4", "sha256": "0"}  # type: ignore[union-attr]


def test_a_result_is_what_its_sidecar_says() -> None:
    result = SIDECAR.result(Path("o/a.mp4"))
    assert (result.path, result.sidecar, result.frames) == ("o/a.mp4", "o/a.mp4.json", 17)
    assert (result.ran, result.seconds, result.warnings) == (SIDECAR.ran, 1.5, ("frozen",))


def test_what_a_newer_version_added_is_kept() -> None:
    newer = document() | {"v": 2, "rating": "★", "new": {"a": 1}}
    newer["ran"]["kernel"] = "x"
    sidecar = read_record(Sidecar, newer)
    assert sidecar is not None and (sidecar.v, sidecar.rating) == (2, "★")
    told = sidecar.model_dump(mode="json")
    assert told["new"] == {"a": 1} and told["ran"]["kernel"] == "x"


def test_what_an_older_version_lacked_takes_its_default() -> None:
    sidecar = read_record(Sidecar, {"request": {"prompt": "猫", "seed": 42, "gone": 1, "steps": "many"}})
    assert sidecar is not None
    assert (sidecar.request.prompt, sidecar.request.seed, sidecar.request.steps) == ("猫", 42, 4)
    assert sidecar.plan is None and sidecar.measured.seconds == 0.0
    older = document()
    del older["plan"]["levers"], older["plan"]["request"]["boundary"]
    opened = read_record(Sidecar, older)
    assert opened is not None and opened.plan is None and opened.request == REQUEST


def test_without_a_request_there_is_no_sidecar() -> None:
    for nothing in ({}, {"request": None}, {"request": []}, {"sha256": "0" * 64}):
        assert read_record(Sidecar, nothing) is None


def test_every_required_field_of_a_request_has_a_stand_in() -> None:
    required = {name for name, field in Request.model_fields.items() if field.is_required()}
    assert set(UNKNOWN_REQUEST) == required
    Request.model_validate(UNKNOWN_REQUEST)


@example(("request", "cards"), None)  # a union of a word and a number
@given(st.sampled_from(places(document())), JSON)
def test_damage_anywhere_costs_that_part_only(place: tuple[Any, ...], value: Any) -> None:
    damaged = document()
    parent: Any = damaged
    for step in place[:-1]:
        parent = parent[step]
    parent[place[-1]] = value
    opened = read_record(Sidecar, damaged)
    if place == ("request",):
        return
    assert opened is not None
    untouched = set(Sidecar.model_fields) - {place[0]}
    assert all(getattr(opened, name) == getattr(SIDECAR, name) for name in untouched)
