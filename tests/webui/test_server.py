"""The running site from outside: pages, media, API; with the real supervisor and a scripted worker."""

import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPT = json.dumps({"steps": 2, "dt_s": 0.05})


def api(app, name, *data):
    """Call a named endpoint the way gradio_client does, without importing it."""
    started = httpx.post(f"{app.url}/gradio_api/call/{name}", json={"data": list(data)}, timeout=30)
    assert started.status_code == 200, started.text
    stream = httpx.get(f"{app.url}/gradio_api/call/{name}/{started.json()['event_id']}", timeout=30).text
    return json.loads(re.search(r"event: complete\ndata: (.*)", stream).group(1))[0]


def test_the_web_process_never_loads_torch():
    code = "import sys, webui.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_each_language_has_its_page_and_a_browser_gets_its_own(app):
    chinese = {"accept": "text/html", "accept-language": "zh-CN,zh;q=0.9"}
    assert httpx.get(app.url, headers=chinese).headers["location"] == "/zh/"
    assert httpx.get(app.url, headers={**chinese, "cookie": "turbodiff_lang=en"}).status_code == 200
    assert httpx.get(app.url, headers={"accept": "text/html", "accept-language": "de"}).status_code == 200
    assert httpx.get(app.url, headers={"accept": "*/*", "accept-language": "zh"}).status_code == 200  # a program


def test_head_answers_as_get_does_without_the_body(app):
    asset = re.search(r"assets/[\w./-]+\.js", httpx.get(app.url, timeout=30).text)[0]
    paths = [
        "/", "/zh/", "/zh", "/en", "/en/", "/theme.css", f"/{asset}", "/config", "/zh/config", "/healthz", "/seeds.md",
        "/robots.txt", "/nothing", "/media/nothing", "/gradio_api/heartbeat/x",
    ]  # fmt: skip
    for path in paths:
        head = httpx.head(app.url + path, headers={"accept": "text/html", "accept-language": "zh"}, timeout=30)
        if "heartbeat" in path:
            assert head.status_code == 405, "a stream without end"
            continue
        get = httpx.get(app.url + path, headers={"accept": "text/html", "accept-language": "zh"}, timeout=30)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers.get("location") == get.headers.get("location"), path
        assert head.headers.get("content-type") == get.headers.get("content-type"), path


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "PROPFIND", "PUT", "DELETE", "OPTIONS"])
def test_no_method_makes_a_failure_of_ours(app, method):
    for path in ("/", "/zh/", "/login", "/logout", "/healthz", "/media/x", "/seeds.md", "/config", "/gradio_api/info"):
        assert 400 <= httpx.request(method, app.url + path, timeout=30).status_code < 500, path


def test_the_page_config_holds_one_language_each(app):
    english = httpx.get(f"{app.url}/config", timeout=30).text
    chinese = httpx.get(f"{app.url}/zh/config", timeout=30).text
    assert '"Generate' in english and '"生成' not in english
    assert "生成" in chinese and '"Generate' not in chinese


def test_foreign_hosts_and_origins_are_refused_before_gradio_sees_them(app):
    assert httpx.get(app.url, headers={"host": "evil.example"}).status_code == 403
    upload = {"files": ("x.png", b"x")}
    answer = httpx.post(f"{app.url}/gradio_api/upload", files=upload, headers={"origin": "http://evil.example"})
    assert answer.status_code == 403


@pytest.mark.parametrize("name", ["nothing", "..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "a" * 500, ".hidden"])
def test_media_serves_nothing_but_clips(app, name):
    assert httpx.get(f"{app.url}/media/{name}").status_code == 404


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "../pyproject.toml", "state/jobs.db"])
def test_gradio_serves_no_file_of_this_machine(app, path):
    assert httpx.get(f"{app.url}/gradio_api/file={path}").status_code in (403, 404)


def test_the_page_and_what_it_hears_are_packed_and_clips_are_not(app):
    packed = {"accept-encoding": "gzip"}
    plain, page = (httpx.get(app.url, headers=headers) for headers in ({"accept-encoding": "identity"}, packed))
    assert page.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
    assert page.text == plain.text and int(page.headers["content-length"]) < len(plain.content) / 5
    assert "accept-encoding" in page.headers["vary"].lower()
    job = api(app, "submit", {"prompt": PROMPT, "model": "demo", "seed": 7})["job"]
    app.wait(lambda: api(app, "status", job)["state"] == "done", 60)
    clip = app.store.job(job).result.path
    media = f"{app.url}/media/{Path(clip).stem}"
    whole = httpx.get(media, headers=packed)
    part = httpx.get(media, headers={**packed, "range": "bytes=10-19"})
    assert "content-encoding" not in {**whole.headers, **part.headers}
    assert whole.content == Path(clip).read_bytes() and part.status_code == 206 and part.content == whole.content[10:20]


def test_a_job_through_the_api_from_estimate_to_clip(app):
    fields = {"prompt": PROMPT, "model": "demo", "seed": 7}
    plan = api(app, "estimate", fields)
    assert plan["band"] == "fits" and plan["request"]["num_frames"] == 17
    job = api(app, "submit", fields)["job"]
    app.wait(lambda: api(app, "status", job)["state"] == "done", 30)
    made = api(app, "result", job)
    assert made["url"].startswith("/media/")
    assert str(app.outputs) not in json.dumps(made)
    assert httpx.get(app.url + made["url"]).headers["content-type"] == "video/mp4"
    assert job in [row["job"] for row in api(app, "list", 10)["jobs"]]


def test_the_same_nonce_is_the_same_job(app):
    fields = {"prompt": PROMPT, "model": "demo", "nonce": "once"}
    assert api(app, "submit", fields) == api(app, "submit", fields)


def test_bad_input_through_the_api_names_its_field(app):
    assert api(app, "submit", {"prompt": "x", "model": "demo", "num_frames": 80})["error"]["field"] == "num_frames"
    assert api(app, "estimate", {"prompt": "x", "model": "no such"})["error"]["code"] == "unknown_model"
    assert api(app, "status", 10**9)["error"]["code"] == "job_unknown"


def test_pictures_cannot_be_named_by_a_path_over_the_network(app):
    fields = {"prompt": "x", "model": "wan2.2-a14b", "image": "/etc/passwd"}
    assert api(app, "submit", fields)["error"]["code"] == "not_remote"


def nonsense(rng):
    """A value that no program of ours sends."""
    plain = [
        None,
        True,
        -1,
        2**70,
        1e308,
        "",
        "x" * 300,
        "../../etc/passwd",
        "{{7*7}}",
        "\x00",
        "生成",
        [],
        [1, [2]],
        {},
    ]
    names = [
        "prompt",
        "model",
        "seed",
        "num_frames",
        "steps",
        "pinned",
        "size",
        "image",
        "loras",
        "boundary",
        "nonce",
        "?",
    ]
    return (
        {rng.choice(names): rng.choice(plain) for _ in range(rng.randint(0, 6))}
        if rng.random() < 0.8
        else rng.choice(plain)
    )


def test_fuzzed_payloads_never_break_the_server(app):
    rng = random.Random(5)
    before = sorted(app.state.parent.rglob("*"))
    with httpx.Client(base_url=app.url, timeout=30) as client:
        for _ in range(150):
            name = rng.choice(["estimate", "submit", "status", "cancel", "list", "result"])
            body = {"data": [nonsense(rng)]} if rng.random() < 0.9 else nonsense(rng)
            assert client.post(f"/gradio_api/call/{name}", json=body).status_code < 500
    assert httpx.get(f"{app.url}/healthz").status_code == 200
    new = [path for path in sorted(app.state.parent.rglob("*")) if path not in before]
    ours = {app.state, app.outputs}  # the second is made by the first job that runs
    assert not [path for path in new if ours.isdisjoint({path, *path.parents})]


def test_an_answer_takes_milliseconds_while_a_job_runs(app):
    api(app, "submit", {"prompt": json.dumps({"steps": 4, "dt_s": 0.3}), "model": "demo"})
    times = []
    for _ in range(10):
        start_s = time.monotonic()
        httpx.get(f"{app.url}/healthz")
        times.append(time.monotonic() - start_s)
    assert sorted(times)[-2] < 3.0  # the goal is 0.3 s; CI's machines get ten times that


def web_process(app):
    children = psutil.Process(app.process.pid).children(recursive=True)
    return next(child for child in children if "webui.server" in child.cmdline())


def test_sixty_jobs_from_six_clients_are_all_kept_apart(app):
    def client(who):
        made = []
        for number in range(10):
            prompt = json.dumps({"steps": 1, "dt_s": 0.0, "print": f"{who}-{number}"})
            made.append((prompt, api(app, "submit", {"prompt": prompt, "model": "demo"})["job"]))
        return made

    with ThreadPoolExecutor(6) as pool:
        made = [pair for pairs in pool.map(client, range(6)) for pair in pairs]
    assert len({job for _, job in made}) == 60
    app.wait(lambda: all(app.store.job(job).state == "done" for _, job in made), 120)
    assert all(app.store.job(job).request.prompt == prompt for prompt, job in made)
    assert web_process(app).memory_info().rss < 400e6


def test_the_example_of_the_readme_runs_with_gradio_client(app):
    pytest.importorskip("gradio_client")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL).group(1)
    names = {}
    exec(code.replace("http://127.0.0.1:7860", app.url), names)
    client, job = names["client"], names["job"]["job"]
    try:
        assert client.predict(job, api_name="/status")["state"] in ("queued", "running", "verifying", "done")
        assert client.predict({"prompt": PROMPT}, api_name="/estimate")["band"] == "fits"
    finally:
        client.close()


def private(app, name, **changes):
    """Call the page's own event whose handler has this name with the values that the form starts with."""
    config = httpx.get(f"{app.url}/config", timeout=30).json()
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    same = [event for event in config["dependencies"] if re.fullmatch(rf"{name}(_\d+)?", str(event["api_name"]))]
    event = max(same, key=lambda event: len(event["inputs"]))  # the API's endpoint of that name takes one
    data = [changes.get(names[part], values[part]) for part in event["inputs"]]
    body = {"fn_index": event["id"], "data": data, "session_hash": "someone"}
    return httpx.post(f"{app.url}/gradio_api/run/predict", json=body, timeout=30)


def test_the_pages_own_events_answer_and_call_nonsense_by_its_name(app):
    assert private(app, "estimate").status_code == 200
    assert private(app, "estimate", steps="many").status_code == 422
    assert private(app, "estimate", **{"fit": "no such fit"}).status_code == 422


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml"])
def test_no_event_reads_a_file_that_was_not_uploaded(app, path):
    file = {"path": str((ROOT / path).resolve()), "meta": {"_type": "gradio.FileData"}}
    before = sorted((app.state / "uploads").rglob("*"))
    assert private(app, "estimate", image=file).status_code == 422
    assert private(app, "new_kind", image=file).status_code == 422
    assert sorted((app.state / "uploads").rglob("*")) == before  # nor is it copied to where Gradio serves from


def test_numbers_of_an_unknown_event_are_refused(app):
    for body in ({"fn_index": 9999, "data": []}, {"fn_index": "x", "data": []}, {"data": []}, [], {"fn_index": 1}):
        assert 400 <= httpx.post(f"{app.url}/gradio_api/run/predict", json=body, timeout=30).status_code < 500
