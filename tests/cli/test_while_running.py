"""Every command of the queue and of the archive while the app runs, as another process sees it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turbodiff.cli import main
from turbodiff.studio import Studio

ROOT = Path(__file__).parents[2]
APP = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from supervisor.bench import SCRIPTED
from turbodiff.supervisor.supervisor import Supervisor
folder = Path(sys.argv[1])
made = Supervisor(folder / "state", folder / "outputs", worker_argv=SCRIPTED, working=folder, sample=lambda: None)
sys.exit(made.serve())
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    app = subprocess.Popen([sys.executable, "-c", APP, str(folder)], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths})
    studio = Studio(folder / "state", folder / "outputs")
    wait(lambda: (studio._store.fact("worker0") or {}).get("state") == "ready")
    yield folder, studio
    studio.close()
    app.terminate()
    app.wait(20)


def wait(what, patience_s=60.0):
    end_s = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < end_s, "not in time"
        time.sleep(0.05)


@pytest.fixture
def turbodiff(running, monkeypatch, capsys):
    """Runs a command line in this process; the app is another one."""
    folder, _ = running

    def run(*args, outputs=False):
        places = ["--state-dir", str(folder / "state"), *(["--outputs", str(folder / "outputs")] if outputs else [])]
        monkeypatch.setattr(sys, "argv", ["turbodiff", *args, *places])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        return said.out

    return run


def test_the_queue_from_the_shell_while_the_app_runs(running, turbodiff):
    _, studio = running
    long = json.dumps({"steps": 2000, "dt_s": 0.05})
    first = studio.submit({"prompt": long})
    wait(lambda: (now := studio.job(first).progress) and now.step)
    assert "paused" in turbodiff("jobs", "pause")
    second, third = (studio.submit({"prompt": "a red circle moves right", "seed": seed}) for seed in (1, 2))
    turbodiff("jobs", "move", str(third), "first")
    turbodiff("jobs", "cancel", str(first))
    wait(lambda: studio.job(first).state == "cancelled")
    assert [job.id for job in studio._store.queue()] == [third, second]
    again = int(turbodiff("jobs", "retry", str(first)).split()[-1])
    turbodiff("jobs", "cancel", str(again))
    turbodiff("jobs", "resume")
    wait(lambda: studio.job(second).over and studio.job(third).over)
    listed = turbodiff("jobs", "list")
    assert listed.count("done") == 2 and listed.count("cancelled") == 2
    assert json.loads(turbodiff("jobs", "show", str(second), "--json"))["state"] == "done"


def test_the_archive_from_the_shell_while_the_app_runs(running, turbodiff, tmp_path):
    folder, studio = running
    job = studio.submit({"prompt": "一只猫追逐蝴蝶", "seed": 77})
    wait(lambda: studio.job(job).over)
    wait(lambda: studio.seeds("蝴蝶"))
    row = studio.seeds("蝴蝶")[0].id
    turbodiff("seeds", "rate", str(row), "动作流畅", "--note", "再来", outputs=True)
    line = "| 一只猫追逐蝴蝶 | 77 | Demo | 128 | 动作流畅 | 再来 |"
    assert line in turbodiff("seeds", "export")
    assert line in (folder / "outputs" / "seeds.md").read_text("utf-8")
    assert "蝴蝶" in turbodiff("seeds", "list", "蝴蝶")
    table = tmp_path / "table.md"
    table.write_text(studio.seeds_text().replace("77", "78"), "utf-8")
    turbodiff("seeds", "import", str(table), outputs=True)
    assert studio.seeds("78")


def test_a_restart_from_the_shell_while_the_app_runs(running, turbodiff):
    _, studio = running
    before = studio._store.fact("worker0")["pid"]
    assert "worker replaced" in turbodiff("restart")
    wait(lambda: studio._store.fact("worker0")["state"] == "ready")
    assert studio._store.fact("worker0")["pid"] != before
