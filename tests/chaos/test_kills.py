"""Fault 25: supervisor, page and worker are killed at random moments while jobs run; nothing may be lost or doubled.

60 kills in the suite, 1,000 in `scripts/test soak`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from supervisor.bench import request, scripted, wait_until

from tests.soak import SOAK
from turbodiff.diagnostics.logs import tail
from turbodiff.jobs.store import Store
from turbodiff.media.joining import read_frames
from turbodiff.spec.files import sha256_of
from turbodiff.spec.request import Request

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
KILLS, REAL_KILLS = (1000, 100) if SOAK else (60, 20)


class App:
    """The app as a person runs it, started again whenever it is dead."""

    def __init__(self, folder: Path, worker: str) -> None:
        self.folder, self.worker, self.starts = folder, worker, 0
        folder.mkdir(exist_ok=True)
        self.token = f"{random.getrandbits(64):x}"
        self.store = Store(folder / "state")
        self.start()

    def start(self) -> None:
        path = os.pathsep.join(str(ROOT / name) for name in ("", "tests", "kernels"))
        environment = {**os.environ, "TURBODIFF_CHAOS": self.token, "PYTHONPATH": path}
        argv = [sys.executable, str(Path(__file__).with_name("app.py")), str(self.folder), self.worker]
        self.process = subprocess.Popen(argv, env=environment, cwd=self.folder, stderr=subprocess.DEVNULL)
        self.starts += 1

    def child(self, role: str) -> int | None:
        """Pid of the page or the worker."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            is_page = {int(pid): b"\0page\0" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        except OSError:
            return None
        return next((pid for pid, page in is_page.items() if page == (role == "page")), None)

    def kill(self, role: str) -> bool:
        """SIGKILL to the supervisor, the page, the worker or all of them at once; False if there is none yet."""
        if role in ("supervisor", "all"):
            for pid in self.alive() if role == "all" else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            self.start()
            return True
        pid = self.child(role)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    def alive(self) -> list[int]:
        """Every process of this app, whoever its parent is now."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    if self.token.encode() in (entry / "environ").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found


def wait_for(condition: Callable[[], bool], timeout_s: float, app: App) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "\n".join(tail(app.folder / "webui_startup_latest.log", 40))
        if app.process.poll() is not None:
            app.start()
        time.sleep(0.05)


def torment(app: App, kills: int, ask: Callable[[], Request], pause_s: float) -> list[int]:
    """Submit and kill in turns; returns the acknowledged jobs, all of them over."""
    acknowledged, killed = [], dict.fromkeys(("supervisor", "page", "worker"), 0)
    while sum(killed.values()) < kills:
        role = random.choice(list(killed))
        acknowledged.append(app.store.submit(ask()))
        if random.random() < 0.9:  # mostly once everybody is up, sometimes in the middle of a start
            wait_for(lambda: app.child("worker") is not None and app.child("page") is not None, 60.0, app)
        time.sleep(random.uniform(0, pause_s))
        killed[role] += app.kill(role)
    print(f"{killed}, {app.starts} starts, {len(acknowledged)} jobs")
    wait_for(lambda: all(app.store.job(job).over for job in acknowledged), 300.0 + len(acknowledged), app)
    return acknowledged


def hold_the_books(app: App, acknowledged: list[int]) -> None:
    """Every acknowledged job has one verified clip, and nothing else has a final name."""
    jobs = [app.store.job(job) for job in acknowledged]
    assert [job.state for job in jobs] == ["done"] * len(jobs), [job for job in jobs if job.state != "done"]
    paths = [job.result.path for job in jobs if job.result]
    assert len(set(paths)) == len(jobs)
    assert sorted(map(str, (app.folder / "outputs").glob("2*/*.mp4"))) == sorted(paths)
    for path in paths:
        assert json.loads(Path(f"{path}.json").read_text())["sha256"] == sha256_of(Path(path))
    assert app.store.damage() == ""
    assert app.store.rows("SELECT count(*) FROM artifact")[0][0] == len(jobs)


def nobody_is_left(app: App) -> None:
    app.process.kill()
    app.process.wait()
    assert wait_until(lambda: app.alive() == [], 60.0), app.alive()


def test_fault_25_random_kills_lose_no_job_and_leave_no_orphan(tmp_path: Path) -> None:
    random.seed(20261123)
    app = App(tmp_path, "scripted")
    try:
        acknowledged = torment(
            app, KILLS, lambda: scripted({"steps": 3, "dt_s": random.uniform(0.0, 0.05)}), pause_s=0.4
        )
        hold_the_books(app, acknowledged)
        nobody_is_left(app)
    finally:
        app.process.kill()
        app.process.wait()
        app.store.close()


@pytest.mark.slow
def test_fault_25_random_kills_with_the_real_worker_and_the_demo_model(tmp_path: Path) -> None:
    random.seed(20261123)
    app = App(tmp_path, "demo")
    try:
        ask = lambda: request("a red circle moves right", seed=random.randrange(1000), steps=1, num_frames=5)  # noqa: E731
        acknowledged = torment(app, REAL_KILLS, ask, pause_s=8.0)
        hold_the_books(app, acknowledged)
        nobody_is_left(app)
    finally:
        app.process.kill()
        app.process.wait()
        app.store.close()


@pytest.mark.slow
def test_a_storyboard_survives_kills_at_random_moments_of_all_its_segments(tmp_path: Path) -> None:
    """Supervisor, worker or all die in turns; the film of three segments has the same bits as one that nobody
    disturbed, and a segment that was done is not made again."""
    random.seed(20261129)
    app = App(tmp_path, "demo")
    try:
        fields = {"steps": 1, "num_frames": 5, "seed": 1}

        def storyboard(first: str, second: str, third: str) -> list[int]:
            asked = [request("a red circle moves right", nonce=first, **fields)]
            for nonce, after in ((second, first), (third, second)):
                asked.append(request("it moves left", model="demo-i2v", nonce=nonce, after=after, **fields))
            return app.store.submit_all([(one, None) for one in asked])

        jobs, kills, made_ns = storyboard("first", "second", "third"), 0, dict[str, int]()
        while not all(app.store.job(job).over for job in jobs):
            for result in [job.result for job in map(app.store.job, jobs) if job.result]:
                made_ns.setdefault(result.path, Path(result.path).stat().st_mtime_ns)
            role = random.choice(("supervisor", "worker", "all"))
            if kills < REAL_KILLS // 2:
                wait_for(lambda: app.child("worker") is not None, 60.0, app)
                time.sleep(random.uniform(0, 10.0))
                kills += app.kill(role)
            wait_for(lambda: app.process.poll() is None, 60.0, app)
            time.sleep(0.2)
        assert kills >= 3
        hold_the_books(app, jobs)
        assert [app.store.job(job).result.frames for job in jobs] == [5, 9, 13]
        assert {path: Path(path).stat().st_mtime_ns for path in made_ns} == made_ns
        undisturbed = storyboard("1", "2", "3")
        wait_for(lambda: all(app.store.job(job).over for job in undisturbed), 300.0, app)
        for killed, whole in zip(jobs, undisturbed, strict=True):
            clips = [Path(app.store.job(job).result.path) for job in (killed, whole)]
            assert np.array_equal(*(np.concatenate(list(read_frames(clip))) for clip in clips))
        nobody_is_left(app)
    finally:
        app.process.kill()
        app.process.wait()
        app.store.close()


def test_two_apps_on_copies_of_one_state_finish_their_own_queues_and_leave_each_other_alone(tmp_path: Path) -> None:
    first = App(tmp_path / "first", "scripted")
    second: App | None = None
    try:
        jobs = [first.store.submit(scripted({"steps": 20, "dt_s": 0.1, "name": number})) for number in range(4)]
        wait_for(lambda: first.store.job(jobs[0]).state == "running", 60.0, first)
        worker = first.child("worker")
        with first.store.write():  # nobody writes while it is copied, as a person copies it
            shutil.copytree(tmp_path / "first" / "state", tmp_path / "second" / "state")
        second = App(tmp_path / "second", "scripted")
        for app in (first, second):
            wait_for(lambda app=app: all(app.store.job(job).over for job in jobs), 120.0, app)  # type: ignore[misc]
        hold_the_books(first, jobs)
        assert (first.starts, second.starts, first.child("worker")) == (1, 1, worker)
        assert [first.store.job(job).attempt for job in jobs] == [1] * len(jobs)
        assert [second.store.job(job).state for job in jobs] == ["done"] * len(jobs)
        paths = [Path(job.result.path) for job in map(second.store.job, jobs) if job.result]
        assert all(path.is_file() and path.is_relative_to(tmp_path / "second") for path in paths)
    finally:
        for app in filter(None, (first, second)):
            app.process.kill()
            app.process.wait()
            app.store.close()
