"""Any JSON at the doors that take JSON or text, as hypothesis finds and shrinks it."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attack import hostile
from turbodiff.archive.clips import read_sidecar
from turbodiff.archive.seed_table import decode_table, read_table, write_table
from turbodiff.diagnostics.privacy import OwnTexts
from turbodiff.jobs.journal import Accepted, entries, entry_path, write_entry
from turbodiff.prompt.weights import clean, parse
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import read_event
from turbodiff.spec.request import Request, make_request
from turbodiff.spec.text import is_blank, printable
from turbodiff.weights import folders, locate
from webui import form, form_actions

# at 8,000 hypothesis keeps 2.5 GB of what it has tried, and this file alone takes an hour
EXAMPLES = 2_000 if os.environ.get("TURBODIFF_SOAK") else 150
TEXTS = st.text(st.characters(codec=None), max_size=60) | st.sampled_from(hostile.NASTY_TEXT)
NUMBERS = st.integers() | st.floats() | st.sampled_from(hostile.NASTY_NUMBERS)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
NAMES = st.sampled_from(sorted(Request.model_fields)) | st.sampled_from(("size", "fields", "num_steps")) | TEXTS
ANY = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5))
OBJECTS = st.dictionaries(NAMES, ANY, max_size=8)
many = settings(max_examples=EXAMPLES, derandomize=not os.environ.get("TURBODIFF_SOAK"), database=None)


def as_bytes(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def taken_or_refused(enter: Callable[[], object]) -> None:
    try:
        enter()
    except TurbodiffError as error:
        assert error.code and len(str(error)) < 20_000
        json.dumps(error.fields()).encode()


@many
@given(OBJECTS)
def test_any_object_is_a_request_or_refused(fields: dict[str, Any]) -> None:
    taken_or_refused(lambda: make_request(fields))
    taken_or_refused(lambda: make_request({"prompt": "x", **fields}))


@many
@given(OBJECTS, ANY)
def test_any_object_is_form_values_of_the_right_types(fields: dict[str, Any], value: Any) -> None:
    kept = form.sanitize(fields)
    assert form.sanitize(kept) == kept
    form.request_fields(kept)
    form.loras(json.dumps(value))
    form.from_request({**hostile.sidecar()["request"], **kept})
    form.model_called(value)


@many
@given(ANY)
def test_any_value_as_a_sidecar_a_journal_or_an_event_raises_nothing(tmp_path_factory: Any, value: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    clip = folder / "t2v_1_demo_20261123_003107.mp4"
    clip.write_bytes(b"")
    for given_value in (value, {"request": value}, {**hostile.sidecar(), "request": value, "plan": value}):
        Path(f"{clip}.json").write_bytes(as_bytes(given_value))
        taken_or_refused(lambda: read_sidecar(clip))
        write_entry(folder, Accepted(id=1, nonce="a", created_s=0.0, request=make_request({"prompt": "x"})))
        entry_path(folder, "a").write_bytes(b"0" * 64 + b"\n" + as_bytes(given_value))
        assert [whole for _, _, whole in entries(folder)] == [False]
    for line in (value, {"v": 1, "type": value}, {"v": 1, "type": "step", "fields": value}):
        with suppress(ValueError):  # what supervisor/worker_process.py expects
            read_event(as_bytes(line))


@many
@given(ANY)
def test_any_value_as_a_header_of_weights_is_passed_over(tmp_path_factory: Any, value: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    for header in (value, {"w": value}, {"w": {"dtype": "F32", "shape": value, "data_offsets": value}}):
        text = as_bytes(header)
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        files, error, _ = locate._match(folders.Entry(path))
        assert not files and error is not None and len(str(error)) < 3000


@many
@given(st.text(st.characters(codec=None), max_size=300), st.binary(max_size=300))
def test_any_text_is_a_prompt_a_table_and_a_line(text: str, data: bytes) -> None:
    taken_or_refused(lambda: parse(clean(text)))
    rows = read_table(text)
    assert len(read_table(write_table(rows))) == len(rows)
    taken_or_refused(lambda: read_table(decode_table(data, "seeds.md")[0]))
    line = printable(text)
    assert "\n" not in line and "\x1b" not in line and "\u202e" not in line
    is_blank(text)
    assert not OwnTexts([text]).is_in("") and isinstance(OwnTexts([text]).without(text), str)


@many
@given(st.sampled_from(("fill", "lora", "pin", "card", "round", "use_seed", "reuse", "animate", "x")), ANY)
def test_any_argument_of_a_button_is_taken_or_refused(name: str, argument: Any) -> None:
    values = {**dict.fromkeys(form.FIELDS), **form.defaults(form.model_called("demo"))}
    text = argument if isinstance(argument, str) else json.dumps(argument)
    if name in ("fill", "lora", "pin", "card", "x"):  # the others look for a clip
        taken_or_refused(lambda: form_actions.fill(None, name, text, values, {}))  # type: ignore[arg-type]
