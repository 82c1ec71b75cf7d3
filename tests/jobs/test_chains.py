"""A job that continues the clip of another waits for it, through failures and copies."""

from supervisor.bench import request

from turbodiff.jobs.attempts import claim, clip_before, finish_job, move_job
from turbodiff.jobs.store import Store
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.events import JobError
from turbodiff.spec.request import Request, make_request


def continuation(after: str, **fields: object) -> Request:
    return make_request({"prompt": "it moves on", "model": "demo-i2v", "after": after, **fields})


def claimed(store: Store) -> int | None:
    job = claim(store)
    return job.id if job else None


def test_a_job_that_continues_a_clip_waits_for_it_and_others_pass(store: Store) -> None:
    first = store.submit(request(nonce="a"))
    second = store.submit(continuation("a", nonce="b"))
    third, other = store.submit(continuation("b")), store.submit(request())
    assert [claimed(store), claimed(store), claimed(store)] == [first, other, None]
    finish_job(store, first, 1, ClipResult(path="one.mp4"))
    assert (claimed(store), claimed(store)) == (second, None)
    move_job(store, second, 1, "failed", error=JobError(what="it broke"))
    assert claimed(store) is None and store.job(third).state == "queued"
    again = store.retry(second)  # the failed segment alone is made again, and the chain goes on
    assert claimed(store) == again
    finish_job(store, again, 1, ClipResult(path="two.mp4"))
    assert claimed(store) == third
    assert [clip_before(store, nonce) for nonce in ("a", "b", "none")] == ["one.mp4", "two.mp4", ""]


def test_a_long_request_is_packed_and_waits_all_the_same(store: Store) -> None:
    store.submit(request(nonce="a"))
    later = store.submit(continuation("a", prompt="it moves on " * 500))
    assert isinstance(store.rows("SELECT request FROM job WHERE id = ?", later)[0]["request"], bytes)
    assert (claimed(store), claimed(store)) == (1, None)


def test_the_clip_of_the_job_itself_goes_before_those_of_its_copies(store: Store) -> None:
    store.duplicate(store.submit(request(nonce="a")))
    for path in ("one.mp4", "copy.mp4"):
        finish_job(store, claimed(store) or 0, 1, ClipResult(path=path))
    assert clip_before(store, "a") == "one.mp4"
