"""Those who submit at the same time share one transaction: each is accepted once, or refused alone."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from supervisor.bench import request

from turbodiff.jobs import acceptance
from turbodiff.jobs.journal import entries, entry_path
from turbodiff.jobs.store import Store
from turbodiff.spec.errors import OutputError, RequestError
from turbodiff.supervisor.recovery import recover

SHARE = 3
Asked = tuple[str, Sequence[str]]  # a client and the nonces of its jobs


def together(store: Store, asked: Sequence[Asked]) -> list[list[int] | Exception]:
    """What each of these is told, all of them waiting before the first is accepted."""
    told: list[list[int] | Exception] = [[] for _ in asked]
    gate, taking = threading.Event(), store._accepting()
    taking._committer.submit(gate.wait)

    def submit(place: int, client: str, nonces: Sequence[str]) -> None:
        try:
            told[place] = store.submit_all([(request(nonce=nonce), None) for nonce in nonces], client=client)
        except (RequestError, OutputError) as error:
            told[place] = error

    threads = [threading.Thread(target=submit, args=(place, *one)) for place, one in enumerate(asked)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while len(taking._waiting) < number:  # in this order, so that the first of a nonce is known
            time.sleep(0.001)
    gate.set()
    for thread in threads:
        thread.join()
    return told


NONCES = st.sampled_from([f"n{number}" for number in range(12)])
ASKED = st.tuples(st.sampled_from(["", "10.0.0.1", "10.0.0.2"]), st.lists(NONCES, min_size=1, max_size=5, unique=True))


@settings(max_examples=25, deadline=None)
@given(st.lists(ASKED, min_size=2, max_size=12))
def test_a_group_accepts_each_job_once_and_refuses_a_submission_alone(asked: list[Asked]) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceptance, "MAX_QUEUED_PER_CLIENT", SHARE)
        store = Store(Path(folder))
        told = together(store, asked)
        rows = {job.nonce: job for job in store.queue()}
        kept, mine = dict[str, int](), Counter[str]()
        for (client, nonces), answer in zip(asked, told, strict=True):
            new = [nonce for nonce in nonces if nonce not in kept]
            if client and mine[client] + len(new) > SHARE:  # in the order in which they came
                assert isinstance(answer, RequestError) and answer.code == "queue_full"
                continue
            assert isinstance(answer, list) and answer == [rows[nonce].id for nonce in nonces]
            kept |= {nonce: rows[nonce].id for nonce in new}
            mine[client] += len(new)
        assert {nonce: job.id for nonce, job in rows.items()} == kept
        files = [(entry.nonce, entry.id, whole) for _, entry, whole in entries(Path(folder)) if entry]
        assert sorted(files) == sorted((nonce, number, True) for nonce, number in kept.items())
        store.close()


def test_a_file_that_cannot_be_written_fails_its_own_submission_and_no_neighbour(store: Store, tmp_path: Path) -> None:
    entry_path(tmp_path, "bad").mkdir(parents=True)
    told = together(store, [("", ["a"]), ("", ["b", "bad"]), ("", ["c", "d"])])
    assert told[0] == [1] and isinstance(told[1], OutputError) and told[2] == [2, 3]
    assert [job.nonce for job in store.queue()] == ["a", "c", "d"]
    assert {entry.nonce for _, entry, whole in entries(tmp_path) if entry and whole} == {"a", "c", "d"}


def test_a_group_is_one_file_and_damage_to_one_job_in_it_is_no_damage_to_the_others(
    store: Store, tmp_path: Path
) -> None:
    together(store, [("", [nonce]) for nonce in "abcd"])
    paths = [entry_path(tmp_path, nonce) for nonce in "abcd"]
    assert {path.stat().st_nlink for path in paths} == {4}
    paths[0].write_bytes(paths[0].read_bytes().replace(b'"nonce":"b"', b'"nonce":"x"', 1))
    found = {path: whole for path, _, whole in entries(tmp_path)}
    assert [found[path] for path in paths] == [True, False, True, True]
    store.cancel(1)  # its name goes, the file stays for the others
    assert not paths[0].exists() and paths[2].stat().st_nlink == 3


def test_without_hard_links_each_job_has_a_file_of_its_own(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    together(store, [("", [nonce]) for nonce in "abc"])
    assert sorted((entry.nonce, whole) for _, entry, whole in entries(tmp_path) if entry) == [
        ("a", True), ("b", True), ("c", True),
    ]  # fmt: skip


KILLED = """
import os, signal, sys
from pathlib import Path
from supervisor.bench import request
from jobs.test_acceptance import together
from turbodiff.jobs import journal
from turbodiff.jobs.store import Store

write = journal.write_entries
def killed(state, jobs):
    if len(jobs) > 1:
        if sys.argv[2] == "after":
            write(state, jobs)
        os.kill(os.getpid(), signal.SIGKILL)
    write(state, jobs)
journal.write_entries = killed
store = Store(Path(sys.argv[1]))
print(store.submit_all([(request(nonce="first"), None)]), flush=True)
together(store, [("", [f"n{number}"]) for number in range(8)])
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_journal_of_a_group_leaves_each_job_once(when: str, tmp_path: Path) -> None:
    state = tmp_path / "state"
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(state), when], env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == -signal.SIGKILL and child.stdout == "[1]\n", child.stderr
    nonces = [f"n{number}" for number in range(8)]
    store, _ = recover(state, tmp_path / "outputs")
    assert sorted(job.nonce for job in store.queue()) == ["first", *(nonces if when == "after" else [])]
    told = together(store, [("", [nonce]) for nonce in nonces])  # their clients were told nothing, and ask again
    assert sorted(chain.from_iterable(one for one in told if isinstance(one, list))) == list(range(2, 10))
    assert Counter(job.nonce for job in store.queue()) == Counter(["first", *nonces])
    store.close()
