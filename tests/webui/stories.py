"""What the browser stories share: a tab that watches itself, and the moves that a person makes in it."""

from contextlib import contextmanager

PATIENCE_MS = 90_000


@contextmanager
def tab(chromium, app, path="/", **options):
    """A tab on the page, ready to be clicked; no request may leave this machine, no error may reach its console."""
    context = chromium.new_context(locale="zh-CN" if "zh" in path else "en-US", **options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if request.url.startswith("http") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("response", lambda answer: errors.append(answer.url) if bad(answer) else None)
    page.goto(app.url + path)
    page.wait_for_selector("#go", timeout=90_000)
    page.wait_for_selector("#meter .td-meter", timeout=60_000)
    page.hosts, page.errors = hosts, errors
    try:
        yield page
        assert hosts == {f"127.0.0.1:{app.port}"}
        assert not errors
    finally:
        context.close()


def bad(answer):
    """Whether the page asked for something that it should not have; the scripted worker makes no posters."""
    return answer.status >= 400 and not answer.url.endswith("/poster")


def write_prompt(page, prompt):
    page.fill("#prompt textarea", prompt)
    page.wait_for_timeout(400)


def newest(app):
    return app.store.jobs(1)[0]


def begin(page, app):
    """Press Generate and return the number of the job."""
    before = newest(app).id if app.store.jobs(1) else 0
    page.click("#go")
    return app.wait(lambda: app.store.jobs(1) and newest(app).id > before and newest(app).id)


def submit(page, app, state="done"):
    """Press Generate and wait for what comes of it; returns the job."""
    return wait_done(app, begin(page, app), state)


def wait_done(app, job, state="done"):
    return app.wait(lambda: (found := app.store.job(job)).state == state and found, 60)


def choose(page, model):
    """Choose a model from the list."""
    page.click("#model input")
    page.click(f"ul[role=listbox] li:has-text('{model}')")
    page.wait_for_timeout(1500)
