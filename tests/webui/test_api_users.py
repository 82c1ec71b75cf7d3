"""Named users of the API: each sees and acts on their own jobs, has a limit, and is told when to ask again."""

import json
import re

import httpx
import pytest

from turbodiff.jobs.users import User, add_user, remove_user
from webui.security import LIMITS

PASSWORD = "open sesame"
SHORT, LONG = ({"prompt": json.dumps({"steps": steps, "dt_s": 0.05}), "model": "demo"} for steps in (2, 2000))


@pytest.fixture(scope="module")
def app(start_app, tmp_path_factory):
    made = start_app(tmp_path_factory.mktemp("users"), "--metrics", TURBODIFF_PASSWORD=PASSWORD)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def tokens(app):
    return {name: add_user(app.store, User(name=name, most_waiting=3))[0] for name in ("anna", "ben")}


def post(app, token, name, data):
    heads = {"authorization": f"Bearer {token}"}
    return httpx.post(f"{app.url}/gradio_api/run/{name}", json={"data": [data]}, headers=heads, timeout=60)


def call(app, token, name, data):
    answer = post(app, token, name, data)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]


def test_a_user_sees_and_cancels_their_own_jobs_alone_and_the_login_sees_all(app, tokens):
    anna, ben = tokens["anna"], tokens["ben"]
    job = call(app, anna, "submit", SHORT)["job"]
    other = call(app, ben, "submit", {**SHORT, "nonce": "bens"})["job"]
    app.wait(lambda: call(app, anna, "status", job)["state"] == "done")
    assert {call(app, anna, name, other)["error"]["code"] for name in ("status", "result", "cancel")} == {"job_unknown"}
    assert [row["job"] for row in call(app, anna, "list", 0)["jobs"]] == [job]
    assert {row["job"] for row in call(app, PASSWORD, "list", 0)["jobs"]} >= {job, other}
    assert app.store.job(job).user == "anna"
    assert call(app, anna, "submit", {**SHORT, "nonce": "bens"})["error"]["code"] == "nonce_taken"
    assert (
        call(app, anna, "submit", {**SHORT, "model": "demo-i2v", "after": "bens"})["error"]["code"] == "after_unknown"
    )


def test_a_clip_is_shown_to_its_user_and_the_login(app, tokens):
    job = call(app, tokens["anna"], "submit", SHORT)["job"]
    app.wait(lambda: call(app, tokens["anna"], "status", job)["state"] == "done")
    url = call(app, tokens["anna"], "result", job)["url"]
    codes = [
        httpx.get(app.url + url, headers={"authorization": f"Bearer {token}"}).status_code
        for token in (tokens["anna"], PASSWORD, tokens["ben"])
    ]
    assert codes == [200, 200, 404]
    clip = url.rsplit("/", 1)[1]
    for fields in ({"clip": clip, "format": "gif"},):
        assert call(app, tokens["ben"], "export", fields)["error"]["code"] == "clip_unknown"
    assert call(app, tokens["ben"], "submit", {**SHORT, "continues": clip})["error"]["code"] == "clip_unknown"


@pytest.mark.parametrize("path", ["/", "/config", "/progress.json", "/seeds.md", "/support.zip", "/metrics", "/zh/"])
def test_a_token_opens_nothing_that_shows_the_jobs_of_all(app, tokens, path):
    heads = {"authorization": f"Bearer {tokens['anna']}"}
    assert httpx.get(app.url + path, headers=heads).status_code == 403
    for name in ("gradio_api/run/predict", "gradio_api/queue/join", "gradio_api/call/list"):
        assert httpx.post(f"{app.url}/{name}", json={}, headers=heads).status_code == 403


def test_over_the_limit_the_answer_is_429_with_the_seconds_to_wait_and_a_batch_is_all_or_nothing(app, tokens):
    app.store.put("paused", True)
    try:
        jobs = call(app, tokens["ben"], "submit", {"batch": [LONG, LONG], "ttl_s": 3600})["jobs"]
        assert len(jobs) == 2 and app.store.job(jobs[0]).expires_s is not None
        refused = post(app, tokens["ben"], "submit", {"batch": [LONG, LONG]})
        error = refused.json()["data"][0]["error"]
        assert refused.status_code == 429 and error["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) == error["retry_after_s"] >= 1
        assert [job.id for job in app.store.queue()] == jobs  # nothing of that batch
        too_many = post(app, tokens["ben"], "submit", {"batch": [LONG] * 4})  # no later try would help
        assert (too_many.status_code, too_many.json()["data"][0]["error"]["code"]) == (200, "batch_too_large")
        for ttl_s in (0, "soon", True, 1e12):
            assert call(app, tokens["ben"], "submit", {**LONG, "ttl_s": ttl_s})["error"]["code"] == "bad_ttl"
        assert call(app, tokens["anna"], "submit", LONG)["job"]  # another has a limit of their own
        for job in app.store.queue():
            app.store.cancel(job.id)
    finally:
        app.store.put("paused", False)


def test_a_job_that_waited_too_long_says_so(app, tokens):
    app.store.put("paused", True)
    try:
        job = call(app, tokens["anna"], "submit", {**LONG, "ttl_s": 1})["job"]
        app.wait(lambda: call(app, tokens["anna"], "status", job)["state"] == "failed")
    finally:
        app.store.put("paused", False)
    assert call(app, tokens["anna"], "status", job)["error"]["code"] == "job_expired"


def test_metrics_are_prometheus_text_behind_the_login_and_no_request_names_a_label(app, tokens):
    assert httpx.get(f"{app.url}/metrics").status_code == 401
    job = call(app, tokens["anna"], "submit", SHORT)["job"]
    app.wait(lambda: call(app, tokens["anna"], "status", job)["state"] == "done")
    answer = httpx.get(f"{app.url}/metrics", headers={"authorization": f"Bearer {PASSWORD}"})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert answer.text.endswith("\n") and lines
    sample = re.compile(r'turbodiff_[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [0-9.e+-]+')
    assert all(line.startswith(("# HELP ", "# TYPE ")) or sample.fullmatch(line) for line in lines), lines
    assert any(line.startswith('turbodiff_jobs{state="done"}') for line in lines)
    assert "anna" not in answer.text and "steps" not in answer.text


def test_a_token_that_was_taken_away_lets_nobody_in_and_guesses_have_a_limit(app, tokens):
    token, _ = add_user(app.store, User(name="chen"))
    assert call(app, token, "list", 0) == {"jobs": []}
    remove_user(app.store, "chen")
    codes = [post(app, token, "list", 0).status_code for _ in range(LIMITS["login"] + 1)]
    assert codes == [401] * LIMITS["login"] + [429]
    assert call(app, tokens["anna"], "list", 0)["jobs"]  # a right one goes on
