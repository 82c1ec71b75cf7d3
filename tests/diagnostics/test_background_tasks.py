"""Errands: one process each, told apart by their names."""

import sys
import time

from turbodiff.diagnostics.background_tasks import errand, start

SPEAKER = (sys.executable, "-c", "import time; print('selftest plan: ok, 1 MiB', flush=True); time.sleep(1.5)")


def test_an_errand_runs_once_and_what_it_said_stays(tmp_path):
    assert errand(tmp_path, "selftest") == (False, ())
    start(tmp_path, "selftest", SPEAKER)
    pid = (tmp_path / "selftest.pid").read_text()
    start(tmp_path, "selftest", SPEAKER)
    assert (tmp_path / "selftest.pid").read_text() == pid
    end_s = time.monotonic() + 30
    while errand(tmp_path, "selftest").running and time.monotonic() < end_s:
        time.sleep(0.05)
    assert errand(tmp_path, "selftest") == (False, ("selftest plan: ok, 1 MiB",))
