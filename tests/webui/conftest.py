"""A running app for the tests that look at it from outside: the real supervisor, store and page, a scripted worker."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from turbodiff.jobs.store import Store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTED = "../supervisor/scripted_worker.py"
CHROMIUM = Path("/usr/bin/chromium")
BROWSER_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
SUPERVISE = """
import sys
from pathlib import Path
from turbodiff.supervisor.supervisor import Supervisor
state, outputs, worker, web = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
sys.exit(Supervisor(state, outputs, worker_argv=[sys.executable, worker], working=state).serve(web))
"""


@dataclass
class App:
    """A running app: its address, its store, its processes."""

    url: str
    port: int
    state: Path
    outputs: Path
    process: subprocess.Popen
    store: Store

    def wait(self, what, patience_s=60.0):
        """Wait until `what()` is true and return it."""
        end_s = time.monotonic() + patience_s
        while time.monotonic() < end_s:
            found = what()
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError("it did not happen in time")

    def stop(self):
        self.store.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_open(process, port, patience_s=120.0):
    """Wait until a process listens at a port."""
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s and process.poll() is None:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nobody listens at {port}")


def answers(url):
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def start(folder, *flags, worker=SCRIPTED, supervise=SUPERVISE, **environment):
    port = free_port()
    state, outputs = folder / "state", folder / "outputs"
    web = [
        sys.executable,
        "-m",
        "webui.server",
        "--port",
        str(port),
        "--state-dir",
        str(state),
        "--outputs",
        str(outputs),
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-c", supervise, str(state), str(outputs), str(HERE / worker), *web, *flags],
        env={**os.environ, "PYTHONPATH": paths, "TURBODIFF_STATE": str(state), **environment},
        stderr=subprocess.DEVNULL,
    )
    app = App(f"http://127.0.0.1:{port}", port, state, outputs, process, Store(_made(state)))
    try:
        app.wait(lambda: answers(app.url), 120)
    except AssertionError:
        log = state / "webui_startup_latest.log"
        text = log.read_text("utf-8") if log.exists() else "no log"
        app.stop()
        raise AssertionError(text) from None
    return app


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def start_app():
    """Starts an app of one's own: start_app(folder, *flags, **environment)."""
    return start


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    """The app with a scripted worker."""
    made = start(tmp_path_factory.mktemp("app"))
    yield made
    made.stop()


@pytest.fixture(scope="session")
def chromium():
    """One browser for all tests; a context per test."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("no /usr/bin/chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=BROWSER_FLAGS)
        yield browser
        browser.close()
