import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.bench import Bench, request, scripted
from turbodiff.archive import seeds
from turbodiff.jobs.attempts import claim
from turbodiff.jobs.database import DATABASE
from turbodiff.jobs.store import Store
from turbodiff.spec.errors import FileError, OutputError
from turbodiff.supervisor import recovery

Make = Callable[..., Bench]


def test_interrupted_jobs_go_back_to_the_queue_uncharged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(3):
        store.submit(request())
    claim(store)
    store.close()
    store, report = recovery.recover(tmp_path, tmp_path / "outputs")
    assert [job.id for job in store.queue()] == [1, 2, 3]
    assert (report.requeued, report.adopted) == (1, 0)
    assert store.job(1).strikes == {}
    store.close()


def test_a_start_waits_for_a_database_that_another_program_holds(tmp_path: Path) -> None:
    Store(tmp_path).close()
    other = sqlite3.connect(tmp_path / DATABASE, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(OutputError, match="another program holds"):
        recovery.recover(tmp_path, tmp_path / "outputs", patience_s=0.0)
    until = threading.Timer(2.0, other.close)
    until.start()
    store, report = recovery.recover(tmp_path, tmp_path / "outputs")
    store.close()
    until.join()
    assert not report.damage


def test_fault_38_a_clip_that_was_published_before_the_commit_is_adopted(bench: Bench) -> None:
    job = bench.run(scripted({}, seed=5))
    with bench.store.write() as db:  # as if the supervisor had died between the two
        db.execute("UPDATE job SET state = 'verifying', result = NULL WHERE id = ?", (job.id,))
        db.execute("DELETE FROM artifact")
        db.execute("DELETE FROM seed")
    report = recovery.Report()
    recovery.settle(bench.store, bench.outputs, report)
    assert report.adopted == 1
    assert bench.store.job(job.id).result.path == job.result.path  # type: ignore[index]
    assert len(seeds.list_seeds(bench.store)) == 1


def test_fault_38_a_damaged_clip_is_not_adopted(bench: Bench) -> None:
    job = bench.run(scripted({}))
    assert job.result is not None
    Path(job.result.path).write_bytes(b"cut")
    with bench.store.write() as db:
        db.execute("UPDATE job SET state = 'running' WHERE id = ?", (job.id,))
    recovery.settle(bench.store, bench.outputs, recovery.Report())
    assert bench.store.job(job.id).state == "queued"


def test_a_cancel_that_nobody_heard_still_counts_after_a_crash(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = store.submit(request())
    claim(store)
    store.cancel(job)
    recovery.settle(store, tmp_path / "outputs", recovery.Report())
    assert store.job(job).state == "cancelled"
    store.close()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:] = b"\x5a" * (len(data) - 100)
    path.write_bytes(data)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


@pytest.mark.parametrize("backup", [True, False])
def test_fault_43_a_damaged_store_is_moved_aside_and_every_clip_comes_back(make_bench: Make, backup: bool) -> None:
    bench = make_bench()
    bench.run(scripted({}, seed=1))
    bench.store.put("paused", True)
    waiting = bench.store.submit(scripted({}, seed=9))
    if backup:
        recovery.backup(bench.store, bench.state, every_s=-1)
    bench.store.cancel(waiting)
    bench.store.put("paused", False)
    bench.run(scripted({}, seed=2))
    bench.supervisor.close()
    damage(bench.state / DATABASE)

    store, report = recovery.recover(bench.state, bench.outputs)
    assert len(list(bench.state.glob(f"damaged-*/{DATABASE}"))) == 1
    assert any("damaged" in line for line in report.lines)
    assert sorted(job.request.seed for job in store.jobs() if job.state == "done") == [1, 2]
    assert sorted(seed.row.seed for seed in seeds.list_seeds(store)) == ["1", "2"]
    assert not store.queue()  # the backup has it waiting; that it ended since, its missing file in the journal tells
    parked = [(job.request.seed, job.error.code) for job in store.jobs() if job.state == "parked" and job.error]
    assert parked == ([(9, "job_ended")] if backup else [])
    store.close()


def test_delete_the_store_and_every_clip_and_rating_comes_back(bench: Bench) -> None:
    for seed in (1, 2):
        bench.run(scripted({}, seed=seed))
    seeds.rate(bench.store, bench.outputs, 1, "★★★★★", "best")
    before = seeds.export_text(bench.store)
    other = Store(bench.state / "elsewhere")
    assert recovery.rebuild(other, bench.outputs) == 2
    assert seeds.export_text(other) == before
    assert [job.state for job in other.jobs()] == ["done", "done"]
    assert recovery.rebuild(other, bench.outputs) == 0
    other.close()


def test_fault_43_a_newer_store_is_not_restored_over(tmp_path: Path) -> None:
    Store(tmp_path).close()
    db = sqlite3.connect(tmp_path / DATABASE)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(FileError, match="newer"):
        recovery.recover(tmp_path, tmp_path / "outputs")
    assert not list(tmp_path.glob("damaged-*"))


def test_a_backup_is_made_once_a_day_and_seven_are_kept(store: Store, tmp_path: Path) -> None:
    store.submit(request())
    assert recovery.backup(store, tmp_path) is not None
    assert recovery.backup(store, tmp_path) is None
    for n in range(10):
        (tmp_path / recovery.BACKUPS / f"2020010{n}_000000.db").touch()
    made = recovery.backup(store, tmp_path, every_s=-1e12)
    assert made is not None
    assert len(list((tmp_path / recovery.BACKUPS).glob("*.db"))) == 7
    copy = sqlite3.connect(made)
    assert copy.execute("SELECT count(*) FROM job").fetchone()[0] == 1
    copy.close()


def test_half_written_files_of_dead_workers_are_swept(bench: Bench) -> None:
    job = bench.run(scripted({"die": "SIGSEGV", "die_at": "publish"}, {}))
    assert job.state == "done"
    partials = list((bench.outputs / ".partial").iterdir())
    assert len(partials) == 1
    bench.supervisor.close()
    recovery.recover(bench.state, bench.outputs)[0].close()
    assert not list((bench.outputs / ".partial").iterdir())
