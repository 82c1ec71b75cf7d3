"""Whatever happens to the database and its folders: each accepted job has one clip, or the page tells its fate."""

import hashlib
import json
import math
import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from supervisor.bench import Bench, scripted

from turbodiff.archive import seeds
from turbodiff.archive.clips import sidecars
from turbodiff.jobs.attempts import claim
from turbodiff.jobs.database import DATABASE
from turbodiff.jobs.journal import JOURNAL
from turbodiff.spec.jobs import QueuedJob
from turbodiff.supervisor import recovery
from turbodiff.supervisor.context import machine_of

SOAK = bool(os.environ.get("TURBODIFF_SOAK"))
FLIPS = 3000 if SOAK else 60
NONCES = [f"nonce-{number}" for number in range(7)]
DONE, CANCELLED = NONCES[:2], NONCES[2]
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State and outputs of an app that was killed: two clips, a cancelled job, one that runs, three that wait.

    `before` is a sound copy of the database from when all seven waited.
    """
    folder = tmp_path_factory.mktemp("image")
    bench = Bench(folder / "live")
    store = bench.store
    store.put("paused", True)
    jobs = [store.submit(scripted({}, nonce=nonce, seed=number)) for number, nonce in enumerate(NONCES)]
    store.rows("VACUUM INTO ?", str(folder / "before"))
    store.put("paused", False)
    bench.turn_until(lambda: store.job(jobs[1]).state == "running")
    store.put("paused", True)
    bench.turn_until(lambda: store.job(jobs[1]).over)
    store.cancel(jobs[2])
    store.put("paused", False)
    assert claim(store) is not None
    shutil.copytree(bench.state, folder / "state")
    shutil.copytree(bench.outputs, folder / "outputs")
    bench.supervisor.close()
    return folder


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def replace(path: Path, by: Callable[[Path], object]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    by(path)


def without_log(state: Path) -> Path:
    for suffix in ("-wal", "-shm"):
        (state / f"{DATABASE}{suffix}").unlink(missing_ok=True)
    return state / DATABASE


def spoil(path: Path, old: bytes, new: bytes) -> None:
    on(path.parent, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


def other_database(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE job (id INTEGER PRIMARY KEY, name TEXT)")
    db.close()


def on(state: Path, sql: str) -> None:
    db = sqlite3.connect(state / DATABASE)
    db.execute(sql)
    db.commit()
    db.close()


def entry(state: Path, place: int) -> Path:
    return sorted((state / JOURNAL).glob("*.job"))[place]


def strange_entries(folder: Path) -> None:
    """Whole files that no version of ours wrote: numbers beyond every database, half of a surrogate pair."""
    found = json.loads(next(folder.glob("*.job")).read_bytes().partition(b"\n")[2])
    strange = (
        {"nonce": "\ud800"}, {"client": "\udfff"}, {"id": 2**70}, {"id": 2**62}, {"id": -(2**70)}, {"parent": 2**70},
        {"created_s": math.inf}, {"created_s": 10**400}, {"plan": {"x": 1}},
    )  # fmt: skip
    for number, cells in enumerate(strange):
        asked = {**found["request"], "nonce": f"strange-{number}"}
        data = json.dumps({**found, "nonce": asked["nonce"], "request": asked, **cells}).encode()
        name = f"{number:032x}.job"
        (folder / name).write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


DAMAGES: dict[str, Damage] = {
    "nothing": lambda s: None,
    "no log": lambda s: without_log(s) and None,
    "a cut log": lambda s: cut(s / f"{DATABASE}-wal", 0.5),
    "a zeroed log": lambda s: overwrite(s / f"{DATABASE}-wal", bytes(100_000)),
    "a foreign log": lambda s: overwrite(s / f"{DATABASE}-wal", b"x" * 100_000),
    "a foreign index of the log": lambda s: overwrite(s / f"{DATABASE}-shm", b"x" * 32768),
    "deleted": lambda s: without_log(s).unlink(),
    "deleted beside its log": lambda s: (s / DATABASE).unlink(),
    "emptied": lambda s: overwrite(without_log(s), b""),
    "zeroed": lambda s: overwrite(without_log(s), bytes(200_000)),
    "zeroed beside its log": lambda s: overwrite(s / DATABASE, bytes(200_000)),
    "cut": lambda s: cut(without_log(s), 0.5),
    "tables whose names are no UTF-8": lambda s: spoil(s / DATABASE, b"CREATE TABLE fact", b"CREATE TABLE \xccact"),
    "text": lambda s: overwrite(without_log(s), b"not a database " * 1000),
    "half overwritten": lambda s: overwrite(without_log(s), (s / DATABASE).read_bytes()[:5000] + b"\x5a" * 90_000),
    "of another program": lambda s: replace(without_log(s), other_database),
    "a folder": lambda s: replace(without_log(s), Path.mkdir),
    "a pipe": lambda s: replace(without_log(s), os.mkfifo),
    "a link to nowhere": lambda s: replace(without_log(s), lambda path: path.symlink_to("/nowhere/else")),
    "a link to itself": lambda s: replace(without_log(s), lambda path: path.symlink_to(path)),
    "older": lambda s: shutil.copy(s.parent / "before", without_log(s)) and None,
    "without a table": lambda s: on(s, "DROP TABLE fact"),
    "without an index": lambda s: on(s, "DROP INDEX job_queue"),
    "without a version": lambda s: on(s, "PRAGMA user_version = 0"),
    "an unreadable request": lambda s: on(s, "UPDATE job SET request = x'00' WHERE nonce = 'nonce-4'"),
    "another request": lambda s: on(s, "UPDATE job SET request = replace(request, '{', '{ ') WHERE nonce = 'nonce-4'"),
    "numbers that are text": lambda s: on(s, "UPDATE job SET created_s = x'00', attempt = 'x' WHERE nonce = 'nonce-4'"),
    "facts that do not parse": lambda s: on(s, "UPDATE fact SET value = '[{'"),
    "seeds that do not parse": lambda s: on(s, "UPDATE seed SET recipe = '[{'"),
    "the journal deleted": lambda s: shutil.rmtree(s / JOURNAL),
    "the journal a file": lambda s: replace(s / JOURNAL, Path.touch),
    "the journal a pipe": lambda s: replace(s / JOURNAL, os.mkfifo),
    "the journal a link to nowhere": lambda s: replace(s / JOURNAL, lambda path: path.symlink_to("/nowhere/else")),
    "the journal without its id": lambda s: (s / JOURNAL / "journal.id").unlink(),
    "a cut file of the journal": lambda s: cut(entry(s, 0), 0.5),
    "an empty file of the journal": lambda s: overwrite(entry(s, 1), b""),
    "a pipe in the journal": lambda s: replace(entry(s, 0), os.mkfifo),
    "a folder in the journal": lambda s: replace(entry(s, 0), Path.mkdir),
    "both: no log, a cut file of the journal": lambda s: cut(entry(without_log(s).parent, 0), 0.9),
}  # fmt: skip


def start(image: Path, folder: Path, damage: Damage) -> tuple[Bench, dict[str, QueuedJob], list[str]]:
    """A supervisor on a damaged copy; its jobs by nonce, and what its log says."""
    shutil.copytree(image / "state", folder / "state", symlinks=True)
    shutil.copytree(image / "outputs", folder / "outputs")
    shutil.copy(image / "before", folder / "before")
    damage(folder / "state")
    bench = Bench(folder)
    jobs = {job.nonce: job for job in bench.store.jobs(limit=1000)}
    return bench, jobs, bench.log_text().splitlines()


def finish(bench: Bench) -> dict[str, QueuedJob]:
    """Run what waits; the jobs by nonce."""
    bench.store.put("paused", False)
    bench.turn_until(lambda: not bench.store.queue() and bench.supervisor.slots[0].job is None)
    return {job.nonce: job for job in bench.store.jobs(limit=1000)}


def made(bench: Bench) -> Counter[str]:
    """Clips by nonce."""
    return Counter(sidecar.request.nonce for _, sidecar in sidecars(bench.outputs))


def check(bench: Bench, lines: list[str]) -> None:
    jobs, clips = finish(bench), made(bench)
    assert not [nonce for nonce, count in clips.items() if count > 1], "made twice"
    parked = [job for job in jobs.values() if job.state == "parked"]
    assert all(job.error and job.error.what for job in parked)
    missing = set(NONCES) - set(clips) - {CANCELLED} - {job.nonce for job in parked}
    told = [line for line in lines if "the file of an accepted job is damaged" in line]
    assert len(missing) <= len(told), f"lost without a word: {missing}"
    assert bench.store.fact("recovered") or not (parked or told)


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_accepted_job_is_lost_or_made_twice_without_a_word(damage: str, image: Path, tmp_path: Path) -> None:
    bench, _, lines = start(image, tmp_path, DAMAGES[damage])
    try:
        check(bench, lines)
        if not damage.startswith("both"):
            jobs = {job.nonce: job.state for job in bench.store.jobs(limit=100)}
            assert set(made(bench)) == set(NONCES) - {CANCELLED}
            assert all(jobs[nonce] == "done" for nonce in NONCES if nonce != CANCELLED)
            assert jobs.get(CANCELLED) in (None, "cancelled", "parked")
    finally:
        bench.supervisor.close()
    store, report = recovery.recover(bench.state, bench.outputs)  # a second start finds nothing to mend
    assert not (report.damage or report.restored or report.mended or report.clips or report.requeued), report
    store.close()


def test_strange_files_in_the_journal_stop_no_start_and_take_no_number(image: Path, tmp_path: Path) -> None:
    bench, jobs, lines = start(image, tmp_path, lambda state: strange_entries(state / JOURNAL))
    try:
        assert jobs.keys() >= set(NONCES) and max(job.id for job in jobs.values()) < 100
        assert len([line for line in lines if "the file of an accepted job is damaged" in line]) >= 7
        assert bench.store.submit(scripted({}, nonce="new")) < 100
        finish(bench)
        assert set(made(bench)) >= {*NONCES, "new"} - {CANCELLED}
        assert max(made(bench).values()) == 1
    finally:
        bench.supervisor.close()


def test_an_older_store_runs_nothing_again(image: Path, tmp_path: Path) -> None:
    bench, jobs, lines = start(image, tmp_path, DAMAGES["older"])
    try:
        assert [jobs[nonce].state for nonce in DONE] == ["done", "done"]
        assert jobs[CANCELLED].state == "parked" and jobs[CANCELLED].error.code == "job_ended"  # type: ignore[union-attr]
        assert any(f"job {jobs[CANCELLED].id} ended" in line for line in lines)
        assert bench.store.fact("recovered")["parked"] == 1
    finally:
        bench.supervisor.close()


def test_a_job_keeps_its_number_when_the_database_is_lost(image: Path, tmp_path: Path) -> None:
    bench, jobs, _ = start(image, tmp_path, DAMAGES["deleted"])
    try:
        assert [jobs[nonce].id for nonce in NONCES[3:]] == [4, 5, 6, 7]
        assert [job.nonce for job in bench.store.queue()] == NONCES[3:]
    finally:
        bench.supervisor.close()


def test_one_flipped_bit_never_stops_a_start_or_loses_a_job(
    image: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    rng, ended, outcomes = random.Random(20), tmp_path / "flip", Counter[str]()
    for _ in range(FLIPS):

        def flip(state: Path) -> None:
            on(state, "PRAGMA wal_checkpoint(TRUNCATE)")
            data = bytearray((state / DATABASE).read_bytes())
            at = rng.randrange(len(data))
            while 60 <= at < 64:  # the version: a newer one is refused in words
                at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
            (state / DATABASE).write_bytes(data)

        shutil.copytree(image / "state", ended / "state", symlinks=True)
        shutil.copytree(image / "outputs", ended / "outputs")
        flip(ended / "state")
        store, report = recovery.recover(ended / "state", ended / "outputs")
        states = {job.nonce: job.state for job in store.jobs(limit=100)}
        assert set(NONCES) - {CANCELLED} <= set(states)
        assert [states[nonce] for nonce in DONE] == ["done", "done"]
        while (job := claim(store)) is not None:
            assert job.request.prompt == "{}" and job.nonce in NONCES[3:]
        seeds.list_seeds(store), store.queue(), store.events(1), machine_of(store), store.paused
        store.close()
        shutil.rmtree(ended)
        mended = report.restored or report.mended or report.parked
        outcomes["damaged" if report.damage else "mended" if mended else "harmless"] += 1
    record_property("attack", f"{FLIPS} flipped bits: {dict(outcomes)}; 0 jobs lost, 0 made twice")


def test_two_apps_on_copies_of_one_state_finish_their_own_queues(image: Path, tmp_path: Path) -> None:
    one, _, _ = start(image, tmp_path / "one", DAMAGES["nothing"])
    one.turn_until(lambda: one.slot.free)
    pid = one.slot.worker.pid
    shutil.copytree(tmp_path / "one" / "state", tmp_path / "two" / "state")
    shutil.copytree(tmp_path / "one" / "outputs", tmp_path / "two" / "outputs")
    other = Bench(tmp_path / "two")
    try:
        assert not any("leftover" in line for line in other.log_text().splitlines())
        assert one.slot.worker is not None and one.slot.worker.pid == pid and not one.slot.worker.wait(0)
        for bench in (one, other):
            finish(bench)
            assert made(bench) == Counter(set(NONCES) - {CANCELLED})
    finally:
        one.supervisor.close()
        other.supervisor.close()
