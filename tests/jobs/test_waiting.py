"""Waiting jobs are put in order, changed, held until a time and cleared; nothing of that is lost in a restart."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor.bench import request

from turbodiff.jobs import cards
from turbodiff.jobs.attempts import claim, finish_job
from turbodiff.jobs.dispatch import Card, Price, WaitingJob
from turbodiff.jobs.journal import entries
from turbodiff.jobs.store import Store
from turbodiff.jobs.waiting import LONGEST_HOLD_S, clear, held_until, move
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.errors import RequestError
from turbodiff.spec.jobs import QueuedJob
from turbodiff.studio import Studio

CIRCLE = {"prompt": "a red circle moves right", "model": "demo", "num_frames": 9, "seed": 3}


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    made = Studio(tmp_path / "state", tmp_path / "outputs")
    yield made
    made.close()


def order(store: Store) -> list[int]:
    return [job.id for job in store.queue()]


def test_a_job_is_dropped_before_another_one(store: Store) -> None:
    for _ in range(4):
        store.submit(request())
    for job, before, expected in ((4, 2, "1423"), (1, 3, "4213"), (2, 2, "4213"), (2, 9, "4213")):
        move(store, job, before)
        assert "".join(map(str, order(store))) == expected


def test_nothing_starts_before_the_time_also_after_a_restart(studio: Studio) -> None:
    job = studio.submit(CIRCLE)
    until_s = studio.waiting.hold(time.strftime("%H:%M", time.localtime(time.time() + 3600)))
    now_s = time.time()
    assert 3600 - 60 <= until_s - now_s <= 3600
    again = Store(studio.state)
    assert claim(again) is None and held_until(again) == until_s
    again.now = lambda: until_s
    assert (found := claim(again)) and found.id == job
    again.now = lambda: until_s - LONGEST_HOLD_S - 1  # a clock that was set back by years holds nothing
    assert held_until(again) == 0
    again.close()
    assert studio.waiting.hold("") == studio.waiting.held_until_s == 0
    for wrong in ("24:00", "7", "at night", "1:2:3"):
        with pytest.raises(RequestError, match="time of the day"):
            studio.waiting.hold(wrong)


def test_an_edited_job_keeps_its_place_its_number_and_its_promise(studio: Studio) -> None:
    first, second = studio.submit_all([CIRCLE, CIRCLE])
    assert studio.waiting.replace(studio.job(first), {**CIRCLE, "prompt": "a blue square", "seed": 8})
    changed = studio.job(first)
    assert (changed.request.prompt, changed.request.seed, changed.state) == ("a blue square", 8, "queued")
    assert changed.plan and changed.plan.request.prompt == "a blue square"
    accepted = {entry.id: entry.request.prompt for _, entry, whole in entries(studio.state) if entry and whole}
    assert accepted[first] == "a blue square"  # what a lost database would be made from
    with pytest.raises(RequestError):
        studio.waiting.replace(changed, {**CIRCLE, "num_frames": "many"})
    assert studio.job(first).request.prompt == "a blue square"
    started = claim(store := Store(studio.state))
    assert started and started.id == first
    assert not studio.waiting.replace(changed, CIRCLE)  # it runs: nothing is changed
    assert studio.job(first).request.prompt == "a blue square" and order(store) == [second]
    store.close()


def chain(studio: Studio) -> list[QueuedJob]:
    rows = [{**CIRCLE, "nonce": name, "after": after} for name, after in (("a", ""), ("b", "a"), ("c", "b"))]
    return [studio.job(job) for job in studio.submit_all(rows)]


def test_an_edited_segment_still_follows_and_keeps_the_size_of_its_clip(studio: Studio) -> None:
    first, second, third = chain(studio)
    assert studio.waiting.replace(second, {**CIRCLE, "prompt": "it turns"})
    assert studio.job(second.id).request.after == "a" and studio.job(second.id).nonce == "b"
    for segment in (first, third):
        with pytest.raises(RequestError, match="one size"):
            studio.waiting.replace(segment, {**CIRCLE, "fps": 8})


def test_dropping_a_segment_drops_what_follows_it_and_nothing_else(studio: Studio) -> None:
    alone = studio.submit(CIRCLE)
    first, second, third = chain(studio)
    studio.cancel(first.id)
    assert studio.waiting.drop(second.id) == 2
    assert [studio.job(job).state for job in (alone, second.id, third.id)] == ["queued", "cancelled", "cancelled"]


def test_clearing_cancels_what_waits_and_leaves_what_runs(store: Store) -> None:
    for _ in range(3):
        store.submit(request())
    running = claim(store)
    assert running and clear(store) == 2 and order(store) == []
    assert finish_job(store, running.id, running.attempt, ClipResult(path="one.mp4"))
    assert not list(entries(store.path.parent))  # a next start brings none back


def test_a_segment_run_again_with_other_fields_stays_in_its_chain(studio: Studio) -> None:
    first, second, _ = chain(studio)
    studio.cancel(first.id)
    again = studio.job(studio.retry(first.id, {**CIRCLE, "steps": 2}))
    assert (again.parent, again.request.steps) == (first.id, 2)
    store = Store(studio.state)
    assert (started := claim(store)) and started.id == again.id
    assert finish_job(store, again.id, 1, ClipResult(path="one.mp4"))
    assert (started := claim(store)) and started.id == second.id
    store.close()


def test_no_start_is_told_before_the_time_that_a_person_chose_nor_while_the_queue_is_paused(store: Store) -> None:
    waits = tuple([WaitingJob(number, "", {0: Price(90.0, 90.0)}) for number in (1, 2)])
    shown = cards.Fleet(cards=(cards.FleetCard(slot=0),), workers=(Card(0, 60.0),), waiting=waits)

    def starts_s() -> list[float]:
        found = cards.fleet(store)
        return [start.start_s for start in found.starts().values()] if found else []

    store.now = lambda: 1e9
    store.put(cards.FLEET, shown.model_dump(mode="json"))
    assert starts_s() == [60.0, 150.0]
    store.put("held_until_s", 1e9 + 7200)
    assert starts_s() == [7200.0, 7290.0]
    store.put("paused", True)
    assert starts_s() == []
