"""The page under load, as `scripts/bench_app.py --load` measures it: a real app, a long queue, a large library.

The app is the supervisor with its page; the queue is paused, so that what is measured is the page and not the machine.
"""

import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
CLIPS, WAITING, CLIENTS, SUBMITS, TABS, SILENT = 5000, 500, 50, 10, 10, 700
WATCH_S = 30.0


def library(outputs: Path, clips: int) -> list[str]:
    """Make clips of a few bytes with whole sidecars; returns their names, oldest first."""
    from turbodiff.spec.clips import Sidecar
    from turbodiff.spec.request import make_request

    names = []
    for number in range(clips):
        day = outputs / f"2026-{1 + number // 500:02}-01"
        day.mkdir(parents=True, exist_ok=True)
        stamp = f"2026{1 + number // 500:02}01_{number // 3600:02}{number // 60 % 60:02}{number % 60:02}"
        name = f"t2v_{number}_demo_{stamp}"
        sidecar = Sidecar(request=make_request({"prompt": f"clip {number}", "seed": number}), sha256=f"{number:064x}")
        (day / f"{name}.mp4").write_bytes(b"\0" * 64)
        (day / f"{name}.mp4.json").write_text(sidecar.model_dump_json(), "utf-8")
        names.append(name)
    return names


def call(port: int, path: str, body: object = None) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if data is None else "POST", path, data, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def running(port: int, folder: Path, state: Path, outputs: Path) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """The app, and the process of its page once that answers."""
    flags = ["--no-browser", "--port", str(port), "--state-dir", str(state), "--outputs", str(outputs)]
    app = subprocess.Popen(
        [sys.executable, str(ROOT / "webui" / "app.py"), *flags], cwd=folder, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    end_s = time.monotonic() + 120
    while time.monotonic() < end_s and app.poll() is None:
        with contextlib.suppress(OSError):
            if call(port, "/config")[0] == 200:
                break
        time.sleep(0.5)
    family = psutil.Process(app.pid).children(recursive=True)
    return app, next(each for each in family if "webui.server" in each.cmdline())


def p95(times: list[float]) -> float:
    return sorted(times)[int(0.95 * (len(times) - 1))]


def at_once(n: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def idle(port: int) -> dict[str, float]:
    """Each of 50 clients asks ten times for a job that is not there: what a call costs that does nothing."""
    times: list[float] = []

    def client(who: int) -> None:
        for _ in range(SUBMITS):
            start_s = time.perf_counter()
            call(port, "/gradio_api/run/status", {"data": [10**6 + who]})
            times.append(time.perf_counter() - start_s)

    at_once(CLIENTS, client)
    return {"idle_p50_s": statistics.median(times), "idle_p95_s": p95(times)}


def submits(port: int) -> dict[str, float]:
    """Each of 50 clients submits ten jobs one after another."""
    times: list[float] = []
    refused: list[int] = []

    def client(who: int) -> None:
        for number in range(SUBMITS):
            fields = {"prompt": f"job {number} of client {who}", "seed": number}
            start_s = time.perf_counter()
            status, _ = call(port, "/gradio_api/run/submit", {"data": [fields]})
            times.append(time.perf_counter() - start_s)
            if status != 200:
                refused.append(status)

    at_once(CLIENTS, client)
    return {"submit_p50_s": statistics.median(times), "submit_p95_s": p95(times), "submits_refused": len(refused)}


def look_call(port: int) -> dict[str, object]:
    """The body that a tab sends when something has changed, by the page's own config."""
    config = json.loads(call(port, "/config")[1])
    event = next(one for one in config["dependencies"] if any(target[1] == "look" for target in one["targets"]))
    states = {part["id"]: part["props"].get("value") for part in config["components"]}
    return {"fn_index": event["id"], "data": [states.get(number) for number in event["inputs"]]}


def library_shown(port: int) -> dict[str, float]:
    """Seconds until the gallery shows every clip of a library that was never read."""
    body, start_s = look_call(port), time.perf_counter()
    while f'data-total=\\"{CLIPS}\\"'.encode() not in call(port, "/gradio_api/run/predict", body)[1]:
        assert time.perf_counter() < start_s + 300
        time.sleep(1.0)
    return {"library_shown_s": time.perf_counter() - start_s}


def tabs(port: int, page: psutil.Process) -> dict[str, float]:
    """CPU of the page's process while ten tabs ask what changed, once a second each."""
    body = look_call(port)
    end_s, bad = time.monotonic() + WATCH_S, []

    def tab(number: int) -> None:
        time.sleep(number / TABS)
        seen = None
        while time.monotonic() < end_s:
            start_s = time.monotonic()
            data = list(body["data"]) if isinstance(body["data"], list) else []
            if seen is not None and data:
                data[-1] = seen
            asked = {**body, "data": data, "session_hash": f"tab{number}"}
            status, answer = call(port, "/gradio_api/run/predict", asked)
            if status != 200:
                bad.append(status)
            else:
                last = json.loads(answer)["data"][-1]
                seen = last if isinstance(last, dict) and "__type__" not in last else seen
            time.sleep(max(0.0, 1.0 - (time.monotonic() - start_s)))

    before = page.cpu_times()
    at_once(TABS, tab)
    after = page.cpu_times()
    used_s = after.user + after.system - before.user - before.system
    return {"ten_tabs_cpu_percent": 100 * used_s / WATCH_S, "ten_tabs_bad": len(bad)}


def silent_sockets(port: int) -> dict[str, float]:
    """700 sockets that say nothing: how long the page takes to answer beside them, and until all are closed."""
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(SILENT)]
    start_s = time.perf_counter()
    call(port, "/healthz")
    answer_s = time.perf_counter() - start_s
    for sock in socks:
        sock.settimeout(60)
        try:
            while sock.recv(4096):
                pass
        except OSError:
            pass
        sock.close()
    return {"answer_beside_700_silent_s": answer_s, "silent_closed_after_s": time.perf_counter() - start_s}


def load() -> dict[str, float]:
    """All figures, over one app."""
    from turbodiff.jobs.store import Store
    from turbodiff.spec.request import make_request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        state, outputs = Path(folder) / "state", Path(folder) / "outputs"
        names = library(outputs, CLIPS)
        store = Store(state)
        store.put("paused", True)
        app, page = running(port, Path(folder), state, outputs)
        try:
            times = []
            for name in (names[0], names[CLIPS // 2], names[-1]):
                start_s = time.perf_counter()
                assert call(port, f"/media/{name}")[0] == 200, name
                times.append(time.perf_counter() - start_s)
            for number in range(WAITING):
                store.submit(make_request({"prompt": f"waits {number}", "seed": number}))
            figures = {
                "oldest_clip_s": max(times),
                **library_shown(port),
                **tabs(port, page),
                **idle(port),
                **submits(port),
                **silent_sockets(port),
            }
            return {**figures, "page_mib": page.memory_info().rss / 2**20}
        finally:
            app.terminate()
            app.wait(30)
            store.close()
