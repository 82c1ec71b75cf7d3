"""1,500 requests that no program of ours sends: no server error, no write elsewhere, no connection to anywhere.

20,000 with TURBODIFF_SOAK=1.
"""

import json
import os
import random
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
from private import Wires

from tests.soak import SOAK
from webui.security import JSON_BYTES

WATCH = Path(__file__).with_name("watch")
ROOT = Path(__file__).resolve().parents[2]
COUNT = 20_000 if SOAK else 1500
NAMED = ("estimate", "submit", "status", "cancel", "list", "result")
FIELDS = (
    "prompt", "model", "seed", "num_frames", "steps", "pinned", "size", "image", "loras", "boundary", "nonce", "kind",
    "resolution", "aspect", "fps", "topk", "sigma_max", "guidance", "shift", "fit", "negative_prompt", "noise_device",
)  # fmt: skip
ODD = (
    None, True, False, -1, 0, 1, 2**31, 2**53, 2**70, -(2**63), 0.5, 1e308, -1e-308, "", " ", "x" * 300, "x" * 5000,
    "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x", "\\\\host\\share", "{{7*7}}",
    "${7*7}", "%s%n%d",
    "'; DROP TABLE job; --", "<script>alert(1)</script>", "\x00", "\x1b[2J", "\u202e生成", "😀" * 99,
    "\ud800", "NaN", "demo", "wan2.2-a14b", "t2v", "480p", [], [[]], [1, [2]], {}, {"a": {}}, [None] * 50,
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"path": "http://127.0.0.1:1/x.png", "url": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}},
    {"path": "../state/jobs.db", "orig_name": "../../x", "meta": {"_type": "gradio.FileData"}},
    {"__type__": "update", "value": 1}, {"constructor": 1, "__proto__": {}},
)  # fmt: skip
PATHS = (
    "/media/{}", "/media/{}/poster", "/gradio_api/file={}", "/gradio_api/file/{}", "/gradio_api/proxy={}",
    "/static/{}",
    "/assets/{}", "/zh/gradio_api/file={}", "/gradio_api/info", "/config", "/gradio_api/startup-events", "/theme.css",
    "/gradio_api/stream/{}/1/1/playlist.m3u8",
    "/custom_component/{}/client/x/y",
    "/gradio_api/custom_component/1/{}/component/x.js", "/login", "/logout", "/gradio_api/runs",
    "/gradio_api/vibe-code/",
    "/gradio_api/dev/reload", "/monitoring/{}", "/seeds.md?{}", "/{}", "/en?{}", "/gradio_api/mcp/{}", "/docs",
    "/gradio_api/deep_link",
)  # fmt: skip
TARGETS = (
    "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "..\\..\\etc", "/etc/passwd", "//etc/passwd", "%00",
    "%ff%fe",
    "a" * 3000, "http://127.0.0.1:1/", "https:/127.0.0.1:1", "file:/etc/passwd", "C:\\x", "state/jobs.db", ".", "..",
    "~",
    "%F0%9F%98%80", "x%0d%0aSet-Cookie:a=b", "{{7*7}}", "$(id)", "nul", "a;b", "0", "-1", "1e999", "%u0041",
    "pyproject.toml",
)  # fmt: skip
HEADS = (
    {"accept-language": "zh" * 2000}, {"accept-language": ";;q=,,*"}, {"cookie": "a=b; ==;;\x01"},
    {"cookie": "turbodiff_lang=../.."},
    {"range": "bytes=-1-"}, {"range": "bytes=99999999999-"}, {"content-type": "text/plain"},
    {"content-type": "x" * 3000},
    {"content-type": "multipart/form-data"}, {"content-type": "multipart/form-data; boundary="},
    {"if-none-match": "\xff"},
    {"x-forwarded-host": "evil.example"}, {"x-forwarded-for": "1.2.3.4"}, {"authorization": "Bearer " + "x" * 999},
    {"authorization": "Basic !!"}, {"content-encoding": "gzip"}, {"transfer-encoding": "chunked"},
    {"expect": "100-continue"},
    {"x-gradio-user": "app"}, {"referer": "http://evil.example/"}, {"accept": "text/html"}, {"x-zerogpu-token": "x"},
)  # fmt: skip


class Fuzzer:
    """Makes requests; the same number gives the same ones. Every kind of request is a method that sends one."""

    def __init__(self, wires, session, seed):
        self.wires, self.session, self.rng = wires, session, random.Random(seed)

    def odd(self, depth=0):
        """Any value at all."""
        if depth < 3 and self.rng.random() < 0.2:
            return [self.odd(depth + 1) for _ in range(self.rng.randint(0, 4))]
        if depth < 3 and self.rng.random() < 0.3:
            return {self.rng.choice(FIELDS): self.odd(depth + 1) for _ in range(self.rng.randint(0, 5))}
        return self.rng.choice(ODD)

    def post(self, path, body, **options):
        """JSON as Python writes it, NaN and lone surrogates included."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
        heads = {"content-type": "application/json", **options.pop("headers", {})}
        return self.session.post(path, content=data, headers=heads, **options)

    def named(self):
        """A named endpoint with one odd argument, or several, or none."""
        name = self.rng.choice(NAMED)
        fields = {self.rng.choice(FIELDS): self.odd() for _ in range(self.rng.randint(1, 6))}
        data = self.rng.choice(([fields], [{"prompt": "x", **fields}], [self.odd()], [], [self.odd(), self.odd()]))
        how = self.rng.choice(("call", "call", "run", "api", "call/v2"))
        body = self.rng.choice(({"data": data}, {"data": data}, {"data": data}, data, {"data": self.odd()}, self.odd()))
        return self.post(f"/gradio_api/{how}/{name}", body)

    def private(self):
        """A private handler with one odd part, or many."""
        handler = self.rng.choice(self.wires.handlers)
        values = self.wires.values(handler)
        if self.rng.random() < 0.7 and values:
            for _ in range(self.rng.randint(1, 3)):
                values[self.rng.randrange(len(values))] = self.odd()
        else:
            values = [self.odd() for _ in range(self.rng.randint(0, 30))]
        body = {
            "data": values,
            "fn_index": handler["id"],
            "session_hash": self.rng.choice(("a", "b", None, 7, "x" * 99)),
        }
        if self.rng.random() < 0.4:
            act = self.rng.choice(
                ("cancel", "rate", "praise", "knob", "note", "fill", "round", "choose", "download", "end_leftover", 7)
            )
            body["event_data"] = self.rng.choice(({"act": act, "arg": self.odd()}, self.odd()))
        if self.rng.random() < 0.1:
            body["fn_index"] = self.odd()
        if self.rng.random() < 0.1:
            body[self.rng.choice(("trigger_id", "batched", "simple_format", "event_id"))] = self.odd()
        return self.post("/gradio_api/run/predict", body)

    def queue(self):
        """The queue's own routes."""
        path = self.rng.choice(("queue/join", "cancel", "reset", "component_server", "stream/x", "stream/x/close"))
        keys = ("fn_index", "session_hash", "event_id", "data", "component_id", "fn_name", "trigger_id")
        return self.post(
            f"/gradio_api/{path}", {key: self.odd() for key in self.rng.sample(keys, self.rng.randint(0, 6))}
        )

    def upload(self):
        """Files with names and heads of their own."""
        names = (
            "../../../x.png",
            "/etc/x",
            "x" * 300 + ".png",
            ".",
            "..",
            "",
            "x\x00.png",
            "生成😀.png",
            "con.png",
            "a/b/c",
            "x.svg",
        )
        name, data = (
            self.rng.choice(names),
            self.rng.choice((b"", b"\x89PNG\r\n\x1a\n" + bytes(50), b"<svg/>", bytes(9999))),
        )
        if self.rng.random() < 0.3:
            junk = (
                b"",
                b"--x\r\n",
                b"--x--",
                b"--x\r\ncontent-disposition: form-data; name=files; filename=" + b"y" * 9000,
            )
            heads = {"content-type": self.rng.choice(("multipart/form-data; boundary=x", "multipart/form-data", "x"))}
            return self.session.post("/gradio_api/upload", content=self.rng.choice(junk), headers=heads)
        field = self.rng.choice(("files", "files", "file", "", "x"))
        return self.session.post(
            f"/gradio_api/upload?upload_id={self.rng.choice(('', 'x', '../x'))}", files={field: (name, data)}
        )

    def path(self):
        """Paths that lead out, with odd methods and heads."""
        path = self.rng.choice(PATHS).format(self.rng.choice(TARGETS))
        method = self.rng.choice(("GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "QUERY"))
        return self.session.request(method, path, headers=self.heads())

    def heads(self):
        """Up to three odd heads."""
        heads = {}
        for chosen in self.rng.sample(HEADS, self.rng.randint(0, 3)):
            heads |= chosen
        return {name.encode(): value.encode("latin-1") for name, value in heads.items()}

    def body(self):
        """Bodies that are too big, too deep, or no JSON."""
        name = self.rng.choice(("call/estimate", "call/submit", "run/predict", "queue/join", "cancel"))
        deep = 20_000
        bodies = (
            b"[" * deep, b'{"data":' * deep, b'{"data":[' + b"[" * deep + b"]" * deep + b"]}", b"x" * 300_000,
            b"\xff\xfe",
            b'{"data":[NaN]}', b'{"data":[{"seed":Infinity,"prompt":"x"}]}', b'{"data":[1e9999]}',
            b'{"data":[' + b"9" * 5000 + b"]}",
            b'{"data":["\\ud800"]}', b'{"data":[{"prompt":"\\ud800"}]}', b'{"data":', b"", b"null", b"[]", b'"x"',
            b"7",
            b'{"data":[' + b'{"prompt":"' + b"a" * 200_000 + b'"}]}', b'{"data":[{"a":1,"a":2}]}',
            b'{"data":[' + b"[]," * 40_000 + b"1]}",
        )  # fmt: skip
        return self.post(
            f"/gradio_api/{name}", self.rng.choice(bodies), headers=self.rng.choice(({}, {"accept": "text/html"}))
        )

    def foreign(self):
        """From another site or under another name."""
        heads = self.rng.choice(
            (
                {"host": "evil.example"}, {"host": ""}, {"host": "127.0.0.1.evil.example"},
                {"host": "evil.example:80@127.0.0.1"},
                {"host": "[::1"}, {"origin": "http://evil.example"}, {"origin": "null"},
                {"origin": "http://127.0.0.1:1"},
                {"origin": "x" * 999}, {"origin": "http://[::1"},
            )
        )  # fmt: skip
        return self.post(f"/gradio_api/call/{self.rng.choice(NAMED)}", {"data": [{}]}, headers=heads)

    def one(self):
        """(what was sent, the answer); 413 where the server hangs up in the middle of a body that is too large."""
        kinds = {
            "named": 34, "private": 36, "queue": 5, "upload": 6, "path": 12, "body": 4, "foreign": 3
        }  # fmt: skip
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        try:
            return kind, getattr(self, kind)()
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError) as hung_up:
            sent = hung_up.request
            if len(sent.content) > JSON_BYTES:
                return kind, httpx.Response(413, request=sent)
            return kind, self.session.send(sent)  # the connection was closed behind the large body before this one


@pytest.fixture(scope="module")
def watched(start_app, tmp_path_factory):
    """An app with a home of its own whose web process notes what it writes and whom it calls."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    paths = os.pathsep.join([str(WATCH), str(ROOT), str(ROOT / "kernels")])
    made = start_app(
        folder, PYTHONPATH=paths, WATCH_FILE=str(folder / "watched"), HOME=str(folder / "home"),
        TMPDIR=str(folder / "tmp"),
        PYTHONDONTWRITEBYTECODE="1", XDG_CACHE_HOME=str(folder / "home" / "cache"),
    )  # fmt: skip
    made.folder = folder
    yield made
    made.stop()


def notes(app):
    """What the web process did: (event, subject)."""
    return [json.loads(line) for line in (app.folder / "watched").read_text("utf-8").splitlines()]


def tree(folder):
    """Every file and its size and time."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def is_inside(app, path):
    return any(Path(path).is_relative_to(home) for home in (app.state, app.outputs, "/dev"))


def test_no_payload_breaks_the_server_or_leaves_its_folders(watched):
    homes = [watched.folder / "home", watched.folder / "tmp"]
    before, started = [tree(home) for home in homes], len(notes(watched))
    bad, seen = [], Counter()
    with httpx.Client(base_url=watched.url, timeout=60) as session:
        fuzzer = Fuzzer(Wires(watched.url), session, seed=5)
        for number in range(COUNT):
            kind, answer = fuzzer.one()
            seen[kind, answer.status_code] += 1
            if answer.status_code >= 500 or (kind == "foreign" and answer.status_code != 403):
                sent = answer.request
                bad.append(
                    (number, answer.status_code, f"{sent.method} {sent.url}"[:90], sent.content[:300], answer.text[:90])
                )
    assert not bad, (len(bad), seen, bad[:12])
    assert httpx.get(f"{watched.url}/healthz").status_code == 200
    assert [tree(home) for home in homes] == before
    done = notes(watched)[started:]
    assert any(event == "open" for event, _ in done)  # the watch works
    written = [subject for event, subject in done if event == "open"]
    written += [
        path
        for event, subject in done
        if event.startswith(("os.", "shutil.")) and event != "os.system"
        for path in subject
    ]
    assert not [path for path in written if not is_inside(watched, path)]
    assert not [subject for event, subject in done if event.startswith("socket.") or event in ("os.system", "os.exec")]


def test_nothing_was_called_at_the_start_either(watched):
    calls = [subject for event, subject in notes(watched) if event.startswith("socket.")]
    assert not [call for call in calls if "127.0.0.1" not in str(call) and "localhost" not in str(call)]


def test_every_traceback_in_the_log_is_a_refusal_of_gradios(watched):
    lines = [line.partition(" web ")[2] for path in watched.state.glob("*.log") for line in path.open(encoding="utf-8")]
    starts = [place for place, line in enumerate(lines) if line.startswith("Traceback")]
    ends = [next((line for line in lines[place + 1 :] if not line.startswith(" ")), "cut off") for place in starts]
    assert lines and not [end for end in ends if not end.startswith("gradio.exceptions.Error")]


def test_the_web_process_stays_small(watched):
    children = psutil.Process(watched.process.pid).children(recursive=True)
    web = next(child for child in children if "webui.server" in child.cmdline())
    assert web.memory_info().rss < 400e6


def test_wrong_logins_are_stopped_also_for_the_right_password_and_the_bearer(start_app, tmp_path, request):
    app = start_app(tmp_path, "--password", "open sesame")
    request.addfinalizer(app.stop)
    start = httpx.post(f"{app.url}/login", data={"password": "open sesame"})
    assert start.status_code == 200
    tries = [httpx.post(f"{app.url}/login", data={"password": str(n)}).status_code for n in range(8)]
    assert tries == [401] * 5 + [429] * 3  # five wrong ones a minute; the right one is no guess
    assert httpx.post(f"{app.url}/login", data={"password": "open sesame"}).status_code == 429
    assert httpx.get(app.url, headers={"authorization": "Bearer open sesame"}).status_code == 429
    assert httpx.get(app.url, cookies=start.cookies, follow_redirects=True).status_code == 200  # who is in stays in
    for path in ("/config", "/zh/config", "/gradio_api/info", "/media/x", "/seeds.md", "/support.zip"):
        assert httpx.get(app.url + path).status_code == 401, path
