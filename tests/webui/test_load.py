"""Sixty jobs from six browsers: none lost, none mixed up, a small web process; how long answers took is printed."""

import json
from contextlib import ExitStack, suppress

import psutil
import pytest
from stories import tab

pytestmark = pytest.mark.browser

BROWSERS, JOBS = 6, 10
AGAIN_S = 30  # far longer than an accepted press takes
PATIENCE_S = 300  # six browsers beside other work on two cores


def prompt_of(who, number):
    """A script that takes no time and says whose it is."""
    return json.dumps({"steps": 1, "dt_s": 0.0, "print": f"job {number} of browser {who}"})


def times_of(page, taken):
    """Keep how long each call of the page takes on its way to the server and back, milliseconds."""

    def finished(request):
        if request.method == "POST" and "/run/predict" in request.url:
            taken.append(request.timing["responseEnd"] - request.timing["requestStart"])

    page.on("requestfinished", finished)


def go_on(pages, number):
    """One job from each browser, all at about the same time."""
    for who, page in enumerate(pages):
        page.fill("#prompt textarea", prompt_of(who, number))
    for page in pages:
        page.wait_for_timeout(100)
        page.click("#go")


def test_sixty_jobs_from_six_browsers(start_app, chromium, tmp_path, request):
    app = start_app(tmp_path)
    request.addfinalizer(app.stop)
    with ExitStack() as open_pages:
        sixty_jobs(app, [open_pages.enter_context(tab(chromium, app)) for _ in range(BROWSERS)])


def press_again(page, app, prompt):
    """As a person does: Gradio drops a press while the page waits for the answer to its last one."""

    def taken():
        return prompt in [job.request.prompt for job in app.store.jobs(100)]

    for _ in range(PATIENCE_S // AGAIN_S):
        with suppress(AssertionError):
            return app.wait(taken, AGAIN_S)
        page.click("#go")
    return app.wait(taken, AGAIN_S)


def sixty_jobs(app, pages):
    """Press, wait, compare."""
    taken = []
    for page in pages:
        times_of(page, taken)
    for number in range(JOBS):
        go_on(pages, number)
        for who, page in enumerate(pages):
            press_again(page, app, prompt_of(who, number))
    app.wait(lambda: all(job.state == "done" for job in app.store.jobs(100)), PATIENCE_S)
    found = sorted(job.request.prompt for job in app.store.jobs(100))
    assert found == sorted(prompt_of(who, number) for who in range(BROWSERS) for number in range(JOBS))
    assert len({job.result.path for job in app.store.jobs(100)}) == BROWSERS * JOBS
    for who, page in enumerate(pages):  # each sees its own last clip, not its neighbour's
        last = json.dumps(f"browser {who}")
        page.wait_for_function(f"document.querySelector('#card h3')?.innerText.includes({last})", timeout=60_000)
    children = psutil.Process(app.process.pid).children(recursive=True)
    rss = next(child.memory_info().rss for child in children if "webui.server" in child.cmdline())
    p95_ms = sorted(taken)[int(0.95 * len(taken))]
    print(f"{len(taken)} answers, p95 {p95_ms:.0f} ms, web process {rss / 1e6:.0f} MB")
    assert len(taken) > BROWSERS * JOBS
    assert rss < 400e6
