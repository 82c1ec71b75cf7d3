"""A working folder that was removed: one line at the start, and a running app that goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turbodiff.jobs.store import Store
from turbodiff.spec import environment
from turbodiff.spec.environment import child_environment, current_folder
from turbodiff.studio import Studio
from turbodiff.supervisor.supervisor import Supervisor
from turbodiff.weights.folders import model_roots

ROOT = Path(__file__).resolve().parents[2]
GONE = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
STARTS = {
    "plan": ["-m", "turbodiff.cli", "plan", "a red circle"],
    "generate": ["-m", "turbodiff", "generate", "a red circle", "-o", "out.mp4"],
    "gpu": ["-m", "turbodiff.cli", "gpu"],
    "serve": ["-m", "turbodiff.cli", "serve", "--no-browser"],
    "page": [str(ROOT / "webui" / "app.py"), "--no-browser"],
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_in_a_removed_folder_is_one_line(tmp_path, name):
    folder = tmp_path / "gone"
    folder.mkdir()
    command = ["bash", "-c", GONE, "bash", folder, sys.executable, *STARTS[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "getcwd" not in line]  # bash's own word
    assert "the folder that this was started in cannot be used" in line and "cd to another folder" in line


def test_one_that_is_removed_while_the_app_runs_stops_nothing(tmp_path, monkeypatch):
    """A worker and the page start again, files are found, the log of versions and the bundle are made."""
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    argv = (sys.executable, str(ROOT / "tests" / "supervisor" / "scripted_worker.py"))
    supervisor = Supervisor(tmp_path / "state", Path("outputs"), worker_argv=argv, devices=("",), sample=lambda: None)
    try:
        folder_of_clips = supervisor.outputs
        for path in folder.iterdir():
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
        end_s = time.monotonic() + 60
        while not supervisor.slots[0].free:
            supervisor.tick(0.05)
            assert time.monotonic() < end_s, list(supervisor.log.ring)
        supervisor.restart()
        assert supervisor.outputs == folder_of_clips
        assert all(path.is_absolute() for path in model_roots())
        studio = Studio(tmp_path / "state", supervisor.outputs)
        assert studio.models() and studio.support_bundle(tmp_path / "a.zip").is_file()
        studio.close()
    finally:
        supervisor.close()
    Store(tmp_path / "state").close()


def test_the_environment_of_a_child_is_made_without_the_folder(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    path = child_environment({"PYTHONPATH": f"/a{os.pathsep}:/b"})["PYTHONPATH"].split(os.pathsep)
    assert path[-2:] == ["/a", "/b"]
    assert current_folder() == Path("/") == environment.current_folder()
