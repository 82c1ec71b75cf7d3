"""The queue of several users: one job of each in turn, each user's own in order, nobody waits for ever."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from supervisor.bench import request

from tests.plan.machines import ask, disk, gpu
from tests.plan.machines import machine as machine_of
from turbodiff.jobs.attempts import claim
from turbodiff.jobs.cards import FLEET, WINDOW, Fleet, FleetCard
from turbodiff.jobs.dispatch import Card, Price, WaitingJob, dispatch
from turbodiff.jobs.fair_share import next_place
from turbodiff.jobs.journal import entries
from turbodiff.jobs.store import Store
from turbodiff.jobs.users import User, add_user, remove_user, user_named, user_of_token
from turbodiff.jobs.waiting import expire, move
from turbodiff.plan.planner import plan_request
from turbodiff.spec.errors import RequestError
from turbodiff.studio.cards import Cards
from turbodiff.studio.serving import UNKNOWN_WAIT_S, Serving
from turbodiff.supervisor.recovery import recover

USERS = ("", "anna", "ben", "chen")


class Queue:
    """The places alone: what waits, and where the queue has got to."""

    def __init__(self, shares: dict[str, int]) -> None:
        self.shares, self.waiting = shares, list[tuple[float, int, str]]()
        self.reached, self.count = 0.0, 0

    def submit(self, user: str) -> None:
        reached = max([self.reached, *[min(self.waiting)[0] for _ in self.waiting[:1]]])
        last = max([place for place, _, whose in self.waiting if whose == user], default=None)
        self.count += 1
        self.waiting.append((next_place(reached, last, self.shares[user]), self.count, user))

    def start(self) -> tuple[int, str]:
        first = min(self.waiting)
        self.waiting.remove(first)
        self.reached = max(self.reached, first[0])
        return first[1:]


# what happens to a queue: a user submits so many jobs, or (0) the next one starts
EVENTS = st.lists(st.tuples(st.sampled_from(USERS), st.integers(0, 6)), max_size=40)
SHARES = st.fixed_dictionaries({user: st.integers(1, 3) for user in USERS})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(EVENTS, SHARES)
def test_each_users_jobs_run_in_order_and_nobody_waits_longer_than_the_others_shares(
    events: list[tuple[str, int]], shares: dict[str, int]
) -> None:
    queue, since = Queue(shares), dict[str, list[str]]()  # what started since the first waiting job of a user could
    started = dict[str, list[int]]()
    for user, count in [*events, *[("", 0)] * (6 * len(events))]:
        for _ in range(count):
            if not any(whose == user for *_, whose in queue.waiting):
                since[user] = []
            queue.submit(user)
        if count or not queue.waiting:
            continue
        number, mine = queue.start()
        started.setdefault(mine, []).append(number)
        since[mine] = []
        for other in {whose for *_, whose in queue.waiting} - {mine}:
            since[other].append(mine)
            for rival in USERS:  # between two starts of a user that waits all the time; a first round may be cut
                assert since[other].count(rival) <= 2 * shares[rival], (other, rival)
    assert not queue.waiting
    assert all(numbers == sorted(numbers) for numbers in started.values())


@pytest.fixture
def people(store: Store) -> Iterator[Store]:
    for name, share in (("anna", 1), ("ben", 2)):
        add_user(store, User(name=name, share=share, most_waiting=8))
    yield store


def started(store: Store, count: int) -> list[str]:
    return [job.user for _ in range(count) if (job := claim(store)) is not None]


def test_users_run_in_turn_by_their_shares_and_a_newcomer_waits_for_one_round(people: Store) -> None:
    for user, count in (("anna", 6), ("ben", 6)):
        people.submit_all([(request(), None)] * count, user=user)
    assert started(people, 6) == ["anna", "ben", "anna", "ben", "ben", "anna"]
    people.submit(request(), user="chen")
    assert started(people, 7) == ["ben", "ben", "anna", "ben", "chen", "anna", "anna"]


def test_without_users_the_queue_is_as_it_came_and_a_move_by_a_person_holds(people: Store) -> None:
    jobs = people.submit_all([(request(), None)] * 4)
    assert [job.id for job in people.queue()] == jobs
    theirs = people.submit_all([(request(), None)] * 2, user="anna")
    move(people, jobs[3], "first")
    people.submit(request(), user="ben")
    assert people.queue()[0].id == jobs[3]
    move(people, theirs[1], theirs[0])
    order = [job.id for job in people.queue()]
    assert order.index(theirs[1]) < order.index(theirs[0])


def test_the_start_that_is_told_is_the_one_of_the_users_place_in_the_queue(people: Store) -> None:
    """Behind all that wait was told, although a newcomer's turn comes within a round."""
    machine, plan = machine_of(gpu(24)), plan_request(ask("demo"), machine_of(gpu(24)), disk())
    for _ in range(4):
        people.submit(request(), plan, user="anna")

    def written_down() -> Fleet:
        price = Price(plan.seconds, plan.seconds)
        waiting = [WaitingJob(job.id, "", {0: price}, user=job.user, place=job.place) for job in people.queue()]
        worker = Card(0, busy_s=60.0)
        written = Fleet(cards=(FleetCard(slot=0, name="a"),), workers=(worker,), waiting=tuple(waiting))
        people.put(FLEET, written.model_dump(mode="json"))
        return written

    for user, ahead in (("ben", 1), ("anna", 5), ("", 3)):
        written_down()
        told = Cards(lambda: people).begin(plan, machine, disk(), user=user)
        job = people.submit(request(), plan, user=user)
        assert told is not None and told.start_s == pytest.approx(60.0 + ahead * plan.seconds), user
        assert told.start_s == pytest.approx(written_down().starts()[job].start_s)


def test_jobs_behind_those_that_are_dispatched_delay_what_is_promised_and_when_to_ask_again(people: Store) -> None:
    """100 jobs of 10 s on two cards, of which the supervisor dispatches 64: a new one starts after 500 s, not 320."""
    machine = machine_of(gpu(24))
    plan = plan_request(ask("Wan2.1-1.3B", num_frames=81), machine, disk())
    people.submit_all([(request(), None)] * 100)
    price = Price(10.0, 10.0)
    waiting = [WaitingJob(job.id, "", {0: price, 1: price}, place=job.place) for job in people.queue()[:WINDOW]]
    cards = tuple([FleetCard(slot=slot, uuid=f"GPU-{slot}", name=f"card {slot}") for slot in range(2)])
    written = Fleet(cards=cards, workers=(Card(0), Card(1)), waiting=tuple(waiting))
    people.put(FLEET, written.model_dump(mode="json"))
    here = machine_of(gpu(24, uuid="GPU-0"), gpu(24, uuid="GPU-1", index=1))
    told = Cards(lambda: people).begin(plan, here, disk())
    assert told is not None and told.start_s == pytest.approx(500.0, abs=10.0)
    serving = Serving(people.path.parent, lambda: people, lambda many, more: [])
    add_user(people, User(name="dora", most_waiting=2))
    first, second = people.submit_all([(request(), None)] * 2, user="dora")
    ahead = sum(job.place < people.job(first).place for job in people.queue())
    assert serving.retry_after_s("dora", 1) == max(1, 10 * ahead // 2)  # beyond what is dispatched: counted at the mean
    assert serving.retry_after_s("dora", 9) == UNKNOWN_WAIT_S  # more than may ever wait
    listed = [*waiting, WaitingJob(first, "", {0: price, 1: price}, user="dora", place=99.0)]
    people.put(FLEET, written.model_copy(update={"waiting": tuple(listed)}).model_dump(mode="json"))
    assert serving.retry_after_s("dora", 1) == 10 * WINDOW // 2  # as dispatched: when the first of theirs starts
    people.put(FLEET, None)
    assert serving.retry_after_s("dora", 1) == UNKNOWN_WAIT_S
    assert second > first


def test_cancelled_jobs_take_no_turn(people: Store) -> None:
    for job in people.submit_all([(request(), None)] * 6, user="anna"):
        people.cancel(job)
    people.submit_all([(request(), None)] * 2, user="ben")
    people.submit(request(), user="anna")
    assert started(people, 3) == ["ben", "ben", "anna"]


def test_a_batch_over_the_limit_of_a_user_is_refused_whole(people: Store) -> None:
    people.submit_all([(request(), None)] * 6, user="anna")
    with pytest.raises(RequestError, match="too many jobs") as refused:
        people.submit_all([(request(), None)] * 3, user="anna")
    assert refused.value.code == "queue_full" and len(people.queue()) == 6
    assert len(list(entries(people.path.parent))) == 6
    people.submit_all([(request(), None)] * 2, user="anna")
    people.submit_all([(request(), None)] * 8, user="ben")


def test_the_nonce_of_another_user_is_refused(people: Store) -> None:
    people.submit(request(nonce="n"), user="anna")
    with pytest.raises(RequestError, match="another user"):
        people.submit(request(nonce="n"), user="ben")
    assert people.submit(request(nonce="n"), user="anna") == 1


def test_a_token_is_its_users_alone_and_is_kept_nowhere(people: Store) -> None:
    token, chen = add_user(people, User(name="chen", webhook="http://127.0.0.1/x"))
    found = user_of_token(people, token)
    assert found == chen and len(chen.webhook_key) == 64
    wrong = token[:-1] + ("A" if token[-1] != "A" else "B")
    assert [user_of_token(people, text) for text in (wrong, "", "chen.", "anna" + token[4:])] == [None] * 4
    secret = token.partition(".")[2].encode()
    people.close()
    assert not any(secret in path.read_bytes() for path in people.path.parent.rglob("*") if path.is_file())
    store = Store(people.path.parent)
    with pytest.raises(RequestError, match="of that name"):
        add_user(store, User(name="chen"))
    remove_user(store, "chen")
    assert user_of_token(store, token) is None and user_named(store, "chen") is None
    for name in ("", "Anna", "a b", "-a", "a" * 41, "a.b"):
        with pytest.raises(RequestError, match="no name"):
            add_user(store, User.model_construct(name=name))
    store.close()


def test_whose_a_job_is_and_until_when_it_may_wait_come_back_from_the_journal() -> None:
    with TemporaryDirectory() as folder:
        state, outputs = Path(folder) / "state", Path(folder) / "outputs"
        store, _ = recover(state, outputs)
        store.submit_all([(request(), None)], user="anna", expires_s=store.now() + 3600)
        job = store.job(1)
        store.close()
        for path in state.glob("turbodiff.db*"):
            path.unlink()
        store, _ = recover(state, outputs)
        assert (store.job(1).user, store.job(1).expires_s) == ("anna", job.expires_s)
        again = store.duplicate(1)
        assert store.job(again).user == "anna" and store.job(again).expires_s is None
        store.close()


def test_a_job_that_waited_too_long_ends_never_starts_and_leaves_the_journal(tmp_path: Path) -> None:
    now = [1000.0]
    store = Store(tmp_path, lambda: now[0])
    late, kept = (store.submit_all([(request(), None)], expires_s=until_s)[0] for until_s in (1010.0, None))
    assert expire(store) == []
    now[0] = 1010.0
    job = claim(store)
    assert job is not None and job.id == kept
    assert claim(store) is None and expire(store) == [late] and expire(store) == []
    ended = store.job(late)
    assert ended.state == "failed" and ended.error is not None and ended.error.code == "job_expired"
    assert [entry.id for _, entry, _ in entries(tmp_path) if entry] == [kept]
    store.close()


JOBS = st.lists(
    st.tuples(st.sampled_from(USERS), st.sets(st.integers(0, 3), min_size=1), st.floats(1, 300)),
    min_size=2, max_size=10,
)  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(JOBS, st.lists(st.floats(0, 200), min_size=4, max_size=4))
def test_on_several_cards_no_job_waits_behind_a_later_one_of_its_user(
    asked: list[tuple[str, set[int], float]], busy: list[float]
) -> None:
    cards = [Card(slot, busy_s) for slot, busy_s in enumerate(busy)]
    jobs = [
        WaitingJob(number, "", {slot: Price(took_s * (1 + slot), took_s) for slot in sorted(slots)}, user=user)
        for number, (user, slots, took_s) in enumerate(asked)
    ]
    found = {start.job: start for start in dispatch(jobs, cards)}
    for user, group in groupby(sorted(jobs, key=lambda one: (one.user, one.job)), lambda one: one.user):
        mine = list(group) if user else []
        for place, later in enumerate(mine):
            at = found[later.job]
            assert all(found[one.job].start_s <= at.start_s for one in mine[:place] if at.slot in one.prices)
