import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from supervisor.bench import request

from turbodiff.jobs import acceptance, attempts, database
from turbodiff.jobs.attempts import claim, finish_job, move_job, record_event
from turbodiff.jobs.journal import entries, entry_path, waiting_jobs
from turbodiff.jobs.store import Store
from turbodiff.jobs.waiting import move
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.errors import FileError, OutputError, RequestError
from turbodiff.spec.events import JobError, PreviewEvent, StepEvent
from turbodiff.spec.files import file_system
from turbodiff.spec.jobs import Outcome, Progress

RESULT = ClipResult(path="/clips/a.mp4", sha256="0" * 64, frames=17)


def step(job: int, attempt: int, i: int) -> StepEvent:
    return StepEvent(job=job, attempt=attempt, i=i, n=4, t=0.5, expert="single", dt_s=1.0, eta_s=1.0)


def test_a_nonce_makes_one_job_however_often_it_is_sent(store: Store) -> None:
    assert {store.submit(request(nonce="form-1")) for _ in range(3)} == {1}


def test_fault_67_two_tabs_that_submit_at_once_make_one_job(store: Store) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(store.submit(request(nonce="x")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


def test_fault_68_fifty_submits_at_once_are_all_kept_and_a_client_has_its_share(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "MAX_QUEUED_PER_CLIENT", 20)

    def browser(name: str) -> None:
        for _ in range(10):
            store.submit(request(), client=name)

    threads = [threading.Thread(target=browser, args=(f"client{n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [job.id for job in store.queue()] == list(range(1, 51))
    for _ in range(10):
        store.submit(request(), client="client0")
    with pytest.raises(RequestError, match="too many jobs"):
        store.submit(request(), client="client0")


def test_jobs_run_in_order_of_id_and_a_move_changes_it(store: Store) -> None:
    for _ in range(4):
        store.submit(request())
    move(store, 4, "first")
    move(store, 1, "down")
    move(store, 2, "last")
    assert [job.id for job in store.queue()] == [4, 1, 3, 2]
    move(store, 99, "first")
    assert [claimed.id for _ in range(4) if (claimed := claim(store))] == [4, 1, 3, 2]


def test_a_paused_queue_starts_nothing(store: Store) -> None:
    store.submit(request())
    store.put("paused", True)
    assert claim(store) is None
    store.put("paused", False)
    assert claim(store) is not None


def test_a_job_on_hold_waits_for_its_memory_and_others_pass(store: Store) -> None:
    first = store.submit(request())
    assert (job := claim(store)) and move_job(store, first, job.attempt, "queued", hold_bytes=100)
    second = store.submit(request())
    assert (job := claim(store, free_bytes=99)) and job.id == second
    assert claim(store, free_bytes=99) is None
    assert (job := claim(store, free_bytes=100)) and job.id == first


def test_a_job_on_hold_rests_before_it_is_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "HOLD_REST_S", 5.0)
    start_s, later_s = 1000.0, 0.0
    store.now = lambda: start_s + later_s
    job = store.submit(request())
    claim(store)
    move_job(store, job, 1, "queued", hold_bytes=100)
    assert claim(store) is None and claim(store, free_bytes=200) is None
    later_s = 5.0
    assert claim(store) is not None


def test_words_of_an_earlier_attempt_change_nothing(store: Store) -> None:
    job = store.submit(request())
    claim(store)
    move_job(store, job, 1, "queued")
    claim(store)
    assert not record_event(store, step(job, 1, 3), Progress(phase="denoise", step=3, of=4, eta_s=1))
    assert not move_job(store, job, 1, "failed")
    assert not finish_job(store, job, 1, RESULT)
    assert store.job(job).state == "running"
    assert finish_job(store, job, 2, RESULT)
    assert not finish_job(store, job, 2, RESULT)


def test_progress_is_one_row_whose_number_grows(store: Store) -> None:
    job = store.submit(request())
    claim(store)
    for i in range(1, 5):
        record_event(store, step(job, 1, i), Progress(phase="denoise", step=i, of=4, eta_s=1.0))
    [(seq, event)] = store.events(job)
    assert event.type == "step" and event.i == 4
    assert store.events(job, after=seq) == []
    record_event(store, step(job, 1, 4))
    assert store.events(job, after=seq)
    assert store.job(job).progress == Progress(phase="denoise", step=4, of=4, eta_s=1.0)


def test_the_newest_preview_is_at_hand_while_the_job_runs(store: Store) -> None:
    job = store.submit(request())
    claim(store)
    for jpeg in ("AAAA", "iVBO"):
        record_event(store, PreviewEvent(job=job, attempt=1, jpeg=jpeg, i=1))
    assert [event.jpeg for _, event in store.events(job) if event.type == "preview"] == ["iVBO"]
    finish_job(store, job, 1, RESULT)
    assert store.events(job) == []


def test_rows_that_another_version_wrote_still_open(store: Store) -> None:
    job = store.submit(request(seed=7))
    claim(store)
    fields = {**json.loads(request(seed=7).model_dump_json()), "dropped_since": 1}
    with store.write() as db:
        old = (json.dumps(fields), json.dumps({"levers": "older"}), json.dumps({"code": "oom", "got": 5}))
        db.execute("UPDATE job SET request = ?, plan = ?, error = ?", old)
        insert = "INSERT INTO event (job, attempt, type, t_s, at_s, fields) VALUES (1, 1, ?, 0, 0, ?)"
        db.execute(insert, ("notice", json.dumps({"key": "spill", "text": "x", "numbers": {}, "added": 2})))
        db.execute(insert, ("rumour", "{}"))
    row = store.job(job)
    assert (row.request.seed, row.request.model, row.plan) == (7, "demo", None)
    assert row.error is not None and row.error.code == "oom"
    assert [event.type for _, event in store.events(job)] == ["notice"]


def test_a_store_that_is_damaged_under_us_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(50):
        store.submit(request("x" * 4000))
    store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    data = bytearray((tmp_path / database.DATABASE).read_bytes())
    data[8192:] = b"\x5a" * (len(data) - 8192)
    (tmp_path / database.DATABASE).write_bytes(data)
    with pytest.raises(FileError, match="damaged"):
        Store(tmp_path).jobs(1000)


def test_fault_69_over_never_changes_again(store: Store) -> None:
    job = store.submit(request())
    claim(store)
    assert store.cancel(job) == "running"  # the worker hears of it at its next step
    assert store.job(job).ask == "cancel"
    finish_job(store, job, 1, RESULT)
    for _ in range(2):
        assert store.cancel(job) == "done"
    assert not move_job(store, job, 1, "queued")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["submit", "cancel", "claim", "finish", "queued", "parked", "failed", "retry"]), max_size=30
    )
)
def test_fault_69_any_order_of_calls_keeps_every_job_and_its_last_word(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / database.DATABASE).unlink(missing_ok=True)
    store = Store(tmp_path)
    over: dict[int, str] = {}
    for call in calls:
        jobs = store.jobs()
        last = jobs[0] if jobs else None
        if call == "submit":
            store.submit(request())
        elif call == "claim":
            claim(store)
        elif last and call == "finish":
            finish_job(store, last.id, last.attempt, RESULT)
        elif last and call in ("queued", "parked", "failed"):
            move_job(store, last.id, last.attempt, call)  # type: ignore[arg-type]
        elif last and call == "cancel":
            store.cancel(last.id)
        elif last and call == "retry" and (last.over or last.state == "parked"):
            store.retry(last.id)
        now = {job.id: job.state for job in store.jobs() if job.over}
        assert over.items() <= now.items()
        over = now  # type: ignore[assignment]
    store.close()


def test_retry_of_a_parked_job_keeps_its_row_and_of_one_that_is_over_makes_a_child(store: Store) -> None:
    job = store.submit(request(nonce="n"))
    claim(store)
    move_job(store, job, 1, "parked", strikes={"oom": 3}, cap_bytes=5, error=JobError(code="oom"))
    assert store.retry(job, request(num_frames=9)) == job
    again = store.job(job)
    assert (again.state, again.strikes, again.cap_bytes, again.error) == ("queued", {}, None, None)
    assert (again.request.num_frames, again.nonce) == (9, "n")
    with pytest.raises(RequestError, match="is queued"):
        store.retry(job)
    store.cancel(job)
    child = store.job(store.retry(job))
    assert (child.id, child.parent, child.state) == (2, 1, "queued")


def test_fault_70_a_running_job_is_not_deleted(store: Store) -> None:
    job = store.submit(request())
    claim(store)
    assert not store.delete(job)
    finish_job(store, job, 1, RESULT)
    assert store.delete(job)
    with pytest.raises(RequestError, match="no such job"):
        store.job(job)


def test_controls_are_handed_out_once_and_answered(store: Store) -> None:
    asked = store.ask("restart", by="page")
    assert store.take_controls() == [(asked, "restart")]
    assert store.take_controls() == []
    assert store.outcome(asked) is None
    store.answer(asked, Outcome(ok=True))
    assert store.outcome(asked) == Outcome(ok=True)


def test_submit_and_a_look_at_the_queue_cost_no_more_at_10_000_jobs_and_a_job_8_kb(tmp_path: Path) -> None:
    """Beside a store of fifty jobs in the same run: three times, for the noise of the disk, is far below 200."""
    (tmp_path / "few").mkdir()
    few, store = Store(tmp_path / "few"), Store(tmp_path)
    few.submit_all([(request(), None)] * 50)
    row = request(prompt="a red circle moves right, " * 8).model_dump_json()
    with store.write() as db:
        db.executemany(
            "INSERT INTO job (nonce, state, place, request, plan, created_s) VALUES (?, ?, ?, ?, ?, 0)",
            ((f"n{i}", "done" if i % 2 else "queued", i, row, json.dumps({"plan": row * 4})) for i in range(10_000)),
        )

    def least_s(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(20):
            start_s = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start_s)
        return min(taken)

    assert least_s(lambda: store.submit(request())) < 3 * least_s(lambda: few.submit(request()))
    assert least_s(lambda: store.jobs(50)) < 3 * least_s(lambda: few.jobs(50))
    store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    assert store.path.stat().st_size / 10_000 < 8192
    assert len(store.jobs(50)) == 50
    store.close()
    few.close()


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; sys.path.insert(0, 'tests'); from supervisor.bench import request\n"
        "from turbodiff.jobs.store import Store; from pathlib import Path\n"
        f"store = Store(Path({str(tmp_path)!r}))\n"
        "for i in range(20): store.submit(request())\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert len(Store(tmp_path).queue()) == 20


def test_fault_39_a_log_cut_anywhere_opens_as_a_valid_beginning(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(30):
        store.submit(request())
    wal = Path(f"{store.path}-wal").read_bytes()
    main = store.path.read_bytes()
    for share in range(1, 20):
        folder = tmp_path / str(share)
        folder.mkdir()
        (folder / database.DATABASE).write_bytes(main)
        cut = wal[: len(wal) * share // 20] + (b"\xff" * 100 if share % 3 == 0 else b"")
        (folder / f"{database.DATABASE}-wal").write_bytes(cut)
        again = Store(folder)
        assert again.rows("PRAGMA quick_check")[0][0] == "ok"
        ids = [job.id for job in again.queue()]
        assert ids == list(range(1, len(ids) + 1))
        again.close()
    store.close()


def test_fault_40_a_full_disk_is_an_error_with_words_and_the_store_stays_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.submit(request())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{store.path}-wal").stat().st_size + 4096, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            for _ in range(50):
                store.submit(request("x" * 4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    after = store.submit(request())
    assert store.rows("PRAGMA quick_check")[0][0] == "ok"
    assert store.job(after).state == "queued"
    store.close()


def test_fault_42_where_wal_cannot_work_the_journal_is_delete(tmp_path: Path) -> None:
    class NoSharedMemory(sqlite3.Connection):
        def execute(self, sql: str, *args: object) -> sqlite3.Cursor:  # type: ignore[override]
            if sql == "PRAGMA journal_mode = WAL":
                raise sqlite3.OperationalError("locking protocol")
            return super().execute(sql, *args)  # type: ignore[arg-type]

    db = sqlite3.connect(tmp_path / "a.db", factory=NoSharedMemory, isolation_level=None)
    assert database.set_journal_mode(db) == "delete"
    db.close()


def test_fault_42_network_file_systems_are_recognised_by_their_mount() -> None:
    mounts = "/dev/sda / ext4 rw 0 0\nC: /mnt/c 9p rw 0 0\nnas:/x /home/me/my\\040files nfs4 rw 0 0\n"
    assert file_system(Path("/home/me/state/a.db"), mounts) == "ext4"
    assert file_system(Path("/mnt/c/Users/me/a.db"), mounts) == "9p"
    assert file_system(Path("/home/me/my files/a.db"), mounts) == "nfs4"
    odd = mounts + " /no/source tmpfs rw 0 0\nhalf /line\nnas:/y /home/\udcff\\011\xa0 nfs rw 0 0\n"
    assert file_system(Path("/home/\udcff\t\xa0/a.db"), odd) == "nfs"
    assert file_system(Path("/no/source/a.db"), odd) == "tmpfs"
    db = sqlite3.connect(":memory:", isolation_level=None)
    assert database.set_journal_mode(db, "9p") != "wal"
    db.close()


def test_a_store_in_a_folder_that_takes_no_file_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    store = Store(folder)
    job = store.submit(request())
    store.close()
    mounted = subprocess.run(["mount", "--bind", folder, folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting takes root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        store = Store(folder)
        assert store.job(job).state == "queued"
        with pytest.raises(OutputError):
            store.submit(request())
        store.close()
        for words in (["jobs", "list"], ["seeds", "list"], ["gpu"], ["plan", "a red circle moves right"]):
            command = [sys.executable, "-m", "turbodiff.cli", *words]
            environment = os.environ | {"TURBODIFF_STATE": str(folder), "HOME": str(folder)}
            ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
            assert ran.returncode == 0 and "Traceback" not in ran.stderr, (words, ran.stderr)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_fault_43_a_newer_store_is_refused_and_untouched(tmp_path: Path) -> None:
    Store(tmp_path).close()
    db = sqlite3.connect(tmp_path / database.DATABASE)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = (tmp_path / database.DATABASE).read_bytes()
    with pytest.raises(FileError, match="newer turbodiff"):
        Store(tmp_path)
    assert (tmp_path / database.DATABASE).read_bytes() == before


def test_fault_43_a_damaged_store_says_so(tmp_path: Path) -> None:
    (tmp_path / database.DATABASE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(FileError, match="damaged"):
        Store(tmp_path)


def test_fault_57_seeds_beyond_2_53_never_reach_the_store(store: Store) -> None:
    job = store.submit(request(seed=2**53 - 1))
    assert store.job(job).request.seed == 9007199254740991
    with pytest.raises(RequestError):
        store.submit(request(seed=2**53))


def test_what_runs_is_seen_however_many_jobs_wait(store: Store) -> None:
    jobs = [store.submit(request()) for _ in range(60)]
    running = claim(store)
    assert running is not None and running.id == jobs[0]
    store.cancel(jobs[1])
    move(store, jobs[-1], "first")
    seen, waiting = store.overview(10)
    assert waiting == 58 and [job.id for job in seen] == [60, *range(11, 0, -1)]
    assert [job.state for job in seen if job.id in jobs[:2]] == ["cancelled", "running"]


def test_a_disk_that_refuses_the_journal_queues_nothing_and_leaves_no_file(store: Store, tmp_path: Path) -> None:
    store.submit(request(nonce="before"))
    asked = [(request(nonce=nonce), None) for nonce in ("one", "two", "before")]
    (entry_path(tmp_path, "two")).mkdir()  # a folder where the second file belongs
    with pytest.raises(OutputError):
        store.submit_all(asked)
    assert [job.nonce for job in store.queue()] == ["before"]
    assert [entry.nonce for _, entry, _ in entries(tmp_path) if entry] == ["before"]
    entry_path(tmp_path, "two").rmdir()
    assert store.submit_all(asked)[2] == 1 and len(store.queue()) == 3


def held(store: Store) -> sqlite3.Connection:
    """Another program that holds the database."""
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    return other


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "PATIENCE_S", 0.1)


@pytest.mark.usefixtures("hasty")
def test_a_job_of_a_minute_in_which_another_program_holds_the_store_is_accepted_under_its_number(store: Store) -> None:
    first = store.submit(request("first"))
    other = held(store)
    late = store.submit_all([(request("second", nonce="b"), None), (request("third"), None)])
    assert [first, *late] == [1, 2, 3]
    assert store.submit(request("second", nonce="b")) == 2  # sent again
    assert (store.job(3).state, store.job(3).request.prompt) == ("queued", "third")
    seen, waiting = store.overview()
    assert ([job.id for job in seen], waiting) == ([3, 2, 1], 3)
    with pytest.raises(OutputError, match="another program holds the job store"):
        store.cancel(first)
    other.execute("ROLLBACK")
    assert store.submit(request("fourth")) == 4  # those that waited come first
    assert [job.request.prompt for job in store.queue()] == ["first", "second", "third", "fourth"]
    assert store.take_in() == [] and waiting_jobs(store.path.parent) == []
    assert {entry.id for _, entry, _ in entries(store.path.parent) if entry} == {1, 2, 3, 4}


@pytest.mark.usefixtures("hasty")
def test_jobs_that_wait_for_the_store_survive_a_kill_and_a_refused_batch_leaves_none(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "MAX_QUEUED_PER_CLIENT", 3)
    other = held(store)
    with pytest.raises(RequestError, match="too many jobs"):
        store.submit_all([(request(), None)] * 4, client="10.0.0.9")
    assert waiting_jobs(store.path.parent) == [] and not list(entries(store.path.parent))
    assert store.submit(request("mine")) == 1
    other.execute("ROLLBACK")
    again = Store(store.path.parent)  # as the supervisor's
    assert again.take_in() == [1] and again.job(1).request.prompt == "mine"
    assert again.submit(request("next")) == 2
    again.close()


@pytest.mark.usefixtures("hasty")
def test_two_processes_tell_no_number_twice_while_the_store_is_held(store: Store) -> None:
    beside = Store(store.path.parent)
    other = held(store)
    told: list[int] = []
    threads = [
        threading.Thread(target=lambda one=one: told.append(one.submit(request()))) for one in (store, beside) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.execute("ROLLBACK")
    assert sorted(told) == list(range(1, 9)) == beside.take_in()
    beside.close()
