"""Background tasks: one process each, told apart by their names."""

import sys
import time

from turbodiff.diagnostics.background_tasks import background_task, start_task

SPEAKER = (sys.executable, "-c", "import time; print('selftest plan: ok, 1 MiB', flush=True); time.sleep(1.5)")


def test_a_task_runs_once_and_what_it_printed_stays(tmp_path):
    assert background_task(tmp_path, "selftest") == (False, ())
    start_task(tmp_path, "selftest", SPEAKER)
    pid = (tmp_path / "selftest.pid").read_text()
    start_task(tmp_path, "selftest", SPEAKER)
    assert (tmp_path / "selftest.pid").read_text() == pid
    end_s = time.monotonic() + 30
    while background_task(tmp_path, "selftest").running and time.monotonic() < end_s:
        time.sleep(0.05)
    assert background_task(tmp_path, "selftest") == (False, ("selftest plan: ok, 1 MiB",))


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    start_task(tmp_path, "talk", (sys.executable, "-c", "print('x' * 20_000 + chr(10) + 'the end')"))
    end_s = time.monotonic() + 30
    while background_task(tmp_path, "talk").running and time.monotonic() < end_s:
        time.sleep(0.05)
    found = background_task(tmp_path, "talk")
    assert found.words == "the end" and len(found.lines[0]) < 10_000
