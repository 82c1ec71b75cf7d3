"""Server push: what tabs are told at once, what waits, and that no failure ends a stream."""

import asyncio
from contextlib import aclosing

import httpx
import pytest

from turbodiff.plan.hardware import Machine
from turbodiff.spec.cached import CachedValue
from turbodiff.spec.numbers import GIB
from turbodiff.studio import Studio
from webui import changes
from webui.changes import Changes
from webui.snapshot import StudioReader

MACHINE = Machine(ram_total_bytes=64 * GIB, ram_available_bytes=48 * GIB, cpu_count=8)


@pytest.fixture
def reader(tmp_path):
    """A reader of an empty studio, on a machine that a test moves."""
    made = StudioReader(Studio(tmp_path / "state", tmp_path / "outputs"))
    made.report = CachedValue(lambda: None, 3600.0)
    move(made, 48)
    yield made
    made.studio.close()


def move(reader, free_gib):
    """The machine has so much free memory, as the next look sees."""
    machine = MACHINE.model_copy(update={"ram_available_bytes": free_gib * GIB})
    reader._machine = CachedValue(lambda: machine, 3600.0)
    reader.snapshot.now()


def test_a_machine_that_moves_changes_readings_and_what_was_done_changes_facts(reader):
    looks = Changes(reader)
    before = looks.look()
    move(reader, 40)
    moved = looks.look()
    assert moved.facts == before.facts and moved.readings != before.readings
    reader.studio.submit({"prompt": "a red circle moves right", "model": "demo"})
    reader.snapshot.now()
    queued = looks.look()
    assert queued.facts != moved.facts
    reader.changed()  # a button of any tab: a drawing that it overtook is asked for again
    assert looks.look().facts != queued.facts


async def heard(stream, count):
    return [(await asyncio.wait_for(anext(stream), 60)).strip() for _ in range(count)]


async def heard_at_last(stream, what):
    """Hear it, after readings at most: the room on the disk of a busy machine never rests."""
    while (told := await heard(stream, 1)) == ["data: whole"]:
        pass
    return told == [what]


def test_a_stream_begins_with_a_look_hears_of_readings_late_and_outlives_a_failure(reader, monkeypatch):
    monkeypatch.setattr(changes, "LOOK_S", 0.01)
    monkeypatch.setattr(changes, "READINGS_S", 0.5)
    monkeypatch.setattr(changes, "STILL_S", 1.0)

    async def listen():
        looks = Changes(reader)
        async with aclosing(looks.stream()) as stream:
            assert await heard(stream, 2) == ["retry: 1000", "data: look"]
            assert await heard_at_last(stream, "data: still")
            move(reader, 40)
            assert await heard(stream, 1) == ["data: whole"]
            looks.look = lambda: 1 / 0
            assert await heard_at_last(stream, "data: look")
            assert await heard_at_last(stream, "data: still")
            del looks.look
            assert await heard_at_last(stream, "data: look")

    asyncio.run(listen())


def test_the_page_is_told_over_a_stream_that_nobody_packs_or_keeps(app):
    with httpx.stream("GET", f"{app.url}/changes", headers={"accept-encoding": "gzip"}, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store" and "content-encoding" not in answer.headers
        lines = answer.iter_lines()
        assert [line for line in (next(lines) for _ in range(4)) if line] == ["retry: 1000", "data: look"]
    assert httpx.head(f"{app.url}/changes", timeout=60).status_code == 200
