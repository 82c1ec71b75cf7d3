"""重启应用 ends the worker, never the page."""

import json
import threading
import time

import httpx

from turbodiff.spec.request import make_request


def test_the_page_answers_throughout_a_restart_and_the_job_runs_again(app):
    job = app.store.submit(_slow())
    app.wait(lambda: (now := app.store.job(job).progress) and now.step)
    before = app.store.fact("worker0")["pid"]
    answers, over = [], threading.Event()

    def knock():
        while not over.is_set():
            answers.append(httpx.get(f"{app.url}/healthz", timeout=10).status_code)
            time.sleep(0.02)

    visitor = threading.Thread(target=knock)
    visitor.start()
    try:
        control = app.store.ask("restart", by="test")
        app.wait(lambda: app.store.outcome(control))
        app.wait(lambda: (app.store.fact("worker0") or {}).get("pid") not in (None, before))
    finally:
        over.set()
        visitor.join()
    assert app.store.outcome(control).ok
    assert answers and set(answers) == {200}
    app.wait(lambda: app.store.job(job).over)
    assert (app.store.job(job).state, app.store.job(job).strikes) == ("done", {})


def _slow():
    script = {"attempts": [{"steps": 2000, "dt_s": 0.05}, {"steps": 1}]}
    return make_request({"prompt": json.dumps(script), "model": "demo"})
