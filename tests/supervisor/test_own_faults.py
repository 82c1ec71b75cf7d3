"""What happens where the supervisor itself fails: the cause is parked, the app goes on."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from supervisor.bench import Bench, request, scripted
from turbodiff.jobs import measurements
from turbodiff.spec.errors import OutputError
from turbodiff.supervisor import supervisor as supervisors
from turbodiff.supervisor import web_process
from turbodiff.supervisor.attempt_monitor import AttemptMonitor


class OwnFault(Exception):
    """A mistake that nobody thought of."""


def test_a_job_that_the_supervisor_fails_at_is_parked_and_the_next_one_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisors, "FAULT_PATIENCE_S", 0.5)
    real = AttemptMonitor.on_event

    def on_event(self: AttemptMonitor, event: Any) -> None:
        if self.job.id == 1 and event.type != "beat":
            raise OwnFault("of the loop")
        real(self, event)

    monkeypatch.setattr(AttemptMonitor, "on_event", on_event)
    job = bench.run(scripted({"steps": 3}))
    assert job.state == "parked" and job.error is not None
    assert (job.error.code, job.error.got) == ("supervisor_fault", "OwnFault: of the loop")
    assert bench.run(request()).state == "done"
    assert bench.log_text().count("slot 0: of the loop") == 1, "said once, not at every turn"


def test_a_job_that_fails_between_its_row_and_its_slot_is_parked_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measurements.usual_seconds

    def usual_seconds(store: Any, job: Any, *where: Any) -> Any:
        if job.id == 1:
            raise OwnFault("of a row")
        return real(store, job)

    monkeypatch.setattr(measurements, "usual_seconds", usual_seconds)
    assert bench.run(request()).state == "parked"
    assert bench.run(request()).state == "done"


def test_a_job_that_runs_nowhere_goes_back_to_the_queue(bench: Bench) -> None:
    job = bench.store.submit(request())
    with bench.store.write() as db:
        db.execute("UPDATE job SET state = 'running', attempt = 1 WHERE id = ?", (job,))
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).state == "done" and bench.store.job(job).strikes == {}


def test_a_full_disk_or_a_locked_store_charges_no_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "FAULT_PATIENCE_S", 0.0)
    job = bench.store.submit(scripted({"steps": 3, "dt_s": 0.05}))
    bench.turn_until(lambda: bench.slot.monitor)
    real, failures = AttemptMonitor.tick, iter(range(20))

    def tick(self: AttemptMonitor, lines: int) -> None:
        if next(failures, None) is not None:
            raise OutputError("the job store cannot be written", code="disk_full")
        real(self, lines)

    monkeypatch.setattr(AttemptMonitor, "tick", tick)
    bench.turn_until(lambda: bench.store.job(job).over)
    assert (bench.store.job(job).state, bench.store.job(job).attempt) == ("done", 1)


def test_a_slot_that_fails_at_every_turn_holds_up_nothing_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def tick() -> None:
        raise OwnFault("of a slot")

    monkeypatch.setattr(bench.slot, "tick", tick)
    bench.supervisor.web = web_process.WebProcess(("sleep", "60"), bench.supervisor.context)
    page = bench.supervisor.web.child.pid  # type: ignore[union-attr]
    os.kill(page, signal.SIGKILL)
    bench.turn_until(lambda: bench.supervisor.web.child is not None and bench.supervisor.web.child.pid != page)  # type: ignore[union-attr]
    control = bench.store.ask("nonsense")
    bench.turn_until(lambda: bench.store.outcome(control))


def test_a_table_of_seeds_that_may_not_be_read_ends_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_if_due(*_: object) -> bool:
        raise PermissionError(13, "Permission denied", "seeds.md")

    monkeypatch.setattr(supervisors, "write_if_due", write_if_due)
    for _ in range(2):
        assert bench.run(request()).state == "done"
    bench.turn_until(lambda: "seeds.md: [Errno 13]" in bench.log_text())


def test_a_worker_that_is_stopped_gets_no_job(bench: Bench) -> None:
    bench.turn_until(lambda: bench.slot.free)
    pid = bench.slot.worker.pid
    os.kill(pid, signal.SIGSTOP)
    job = bench.store.submit(request())
    for _ in range(30):
        bench.supervisor.tick(0.02)
    assert bench.store.job(job).state == "queued"
    os.kill(pid, signal.SIGCONT)
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).attempt == 1


def test_a_second_app_in_the_same_folder_leaves_the_log_of_the_first_alone(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    try:
        first.supervisor.log.say("a line of the first")
        second = supervisors.Supervisor(
            tmp_path / "other", tmp_path / "outputs", working=tmp_path, sample=lambda: None, devices=()
        )
        second.log.say("a line of the second")
        assert second.log.path.parent == tmp_path / "other"
        assert "a line of the first" in first.log_text() and "of the second" not in first.log_text()
        first.supervisor.log.path.unlink()
        first.supervisor.log._checked_s = 0.0
        first.supervisor.log.say("in a new file")
        third = supervisors.Supervisor(
            tmp_path / "third", tmp_path / "outputs", working=tmp_path, sample=lambda: None, devices=()
        )
        assert third.log.path.parent == tmp_path / "third", "the file that took the place of the first is held, too"
        second.close()
        third.close()
    finally:
        first.supervisor.close()
