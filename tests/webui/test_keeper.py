"""The process that stays beside the supervisor: starts it again, hands signals on, reaps, also as PID 1."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.webui.conftest import answers, free_port
from turbodiff.diagnostics.logs import tail
from turbodiff.jobs.store import Store
from turbodiff.spec.request import make_request

APP = Path(__file__).resolve().parents[2] / "webui" / "app.py"
LOG = "webui_startup_latest.log"
KEEP = """
import sys
from webui import keeper
keeper.SILENT_S = 1.0
sys.exit(keeper.keep([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]))
"""
# says in a file that it started, for the how-manieth time, then does what it is told the first and every later time
CHILD = """
import faulthandler, os, signal, sys, time
faulthandler.register(signal.SIGUSR1)
starts = open(sys.argv[1], "a+")
starts.write(f"{os.getpid()} {os.environ.get('TURBODIFF_LAST_END', '')}\\n")
starts.flush()
starts.seek(0)
first = len(starts.readlines()) == 1
os.write(int(os.environ["TURBODIFF_BEAT_FD"]), b".")
exec(sys.argv[2] if first else sys.argv[3])
"""


def keep(tmp_path, first, later="sys.exit(0)"):
    command = [sys.executable, "-c", KEEP, CHILD, str(tmp_path / "starts"), first, later]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals)


def hear_signals():
    """A shell starts what it runs in the background with the first two ignored, nohup with the third; children inherit
    that."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def starts(tmp_path):
    path = tmp_path / "starts"
    return [line.partition(" ") for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition, patience_s=60.0):
    end_s = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("dies", "how"),
    [("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL"), ("sys.exit(70)", "an error of its own")],
)
def test_a_supervisor_that_dies_is_started_again_and_hears_how_the_last_one_ended(tmp_path, dies, how):
    process = keep(tmp_path, dies, "sys.exit(3)")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3 and f"ended by {how}" in said
    assert [last for *_, last in starts(tmp_path)] == ["", how]


@pytest.mark.parametrize("code", [0, 1, 2, 4, 130])
def test_an_end_that_is_meant_is_the_end(tmp_path, code):
    process = keep(tmp_path, f"sys.exit({code})")
    process.communicate(timeout=60)
    assert process.returncode == code and len(starts(tmp_path)) == 1


def test_a_supervisor_that_no_longer_turns_is_replaced_and_its_stacks_are_shown(tmp_path):
    process = keep(tmp_path, "time.sleep(600)")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and len(starts(tmp_path)) == 2
    assert "no longer turns" in said and 'File "<string>", line' in said


def test_one_that_keeps_dying_is_given_up(tmp_path):
    process = keep(tmp_path, *["os.kill(os.getpid(), signal.SIGKILL)"] * 2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 70 and len(starts(tmp_path)) == 5 and "given up" in said


def test_one_whose_state_folder_is_removed_again_and_again_is_not_given_up(tmp_path):
    again = "starts.seek(0); sys.exit(75 if len(starts.readlines()) < 8 else 3)"
    process = keep(tmp_path, again, again)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3 and len(starts(tmp_path)) == 8 and "given up" not in said
    assert starts(tmp_path)[-1][2] == "the loss of its state folder or job store"


WAITS = """
signal.signal({n}, lambda *_: sys.exit(42))
print("ready", file=starts, flush=True)
while True: time.sleep(0.1); os.write(int(os.environ["TURBODIFF_BEAT_FD"]), b".")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_handed_on_and_the_exit_code_comes_back(tmp_path, number):
    process = keep(tmp_path, WAITS.format(n=int(number)))
    wait_until(lambda: len(starts(tmp_path)) == 2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 42


def test_its_own_death_ends_the_supervisor_with_patience(tmp_path):
    process = keep(tmp_path, WAITS.format(n=int(signal.SIGTERM)))
    wait_until(lambda: len(starts(tmp_path)) == 2)
    pid = int(starts(tmp_path)[0][0])
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_whoever_loses_the_parent_is_reaped(tmp_path):
    orphan = "subprocess.Popen(['sh', '-c', 'sleep 0.2 & echo $! >&2'], start_new_session=True).wait()"
    process = keep(tmp_path, f"import subprocess; {orphan}; {WAITS.format(n=int(signal.SIGTERM))}")
    pid = int(process.stderr.readline())
    wait_until(lambda: not psutil.pid_exists(pid))
    process.terminate()
    process.communicate(timeout=60)


class App:
    """`python webui/app.py` as a person starts it, perhaps behind another command."""

    def __init__(self, folder, *before):
        self.folder, self.port = folder, free_port()
        self.store = Store(folder / "state")
        flags = ["--no-browser", "--port", str(self.port), "--state-dir", str(folder / "state"), "--outputs", "outputs"]
        self.process = subprocess.Popen(
            [*before, sys.executable, str(APP), *flags], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def wait(self, condition, patience_s=240.0):
        end_s = time.monotonic() + patience_s
        while not (found := condition()):
            assert time.monotonic() < end_s and self.process.poll() is None, "\n".join(tail(self.folder / LOG, 60))
            time.sleep(0.1)
        return found

    def supervisor(self):
        return (self.store.fact("supervisor") or {}).get("pid")

    def answers(self):
        return answers(f"http://127.0.0.1:{self.port}")

    def end(self):
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.kill()
        self.process.kill()
        self.process.wait()
        self.store.close()


@pytest.mark.slow
def test_a_killed_supervisor_comes_back_with_its_page_and_its_job(tmp_path):
    app = App(tmp_path)
    try:
        app.wait(app.answers)
        first = app.supervisor()
        asked = {"prompt": "a red circle moves right", "sampler": "unipc", "steps": 15, "seed": 1, "num_frames": 5}
        job = app.store.submit(make_request(asked))
        app.wait(lambda: app.store.job(job).progress)
        os.kill(first, signal.SIGKILL)
        app.wait(lambda: app.supervisor() != first and app.answers())
        app.wait(lambda: app.store.job(job).over)
        assert app.store.job(job).state == "done" and app.store.job(job).strikes == {}
        assert any("before this one ended (signal SIGKILL)" in line for line in tail(tmp_path / LOG, 2000))
        app.process.terminate()
        assert app.process.wait(60) == 0
    finally:
        app.process.poll() is None and app.end()


def test_as_the_first_process_of_a_container_it_stops_reaps_and_puts_its_job_back(tmp_path):
    command = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a PID namespace")
    app = App(tmp_path, *command)
    try:
        app.wait(app.answers)
        asked = {"prompt": "a red circle moves right", "sampler": "unipc", "steps": 100, "seed": 1}
        job = app.store.submit(make_request(asked))
        app.wait(lambda: app.store.job(job).progress)
        (first,) = psutil.Process(app.process.pid).children()
        start_s = time.monotonic()
        first.terminate()
        app.process.wait(60)
        print(f"stopped in {time.monotonic() - start_s:.1f} s")
        assert not first.is_running() and not app.answers()
        assert (app.store.job(job).state, app.store.job(job).strikes) == ("queued", {})
    finally:
        app.process.poll() is None and app.end()
