"""A thousand jobs wait, many of them for one card alone: no card is idle for long while one of them could use it, and
none is passed by a later one that starts where it could."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from supervisor.bench import Bench, request, scripted
from supervisor.test_cards import Driver, no_selected_cards  # noqa: F401  its cards
from turbodiff.jobs.attempts import claim
from turbodiff.jobs.cards import WINDOW
from turbodiff.jobs.store import Store
from turbodiff.supervisor.placement import BEHIND, EVERY_S, Placement

CARDS = ("GPU-a", "GPU-b", "GPU-c")
JOBS = 1000
LOOKS = -(-(JOBS - WINDOW) // BEHIND) + 2  # until all that waits was looked at
WAITING = "SELECT id, place FROM job WHERE state = 'queued' ORDER BY place"
FOR = st.sampled_from(["", *CARDS])


def wait_for(store: Store, cards: list[str]) -> None:
    """Put a job for each of these cards ("": any) into an empty queue, as rows of the same few requests."""
    with store.write() as db:
        db.execute("DELETE FROM job")
    kinds = {card: store.submit(request(gpu=card)) for card in {*cards}}
    columns = "state, request, created_s"
    with store.write() as db:
        db.executemany(
            f"INSERT INTO job (nonce, place, {columns}) SELECT hex(randomblob(16)), ?, {columns} FROM job WHERE id = ?",
            [(place, kinds[card]) for place, card in enumerate(cards)],
        )
        db.executemany("DELETE FROM job WHERE id = ?", [(job,) for job in kinds.values()])


def waiting_on(store: Store, cards: list[str]) -> list[tuple[int, str]]:
    """The jobs that wait, in their order, each with its card."""
    return [(job, cards[int(place)]) for job, place in store.rows(WAITING)]


def slots_of(context: Any, busy: set[int]) -> list[Any]:
    """A slot for each card, as far as placement looks at it."""
    return [
        SimpleNamespace(
            context=context, index=index, device=uuid, gpu=context.memory.gpu(index), seen=True, broken=False,
            job=None, free=index not in busy, lent_to=None, lent=False, weights="", worker=None,
        )
        for index, uuid in enumerate(CARDS)
    ]  # fmt: skip


@pytest.fixture
def shared_bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench(sample=Driver(*CARDS))


@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(FOR, st.integers(1, 400)), min_size=1, max_size=6), st.sets(st.integers(0, 2), max_size=2))
@example([("GPU-a", 999), ("", 1)], {0})
@example([("GPU-a", 100), ("GPU-b", 800), ("", 50), ("GPU-c", 50)], {0, 1})
def test_of_a_thousand_jobs_the_first_that_an_idle_card_can_make_starts_there(
    shared_bench: Bench, blocks: list[tuple[str, int]], busy: set[int]
) -> None:
    store, clock = shared_bench.store, [0.0]
    cards = ([card for card, count in blocks for _ in range(count)] * JOBS)[:JOBS]
    wait_for(store, cards)
    context = shared_bench.supervisor.context
    now, context.now = context.now, lambda: clock[0]
    try:
        slots = slots_of(context, busy)
        placement = Placement(context, lambda: slots)
        for _ in range(LOOKS):
            clock[0] += EVERY_S
            for slot, choice in (placement.choose(slots) or {}).items():
                could = (job for job, card in waiting_on(store, cards) if card in ("", CARDS[slot]))
                assert choice.job == next(could)  # none that could start there is passed
                claim(store, slot, None, choice, CARDS[slot])
                slots[slot].free = False
        idle = {CARDS[slot.index] for slot in slots if slot.free}
        waiting = {card for _, card in waiting_on(store, cards)}
        assert not idle or ("" not in waiting and idle.isdisjoint(waiting))
    finally:
        context.now = now


def test_a_job_behind_a_hundred_for_another_card_starts_on_the_idle_one(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(sample=Driver("GPU-a", "GPU-b"))
    bench.turn_until(lambda: all(slot.free for slot in bench.supervisor.slots))
    bench.store.submit_all([(scripted({"steps": 2000, "dt_s": 0.3}, gpu="GPU-a"), None) for _ in range(100)])
    last = bench.store.submit(scripted({"steps": 1}))
    bench.turn_until(lambda: bench.store.job(last).state == "done")
    assert bench.store.job(last).slot == 1
