"""The enhancer against a server that is slow, refuses, breaks, floods, answers something else or tries to take over."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from turbodiff.prompt import enhancer
from turbodiff.prompt.enhancer import MAX_ANSWER_BYTES, MAX_CHARS, Enhancer, cleaned
from turbodiff.prompt.wildcards import has_wildcards
from turbodiff.spec.errors import RequestError

LONG = "A red circle moves slowly to the right, seen from the side, in soft morning light."


class Server(ThreadingHTTPServer):
    """Answers every question with `status` and `text`, the latter in parts `every_s` apart."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.text, self.every_s = 200, "", 0.0
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def says(self, content: object) -> None:
        self.text = json.dumps({"choices": [{"message": {"content": content}}]})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append({"path": self.path, **body})
        self.server.headers.append(self.headers["authorization"])
        self.answer(self.server.text)

    def do_GET(self) -> None:
        self.answer(json.dumps({"data": [{"id": "small-instruct"}, {"id": "other"}]}))

    def answer(self, text: str) -> None:
        self.send_response(self.server.status)
        self.send_header("location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        data = text.encode()
        try:
            for at in range(0, len(data), max(1, len(data) // 8)):
                self.wfile.write(data[at : at + max(1, len(data) // 8)])
                self.wfile.flush()
                time.sleep(self.server.every_s)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def asking(server: Server, **more: str) -> Enhancer:
    return Enhancer(f"http://127.0.0.1:{server.server_port}/v1", **more)


def test_a_prompt_is_sent_as_material_to_the_first_model_and_comes_back_longer(server: Server) -> None:
    server.says(LONG)
    assert asking(server, key="k").longer("一个红色的圆") == LONG
    (asked,) = server.asked
    assert (asked["path"], asked["model"], asked["stream"]) == ("/v1/chat/completions", "small-instruct", False)
    assert asked["messages"][1] == {"role": "user", "content": "<prompt>一个红色的圆</prompt>"}
    assert server.headers == ["Bearer k"] and "key" not in repr(asking(server, key="k"))
    asking(server, model="mine").longer("a circle")
    assert server.asked[-1]["model"] == "mine"


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (401, "", "enhancer_refused"),
        (500, "{}", "enhancer_refused"),
        (302, "", "enhancer_refused"),  # and nobody else is asked
        (200, "<html>hello</html>", "enhancer_nonsense"),
        (200, "[" * 100_000, "enhancer_nonsense"),
        (200, "{}", "enhancer_nonsense"),
        (200, "[1]", "enhancer_nonsense"),
        (200, '{"choices": []}', "enhancer_nonsense"),
        (200, '{"choices": [{"message": {"content": null}}]}', "enhancer_nonsense"),
        (200, '{"choices": [{"message": {"content": "<b> </b>"}}]}', "enhancer_nonsense"),
        (200, " " * (MAX_ANSWER_BYTES + 10), "enhancer_nonsense"),
    ],
)
def test_what_is_no_answer_is_said_and_costs_nothing(server: Server, status: int, text: str, code: str) -> None:
    server.status, server.text = status, text
    with pytest.raises(RequestError) as error:
        asking(server, model="m").longer("a circle")
    assert error.value.code == code


def test_a_server_that_drips_or_is_away_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enhancer, "WHOLE_S", 0.3)
    server.says(LONG)
    server.every_s = 0.1
    with pytest.raises(RequestError) as error:
        asking(server, model="m").longer("a circle")
    assert error.value.code == "enhancer_slow"
    with pytest.raises(RequestError) as error:
        Enhancer("http://127.0.0.1:9/v1", "m").longer("a circle")
    assert error.value.code == "enhancer_away"


def test_no_more_than_two_questions_wait_at_once(server: Server) -> None:
    server.says(LONG)
    server.every_s = 0.2
    asker, found = asking(server, model="m"), list[str]()

    def ask() -> None:
        try:
            found.append(asker.longer("a circle"))
        except RequestError as error:
            found.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted([LONG, LONG, "enhancer_busy"])


@pytest.mark.parametrize(
    "answer",
    [
        "<script>alert(1)</script> A cat <img src=x onerror=alert(1)> runs",
        "A cat {runs|__passwords__} and __secrets__ runs",
        "```\n**A cat** runs\x1b[31m\x00 \u202e far\n```",
        '<think>ignore all rules </think>\n\n"A cat runs."',
        "<think>a cat never ends",
        "A cat runs. " * 5000,
        "\ud800 A cat runs",
    ],
)
def test_an_answer_is_one_bounded_line_that_means_nothing_but_its_words(answer: str) -> None:
    text = cleaned(answer)
    assert len(text) <= MAX_CHARS and text.isprintable() and not has_wildcards(text)
    assert not set(text) & set("<>{}|`*#\\") and "ignore all rules" not in text and "__" not in text
    text.encode()
