"""Row 24 of the fault table: a page that hangs is replaced, its jobs run on."""

import os
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.bench import Bench, scripted
from turbodiff.supervisor import web_process
from turbodiff.supervisor.web_process import HealthCheck

PAGE = """
import http.server, os, sys, time
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while os.path.exists(sys.argv[2]):  # hangs: takes the call and never answers
            time.sleep(0.05)
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words): pass
print("INFO: page is up", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_process, "EVERY_S", 0.1)
    monkeypatch.setattr(web_process, "PATIENCE_S", 0.5)
    monkeypatch.setattr(web_process, "SILENT_S", 2.0)
    monkeypatch.setattr(web_process, "BACKOFF_S", (0.05,) * 6)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> Callable[[], bool]:
    def ask() -> bool:
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=0.5).status == 200)
        except OSError:
            return False

    return ask


@pytest.mark.parametrize("how", ["takes calls and answers none", "SIGSTOP"])
def test_fault_24_a_page_that_hangs_is_replaced_and_the_job_runs_on(bench: Bench, tmp_path: Path, how: str) -> None:
    port, hang = free_port(), tmp_path / "hang"
    argv = (sys.executable, "-S", "-c", PAGE, str(port), str(hang))
    web = bench.supervisor.web = web_process.WebProcess(argv, bench.supervisor.context, ("127.0.0.1", port))
    bench.turn_until(answers(port))
    bench.turn_until(lambda: web.health and web.health._answered)
    job = bench.store.submit(scripted({"steps": 60, "dt_s": 0.05}))
    first, worker = web.child.pid, bench.slot.worker.pid  # type: ignore[union-attr]
    if how == "SIGSTOP":
        os.kill(first, signal.SIGSTOP)
    else:
        hang.touch()
    bench.turn_until(lambda: "the page no longer answers; it is replaced" in bench.log_text())
    hang.unlink(missing_ok=True)
    bench.turn_until(lambda: web.child is not None and web.child.pid != first)
    bench.turn_until(answers(port))
    bench.turn_until(lambda: bench.store.job(job).over)
    assert (bench.store.job(job).state, bench.store.job(job).attempt) == ("done", 1)
    assert bench.slot.worker.pid == worker


def test_a_page_that_answers_is_left_alone_whatever_it_says() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        watch, now = HealthCheck(server.getsockname(), 0.0), 0.0
        for _ in range(3):
            while watch._sock is None:
                now += 0.05
                assert not watch.tick(now)
            caller, _ = server.accept()
            watch.tick(now)
            assert caller.recv(200).startswith(b"GET /healthz")
            caller.sendall(b"HTTP/1.0 503 busy\r\n\r\n")
            caller.close()
            while watch._sock is not None:
                watch.tick(now)
        assert watch._alive_s == now
        watch.close()


def test_a_start_may_take_minutes_and_sleep_is_no_silence() -> None:
    nobody = ("127.0.0.1", free_port())
    starting = HealthCheck(nobody, 0.0)
    assert not any(starting.tick(float(now)) for now in range(180))
    assert starting.tick(181.0)
    asleep = HealthCheck(nobody, 0.0)
    assert not asleep.tick(10_000.0)
