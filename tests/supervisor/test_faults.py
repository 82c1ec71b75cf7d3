"""Rows of the fault table that need a supervisor; the number in a name is the row."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from supervisor.bench import SCRIPTED, Bench, request, scripted
from turbodiff.diagnostics.logs import tail
from turbodiff.gpu.process_identity import start_ticks
from turbodiff.jobs.store import Store
from turbodiff.spec.errors import StateInUseError
from turbodiff.supervisor import attempt_monitor as runnings
from turbodiff.supervisor import slots as slots
from turbodiff.supervisor import watchdog, web_process
from turbodiff.supervisor.ownership import is_held

Make = Callable[..., Bench]
ROOT = Path(__file__).parents[2]


def running(bench: Bench, job: int) -> Callable[[], bool]:
    """Whether the job has made a step."""
    return lambda: (now := bench.store.job(job).progress) and now.step >= 1


def test_fault_13_out_of_memory_runs_again_in_a_new_process_under_a_cap(bench: Bench) -> None:
    bench.turn_until(lambda: bench.slot.free)
    first = bench.slot.worker.pid
    job = bench.run(scripted({"error": {"code": "oom", "what": "OOM: the device ran out"}}, {}))
    assert (job.state, job.attempt, job.strikes) == ("done", 2, {"oom": 1})
    assert bench.slot.worker.pid != first


def test_fault_13_an_abort_within_an_allocation_runs_again_under_a_cap(bench: Bench) -> None:
    said = "  what():  CUDA driver error: out of memory"
    job = bench.run(scripted({"print": said, "die": "SIGABRT"}, {}))
    assert (job.state, job.attempt, job.strikes) == ("done", 2, {"oom": 1})


def test_fault_15_out_of_memory_at_every_rung_parks_the_job_and_the_worker_is_well(bench: Bench) -> None:
    job = bench.run(scripted({"error": {"code": "oom", "what": "OOM", "got": "2 GiB"}}))
    assert (job.state, job.attempt) == ("parked", 3)
    assert job.error is not None and job.error.got == "2 GiB"
    assert bench.run(request()).state == "done"


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGABRT", "exit 3"])
def test_fault_21_a_job_that_crashes_the_worker_stops_after_two_and_others_run_on(bench: Bench, how: str) -> None:
    poison = bench.store.submit(scripted({"die": how}))
    honest = bench.store.submit(scripted({}))
    bench.turn_until(lambda: bench.store.job(poison).over and bench.store.job(honest).over)
    assert (bench.store.job(poison).state, bench.store.job(poison).attempt) == ("failed", 2)
    assert bench.store.job(honest).state == "done"


def test_fault_21_a_killed_worker_is_replaced_and_its_job_runs_again(bench: Bench) -> None:
    job = bench.store.submit(scripted({"steps": 100, "dt_s": 0.1}, {}))
    bench.turn_until(running(bench, job))
    os.kill(bench.slot.worker.pid, signal.SIGKILL)
    bench.turn_until(lambda: bench.store.job(job).over)
    assert (bench.store.job(job).state, bench.store.job(job).strikes) == ("done", {"killed": 1})


def test_fault_22_an_exit_without_a_result_is_a_crash(bench: Bench) -> None:
    job = bench.run(scripted({"die": "exit 0"}, {}))
    assert (job.state, job.strikes) == ("done", {"crash": 1})


def test_fault_26_a_worker_that_never_starts_is_given_up_and_a_restart_tries_again(
    make_bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "BACKOFF_S", (0.01,) * 6)
    bench = make_bench(worker_argv=(*SCRIPTED, "--die-at-start", "exit 1"))
    job = bench.store.submit(request())
    bench.turn_until(lambda: bench.slot.broken)
    assert bench.store.job(job).state == "queued"
    text = bench.log_text()
    assert "gave up after 5 starts" in text and text.count("Traceback: no such module") == 5
    assert bench.store.fact("worker0")["state"] == "broken"
    bench.supervisor.context.worker_argv = SCRIPTED
    bench.store.ask("restart")
    bench.turn_until(lambda: bench.store.job(job).state == "done")


def test_fault_26_a_worker_that_dies_right_after_its_hello_is_given_up_too(
    make_bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "BACKOFF_S", (0.01,) * 6)
    hello = '{"v": 1, "type": "hello", "fields": {"pid": 1}}'
    bench = make_bench(worker_argv=(sys.executable, "-c", f"import os, sys; os.write(int(sys.argv[2]), b'{hello}\\n')"))
    bench.turn_until(lambda: bench.slot.broken)
    assert "ended right after it was ready: exit code 0" in bench.log_text()


def test_fault_21_a_kill_from_outside_at_the_start_is_no_failed_start(bench: Bench) -> None:
    for _ in range(6):
        bench.turn_until(lambda: bench.slot.worker and not bench.slot.worker.wait(0))
        os.kill(bench.slot.worker.pid, signal.SIGKILL)
        bench.turn_until(lambda: bench.slot.worker is None)
    assert not bench.slot.broken and bench.run(request()).state == "done"


@pytest.mark.parametrize("how", ["gil", "spin", "sleep"])
def test_fault_28_29_a_hang_is_dumped_ended_and_repeated_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(watchdog, "STEP_MIN_S", 1.0)
    job = bench.store.submit(scripted({"hang": how}, {}))
    bench.turn_until(lambda: bench.store.job(job).strikes)
    monkeypatch.undo()  # a busy machine may make an honest attempt wait longer than that
    bench.turn_until(lambda: bench.store.job(job).over)
    assert (bench.store.job(job).state, bench.store.job(job).strikes) == ("done", {"stuck": 1})
    text = bench.log_text()
    assert "slow, still alive" in text and "stacks of all threads follow" in text
    assert "in hang" in text  # the stack names the place, even while native code holds the GIL


def test_fault_28_a_second_hang_fails_with_its_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "STEP_MIN_S", 0.5)
    job = bench.run(scripted({"hang": "sleep"}))
    assert job.state == "failed"
    assert job.error is not None and job.error.code == "stuck" and "silent for" in job.error.got


def test_fault_33_a_wall_clock_that_jumps_changes_no_order_and_no_verdict(bench: Bench) -> None:
    times = iter([1e9, -1e6, 4e9, 0.0, 1.0] * 10_000)
    bench.store.now = lambda: next(times)
    jobs = [bench.store.submit(scripted({"steps": 3})) for _ in range(3)]
    bench.turn_until(lambda: all(bench.store.job(job).over for job in jobs))
    assert [job.id for job in bench.store.jobs()] == [3, 2, 1]
    assert {bench.store.job(job).state for job in jobs} == {"done"}


def test_fault_34_nan_latents_run_again_with_the_sturdier_attention(bench: Bench) -> None:
    asked = scripted({"error": {"code": "nan_latents", "what": "not numbers after step 2"}}, {}, attention="sage")
    job = bench.run(asked)
    assert (job.state, job.strikes, job.overrides) == ("done", {"nan": 1}, {"attention": "dense"})
    assert "attention sage -> dense" in bench.run_log_text()


@pytest.mark.parametrize("damage", ["truncate", "empty", "missing"])
def test_fault_37_a_clip_that_is_not_whole_is_never_done(bench: Bench, damage: str) -> None:
    job = bench.run(scripted({"damage": damage}))
    assert not list(bench.outputs.glob("2*/*.mp4"))
    assert (job.state, job.attempt, job.strikes) == ("failed", 2, {"verify": 2})
    again = bench.run(scripted({"damage": damage}, {}))
    assert (again.state, again.attempt) == ("done", 2)


@pytest.mark.parametrize("at", ["publish", "sidecar", "linked"])
def test_fault_38_a_worker_that_dies_around_the_commit_leaves_one_clip(bench: Bench, at: str) -> None:
    job = bench.run(scripted({"die": "SIGSEGV", "die_at": at}, {}))
    assert job.state == "done" and job.result is not None
    assert job.attempt == (1 if at == "linked" else 2)  # a clip that has its name is adopted
    assert [str(path) for path in bench.outputs.glob("*/*.mp4") if ".partial" not in path.parts] == [job.result.path]


def test_fault_41_a_deleted_output_folder_is_made_again(bench: Bench) -> None:
    bench.run(request())
    shutil.rmtree(bench.outputs)
    assert bench.run(request()).state == "done"


def test_fault_44_a_second_supervisor_names_the_first_and_harms_nothing(bench: Bench) -> None:
    bench.turn_until(lambda: bench.slot.free)
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from turbodiff.supervisor.supervisor import Supervisor; from turbodiff.spec.errors import TurbodiffError\n"
        f"try: Supervisor(Path({str(bench.state)!r}), Path({str(bench.outputs)!r}))\n"
        "except TurbodiffError as error: print(error); sys.exit(error.exit_code)"
    )
    second = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == StateInUseError.exit_code
    assert f"held by pid {os.getpid()}" in second.stdout
    assert bench.slot.worker.exit_status() is None
    assert is_held(bench.state)
    assert "supervisor, pid" in bench.log_text()  # the second start did not truncate the first one's log


def test_fault_66_a_job_needs_no_page(bench: Bench) -> None:
    assert bench.supervisor.web is None
    assert bench.run(request()).state == "done"


def test_fault_69_a_running_job_is_cancelled_at_its_next_step(bench: Bench) -> None:
    job = bench.store.submit(scripted({"steps": 100, "dt_s": 0.05}))
    bench.turn_until(running(bench, job))
    pid = bench.slot.worker.pid
    bench.store.cancel(job)
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).state == "cancelled"
    assert bench.run(request()).state == "done" and bench.slot.worker.pid == pid


def test_fault_69_a_worker_that_does_not_hear_a_cancel_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runnings, "CANCEL_GRACE_S", 0.3)
    job = bench.store.submit(scripted({"steps": 1000, "dt_s": 0.05, "deaf": True}))
    bench.turn_until(running(bench, job))
    bench.store.cancel(job)
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).state == "cancelled"


def test_stop_and_decode_makes_a_clip_of_what_there_is(bench: Bench) -> None:
    job = bench.store.submit(scripted({"steps": 1000, "dt_s": 0.02}))
    bench.turn_until(running(bench, job))
    bench.store.stop_and_decode(job)
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).state == "done"


def test_late_words_of_an_earlier_attempt_are_dropped(bench: Bench) -> None:
    job = bench.run(scripted({"late": True}))
    assert job.result is not None and job.result.path != "/nowhere.mp4"
    assert (job.state, job.attempt, job.strikes) == ("done", 1, {})


def test_an_event_that_nobody_understands_is_a_line_in_the_log(bench: Bench) -> None:
    job = bench.run(scripted({"odd": True}))
    assert job.state == "done"
    bench.turn_until(lambda: "step event not understood: i: Field required" in bench.log_text())


def test_a_job_that_waits_for_memory_charges_nothing(bench: Bench) -> None:
    job = bench.run(scripted({"wait": 5 << 30}, {}))
    assert (job.state, job.strikes, job.attempt) == ("done", {}, 2)
    assert "waits for 5.0 GiB" in bench.run_log_text()


def test_a_stopped_worker_is_named_as_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "QUIET_S", 1.0)
    job = bench.store.submit(scripted({"steps": 20, "dt_s": 0.05}))
    bench.turn_until(running(bench, job))
    pid = bench.slot.worker.pid
    os.kill(pid, signal.SIGSTOP)
    bench.turn_until(lambda: "SIGSTOP" in bench.log_text())
    assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
    os.kill(pid, signal.SIGCONT)
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).state == "done"


def test_a_worker_is_replaced_after_twenty_jobs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "RECYCLE_JOBS", 2)
    pids = []
    for _ in range(3):
        bench.turn_until(lambda: bench.slot.free)
        pids.append(bench.slot.worker.pid)
        bench.run(request())
    assert pids[0] == pids[1] != pids[2]


def test_two_cards_run_two_jobs_at_once(make_bench: Make) -> None:
    bench = make_bench(devices=("GPU-a", "GPU-b"))
    jobs = [bench.store.submit(scripted({"steps": 20, "dt_s": 0.05})) for _ in range(2)]
    bench.turn_until(lambda: all(bench.store.job(job).state == "running" for job in jobs))
    assert {bench.store.job(job).slot for job in jobs} == {0, 1}
    environments = [Path(f"/proc/{slot.worker.pid}/environ").read_bytes() for slot in bench.supervisor.slots]
    assert [b"CUDA_VISIBLE_DEVICES=GPU-a" in environments[0], b"CUDA_VISIBLE_DEVICES=GPU-b" in environments[1]] == [
        True
    ] * 2
    bench.turn_until(lambda: all(bench.store.job(job).over for job in jobs))


def test_a_store_that_cannot_be_written_for_a_while_loses_no_word(bench: Bench) -> None:
    job = bench.store.submit(scripted({"steps": 5, "dt_s": 0.1}))
    bench.turn_until(running(bench, job))
    other = sqlite3.connect(bench.store.path, isolation_level=None)
    bench.store.rows("PRAGMA busy_timeout = 10")
    other.execute("BEGIN IMMEDIATE")
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        bench.supervisor.tick(0.02)
    other.execute("COMMIT")
    other.close()
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).state == "done"
    assert "another program holds the job store" in bench.log_text(), bench.log_text()


def test_fault_24_a_killed_page_comes_back_and_the_job_runs_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_process, "BACKOFF_S", (0.05,) * 6)
    page = (sys.executable, "-c", "import time; print('INFO:     page is up', flush=True); time.sleep(60)")
    bench.supervisor.web = web_process.WebProcess(page, bench.supervisor.context)
    job = bench.store.submit(scripted({"steps": 30, "dt_s": 0.05}))
    bench.turn_until(running(bench, job))
    first = bench.supervisor.web.child.pid  # type: ignore[union-attr]
    os.kill(first, signal.SIGKILL)
    bench.turn_until(lambda: bench.supervisor.web.child is not None and bench.supervisor.web.child.pid != first)  # type: ignore[union-attr]
    bench.turn_until(lambda: bench.store.job(job).over)
    assert (bench.store.job(job).state, bench.store.job(job).attempt) == ("done", 1)
    assert bench.log_text().count("[INFO] web page is up") == 2


def test_fault_24_a_page_that_is_stopped_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_process, "STOPPED_S", 0.2)
    monkeypatch.setattr(web_process, "BACKOFF_S", (0.05,) * 6)
    bench.supervisor.web = web_process.WebProcess(("sleep", "60"), bench.supervisor.context)
    first = bench.supervisor.web.child.pid  # type: ignore[union-attr]
    os.kill(first, signal.SIGSTOP)
    bench.turn_until(lambda: start_ticks(first) is None)


@pytest.mark.parametrize("code", [2, 4])
def test_fault_45_a_page_that_finds_its_port_taken_ends_the_app_with_its_code(bench: Bench, code: int) -> None:
    assert bench.supervisor.serve((sys.executable, "-c", f"raise SystemExit({code})")) == code


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130), (signal.SIGQUIT, 131)],
)
def test_fault_81_a_stop_puts_the_job_back_and_leaves_nobody(
    tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from supervisor.bench import SCRIPTED; from turbodiff.supervisor.supervisor import Supervisor\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "supervisor = Supervisor(folder / 'state', folder / 'outputs', worker_argv=SCRIPTED, working=folder,"
        " sample=lambda: None)\n"
        "sys.exit(supervisor.serve((sys.executable, '-c', 'import time; time.sleep(60)')))"
    )
    store = Store(tmp_path / "state")
    job = store.submit(scripted({"steps": 1000, "dt_s": 0.05}))
    app = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a suite in the background ignores SIGINT
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not ((now := store.job(job).progress) and now.step):
            assert time.monotonic() < deadline, tail(tmp_path / "webui_startup_latest.log")
            time.sleep(0.05)
        pid = store.fact("worker0")["pid"]
        app.send_signal(number)
        assert app.wait(60) == exit_code
    finally:
        app.kill()
        app.wait()
    assert start_ticks(pid) is None
    assert (store.job(job).state, store.job(job).strikes) == ("queued", {})
    store.close()


def test_fault_32_a_worker_that_sigkill_does_not_end_is_not_replaced(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.turn_until(lambda: bench.slot.free)
    real = bench.slot.worker
    monkeypatch.setattr(real, "stop", lambda *patience: None)  # state D: the driver holds it
    control = bench.store.ask("restart")
    bench.turn_until(lambda: bench.store.outcome(control))
    outcome = bench.store.outcome(control)
    assert outcome is not None and not outcome.ok and "reboot" in outcome.text
    for _ in range(10):
        bench.supervisor.tick(0.01)
    assert bench.slot.worker is None and bench.slot.broken
    assert "a reboot is needed" in bench.log_text()
    os.kill(real.pid, signal.SIGKILL)
    real.process.wait()


def test_fault_80_a_c_locale_and_a_folder_with_spaces_and_letters_of_any_script_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    bench = Bench(tmp_path / "我的 视频 folder")
    try:
        job = bench.run(scripted({"print": "加载模型 Ω"}))
        assert job.state == "done"
        assert "加载模型 Ω" in bench.log_text()
    finally:
        bench.supervisor.close()


def test_an_idle_worker_that_is_stopped_does_not_hold_up_the_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "SILENT_S", 2.0)
    monkeypatch.setattr(slots, "TERM_S", 0.2)
    bench.turn_until(lambda: bench.slot.free)
    stopped = bench.slot.worker.pid
    os.kill(stopped, signal.SIGSTOP)
    bench.turn_until(lambda: bench.slot.worker is not None and bench.slot.worker.pid != stopped)
    assert bench.run(request()).state == "done" and "silent" in bench.log_text()
