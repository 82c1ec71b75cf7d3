"""Dispatch of jobs that several cards make together: they get their cards, one after the other, and nothing starves."""

from hypothesis import given, settings
from hypothesis import strategies as st

from turbodiff.jobs.dispatch import Card, Price, Start, Together, WaitingJob, dispatch

CASES = settings(max_examples=150, deadline=None, derandomize=True)
SECONDS = st.floats(1.0, 500.0)


def single(job, *slots, seconds=90.0):
    return WaitingJob(job, "", {slot: Price(seconds, seconds) for slot in slots})


def shared(job, cards, *slots, seconds=50.0, alone=False, prices=None):
    return WaitingJob(job, "", prices or {}, together=(Together(cards, slots, seconds, alone),))


def now(waiting, cards):
    return [start for start in dispatch(waiting, cards) if start.start_s == 0]


def test_it_starts_on_the_cards_that_are_idle_and_they_are_taken():
    both = [shared(1, 2, 0, 1, 2), single(2, 0, 1, 2)]
    assert dispatch(both, [Card(0, 30.0), Card(1), Card(2)]) == (
        Start(1, 1, 0.0, 50.0, (2,)), Start(2, 0, 30.0, 120.0),
    )  # fmt: skip


def test_a_card_that_is_idle_is_kept_for_the_first_job_while_it_waits_for_another():
    waiting = [shared(1, 2, 0, 1), *[single(job, 0, 1, seconds=1.0) for job in range(2, 6)]]
    first, *others = dispatch(waiting, [Card(0, 300.0), Card(1)])
    assert (first.start_s, set(first.slots)) == (300.0, {0, 1})
    assert all(other.start_s >= first.end_s for other in others) and now(waiting, [Card(0, 300.0), Card(1)]) == []
    third = single(6, 2)
    assert now([*waiting, third], [Card(0, 300.0), Card(1), Card(2)])[-1].slot == 2, "a card that it has no use for"


def test_jobs_before_it_go_first():
    before, both = single(1, 0), shared(2, 2, 0, 1)
    assert [start.start_s for start in dispatch([before, both], [Card(0), Card(1)])] == [0.0, 90.0]


def test_cards_that_nobody_asked_for_are_taken_only_while_no_other_job_waits_and_where_that_is_sooner():
    one = shared(1, 2, 0, 1, seconds=40.0, alone=True, prices=single(1, 0, 1).prices)
    assert now([one], [Card(0), Card(1)]) == [Start(1, 0, 0.0, 40.0, (1,))]
    assert [start.also for start in dispatch([one, single(2, 0, 1)], [Card(0), Card(1)])] == [(), ()]
    assert [start.also for start in dispatch([one, single(2)], [Card(0), Card(1)])] == [(1,)], "which runs nowhere"
    assert now([one], [Card(0), Card(1, 60.0)]) == [Start(1, 0, 0.0, 90.0)]


def test_with_fewer_cards_than_it_needs_it_waits_and_holds_up_nobody():
    assert dispatch([shared(1, 2, 0, 1), single(2, 0)], [Card(0)]) == (Start(2, 0, 0.0, 90.0),)


@st.composite
def queues(draw):
    count = draw(st.integers(2, 4))
    jobs = []
    for job in range(draw(st.integers(1, 7))):
        if draw(st.booleans()):
            cards = draw(st.integers(2, count))
            jobs.append(shared(job, cards, *range(count), seconds=draw(SECONDS)))
        else:
            slots = draw(st.sets(st.integers(0, count - 1), min_size=1))
            jobs.append(single(job, *sorted(slots), seconds=draw(SECONDS)))
    return jobs, [Card(slot, draw(st.just(0.0) | SECONDS)) for slot in range(count)]


@CASES
@given(queues())
def test_every_job_gets_its_cards_and_no_card_has_two(queue):
    """Played to its end, dispatched anew at each start and each end, as the supervisor does."""
    waiting, cards = queue
    until, now_s, ran = {card.slot: card.busy_s for card in cards}, 0.0, []
    while waiting:
        seen = [Card(slot, max(0.0, until_s - now_s)) for slot, until_s in until.items()]
        for start in now(waiting, seen):
            assert all(until[slot] <= now_s for slot in start.slots) and len(set(start.slots)) == len(start.slots)
            one = next(job for job in waiting if job.job == start.job)
            assert len(start.slots) == (one.together[0].cards if one.together else 1)
            earlier = waiting[: waiting.index(one)]
            assert not any(job.together and job.together[0].cards == len(cards) for job in earlier), "passed by"
            until |= dict.fromkeys(start.slots, now_s + start.end_s)
            ran.append(start.job)
        waiting = [job for job in waiting if job.job not in ran]
        later = [until_s for until_s in until.values() if until_s > now_s]
        assert later or not waiting, "all cards are idle and a job waits"
        now_s = min(later, default=now_s)
