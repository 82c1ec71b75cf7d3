"""The webhook tells each end once, signed, without the prompt, and never to where an answer points."""

import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from supervisor.bench import request, wait_until

from turbodiff.diagnostics import webhook
from turbodiff.diagnostics.webhook import KEY, Webhook
from turbodiff.jobs.attempts import claim, finish_job, move_job
from turbodiff.jobs.store import Store
from turbodiff.jobs.users import User, add_user
from turbodiff.spec.clips import ClipResult
from turbodiff.spec.errors import RequestError
from turbodiff.spec.events import JobError
from turbodiff.spec.page_flags import as_flags, check_flags, page_parser


class Endpoint(ThreadingHTTPServer):
    """Keeps what it is sent and answers as it is told: a status, or seconds of silence before one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.heard: list[tuple[str, bytes, dict[str, str]]] = []
        self.answers: list[int | float] = []
        self.url = f"http://127.0.0.1:{self.server_port}/hook?token=1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.heard.append((self.path, body, {name.lower(): value for name, value in self.headers.items()}))
        answer = self.server.answers.pop(0) if self.server.answers else 204
        if isinstance(answer, float):
            time.sleep(answer)
            answer = 204
        self.send_response(answer)
        if answer == 302:
            self.send_header("location", "/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(webhook, "POLL_S", 0.05)
    monkeypatch.setattr(webhook, "RETRY_S", (0.01, 0.01))
    made = Endpoint()
    yield made
    made.shutdown()
    made.server_close()


def listening(store: Store, endpoint: Endpoint, said: list[str] | None = None) -> Webhook:
    """A webhook that has seen what ended before it."""
    hook = Webhook(store.path.parent, endpoint.url, (said if said is not None else []).append)
    assert wait_until(lambda: isinstance(store.fact(webhook.TOLD), list), 10)
    return hook


def end(store: Store, state: str, user: str = "") -> int:
    store.submit(request("a secret prompt", seed=5), user=user)
    job = claim(store)
    assert job
    if state == "done":
        finish_job(store, job.id, job.attempt, ClipResult(path="/home/me/clips/one.mp4", frames=9))
    else:
        move_job(store, job.id, job.attempt, "failed", error=JobError(code="oom", what="at /home/me"))
    return job.id


def test_each_end_is_told_once_signed_and_without_prompt_or_path(store: Store, endpoint: Endpoint) -> None:
    end(store, "done")  # before there was a webhook
    hook = listening(store, endpoint)
    done, failed = end(store, "done"), end(store, "failed")
    cancelled = store.submit(request())
    store.cancel(cancelled)
    assert wait_until(lambda: len(store.fact(webhook.TOLD)) == 3, 10)
    hook.close()
    assert len(endpoint.heard) == 2
    key = (store.path.parent / KEY).read_text().strip().encode()
    assert (store.path.parent / KEY).stat().st_mode & 0o077 == 0
    told = {}
    for path, body, headers in endpoint.heard:
        assert path == "/hook?token=1" and b"secret" not in body and b"/home" not in body
        assert headers["x-turbodiff-signature"] == "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
        said = json.loads(body)
        told[said["job"]] = (said["state"], said["clip"], said["error"], said["seed"])
    assert told == {done: ("done", "one.mp4", "", 5), failed: ("failed", "", "oom", 5)}
    later = end(store, "done")  # while the page is down
    again = listening(store, endpoint)
    assert wait_until(lambda: len(endpoint.heard) == 3, 10)
    again.close()
    assert json.loads(endpoint.heard[-1][1])["job"] == later


def test_a_failure_that_may_pass_is_tried_three_times_and_a_redirect_is_not_followed(
    store: Store, endpoint: Endpoint
) -> None:
    said: list[str] = []
    hook = listening(store, endpoint, said)
    endpoint.answers = [500, 503, 429]
    end(store, "done")
    assert wait_until(lambda: len(said) == 3, 10)
    assert len({headers["x-turbodiff-delivery"] for *_, headers in endpoint.heard}) == 1
    endpoint.answers = [302]
    job = end(store, "done")
    assert wait_until(lambda: hook.last == f"{job} done 302", 10)
    hook.close()
    assert [path for path, *_ in endpoint.heard] == ["/hook?token=1"] * 4


def test_a_silent_address_holds_up_no_job(store: Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.2)
    hook = listening(store, endpoint)
    endpoint.answers = [1.0] * 3
    end(store, "done")
    assert wait_until(lambda: bool(endpoint.heard), 10)
    end(store, "done")  # meanwhile
    assert wait_until(lambda: hook.last.endswith("done 204"), 20)
    hook.close()
    nobody = Webhook(store.path.parent, "http://127.0.0.1:9/", print)
    end(store, "failed")
    assert wait_until(lambda: nobody.last.endswith("ConnectError"), 10)
    nobody.close()


@pytest.mark.parametrize("url", ["ftp://a/b", "file:///etc/passwd", "http://", "//a", "http://a b/", "http://a:99999/"])
def test_an_address_that_is_none_is_refused_at_the_start(url: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="http"):
        check_flags(page_parser().parse_args([f"--webhook={url}"]))


def test_the_address_is_among_the_flags_of_a_service() -> None:
    args = page_parser().parse_args(["--webhook", "https://me.example/hook"])
    check_flags(args)
    assert "--webhook=https://me.example/hook" in as_flags(args)


def test_a_users_address_is_told_of_their_jobs_alone_signed_with_their_key_and_the_time(
    store: Store, endpoint: Endpoint
) -> None:
    _, anna = add_user(store, User(name="anna", webhook=endpoint.url + "&of=anna"))
    add_user(store, User(name="ben", webhook="http://127.0.0.1:9/"))  # nobody answers, and nobody else waits for it
    said: list[str] = []
    hook = Webhook(store.path.parent, "", said.append)
    assert wait_until(lambda: isinstance(store.fact(webhook.TOLD), list), 10)
    end(store, "done")
    end(store, "done", user="ben")
    mine = end(store, "failed", user="anna")
    assert wait_until(lambda: len(store.fact(webhook.TOLD)) == 3, 20)
    hook.close()
    ((path, body, headers),) = endpoint.heard
    assert path.endswith("of=anna") and (json.loads(body)["job"], json.loads(body)["user"]) == (mine, "anna")
    signed = f"{headers['x-turbodiff-timestamp']}.".encode() + body
    expected = "sha256=" + hmac.new(anna.webhook_key.encode(), signed, hashlib.sha256).hexdigest()
    assert headers["x-turbodiff-signed"] == expected
    assert abs(time.time() - int(headers["x-turbodiff-timestamp"])) < 60 and anna.webhook_key not in "".join(said)


def test_an_answer_that_trickles_ends_at_the_deadline_of_a_try(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read brings a byte, so that no timeout of a read ever passes."""
    monkeypatch.setattr(webhook, "POLL_S", 0.05)
    monkeypatch.setattr(webhook, "RETRY_S", ())
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            peer, _ = server.accept()
            with peer, suppress(OSError):
                while True:
                    peer.sendall(b"H")
                    time.sleep(0.1)

        threading.Thread(target=trickle, daemon=True).start()
        hook = Webhook(store.path.parent, f"http://127.0.0.1:{server.getsockname()[1]}/", lambda line: None)
        assert wait_until(lambda: isinstance(store.fact(webhook.TOLD), list), 10)
        end(store, "done")
        assert wait_until(lambda: hook.last.endswith("TimeoutError"), 20)
        hook.close()


@pytest.mark.parametrize("url", ["http://xn--zzzz--/", f"http://127.0.0.1:9/{'a' * 70_000}", "http://..../"])
def test_an_address_that_nothing_can_be_sent_to_holds_up_no_other(url: str, store: Store, endpoint: Endpoint) -> None:
    add_user(store, User(name="anna", webhook=url))
    said: list[str] = []
    hook = listening(store, endpoint, said)
    job = end(store, "done", user="anna")
    assert wait_until(lambda: len(store.fact(webhook.TOLD)) == 1, 20), said
    hook.close()
    assert [json.loads(body)["job"] for _, body, _ in endpoint.heard] == [job]


def test_who_ends_later_is_told_while_an_address_with_many_ends_to_hear_of_is_silent(
    store: Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=99) as silent:  # connects, and never answers
        add_user(store, User(name="anna", webhook=f"http://127.0.0.1:{silent.getsockname()[1]}/"))
        add_user(store, User(name="ben", webhook=endpoint.url))
        monkeypatch.setattr(webhook, "TIMEOUT_S", 600.0)
        hook = Webhook(store.path.parent, "", lambda line: None)
        assert wait_until(lambda: isinstance(store.fact(webhook.TOLD), list), 10)
        end(store, "done", user="anna")
        silent.settimeout(20)
        with silent.accept()[0]:  # its first delivery is under way
            mine = end(store, "done", user="ben")
            assert wait_until(lambda: len(store.fact(webhook.TOLD)) == 1, 20)
        hook.close()
    assert [json.loads(body)["job"] for _, body, _ in endpoint.heard] == [mine]
