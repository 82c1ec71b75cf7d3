"""Whose fault a failed request is, with a stand-in for Gradio behind it."""

import asyncio
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import anyio.to_thread
import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Route

from webui import api, server
from webui.request_guard import BadRequest, GuardedBlocks, RequestGuard, button_of, handler


def answers(status, ran=()):
    """An app that calls handlers and then answers `status`; 0 is an exception without an answer."""

    async def app(scope, receive, send):
        for function in ran:
            with contextlib.suppress(BadRequest):
                function()
        if not status:
            raise KeyError("fn_index")
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    return app


def ask(app, path, **given):
    async def once():
        transport = httpx.ASGITransport(app=RequestGuard(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as session:
            return await session.post(path, **given)

    with ThreadPoolExecutor(1) as beside:  # a browser test before us may have left a loop in this thread
        return beside.submit(asyncio.run, once()).result()


@handler
def works():
    return 1


@handler
def refuses():
    raise BadRequest("no form of ours holds that")


def test_a_failure_before_a_handler_ran_is_the_requests_own():
    assert ask(answers(500), "/gradio_api/run/predict").status_code == 422
    assert ask(answers(0), "/zh/gradio_api/run/predict").status_code == 422


def test_a_failure_after_a_handler_ran_is_ours():
    assert ask(answers(500, [works]), "/gradio_api/run/predict").status_code == 500
    with pytest.raises(KeyError):
        ask(answers(0, [works]), "/gradio_api/run/predict")


def test_what_a_handler_calls_nonsense_is_the_requests_own():
    assert ask(answers(500, [refuses]), "/gradio_api/run/predict").status_code == 422


def test_good_answers_and_routes_of_our_own_pass_as_they_are():
    assert ask(answers(200, [works]), "/gradio_api/run/predict").status_code == 200
    assert ask(answers(500), "/media/clip").status_code == 500


@pytest.mark.parametrize("path", ["proxy=http://evil", "component_server", "vibe-edit/", "runs", "dev/reload", ""])
def test_routes_that_nobody_needs_are_closed(path):
    assert ask(answers(200), f"/gradio_api/{path}").status_code == 404
    assert ask(answers(200), f"/zh/gradio_api/{path}").status_code == 404


@pytest.mark.parametrize("data", [None, [], "act", {}, {"act": "go"}, 3], ids=repr)
def test_only_buttons_of_page_js_are_listened_to(data):
    with pytest.raises(BadRequest):
        button_of(gr.EventData(None, data))


def test_a_handler_keeps_the_signature_that_gradio_reads():
    @handler
    def fill(event: gr.EventData, ui_state: dict):
        return event, ui_state

    assert fill.__annotations__ == {"event": gr.EventData, "ui_state": dict}


@pytest.mark.parametrize("others", [[], [gr.skip()]], ids=["all told", "some skipped"])
def test_the_value_of_an_update_comes_before_its_other_properties(others):
    """Gradio's script awaits something between them, and a field is asked for what it holds meanwhile."""
    with GuardedBlocks() as blocks:
        parts = [gr.Textbox() for _ in range(2 + len(others))]
        answer = [gr.update(placeholder="first", value="a"), gr.update(label="x"), *others]
        blocks.load(lambda: answer, outputs=parts)
    with ThreadPoolExecutor(1) as beside:  # a browser test before us may have left a loop in this thread
        making = blocks.postprocess_data(blocks.default_config.fns[0], answer, None)
        told = beside.submit(asyncio.run, making).result()
    assert next(iter(told[0])) == "value" and told[0]["placeholder"] == "first" and "value" not in told[1]


JSON = json.dumps({"data": [{"prompt": "红色"}]}, ensure_ascii=False)
WAYS = {  # as programs send JSON, each taken by the addresses of Gradio: kind, body, status
    "as it is": ("application/json", JSON.encode(), 200),
    "a charset": ("application/json ; charset=utf-8", JSON.encode(), 200),
    "capitals": ("Application/JSON", JSON.encode(), 200),
    "a kind of JSON": ("application/problem+json", JSON.encode(), 200),
    "a mark before UTF-8": ("application/json", JSON.encode("utf-8-sig"), 200),
    "UTF-16": ("application/json", JSON.encode("utf-16"), 200),
    "a form of another site": ("text/plain", JSON.encode(), 422),
    "nothing said": (None, JSON.encode(), 422),
    "no UTF-8": ("application/json", b'{"data": ["\xff"]}', 422),
    "half of UTF-16": ("application/json", JSON.encode("utf-16")[:-1], 422),
    "no body": ("application/json", b"", 422),
    "half a pair": ("application/json", b'{"data": ["\\ud800"]}', 422),
    "deep": ("application/json", b'{"data": [' + b"[" * 99_999, 422),
    "a long number": ("application/json", b'{"data": [' + b"9" * 5000 + b"]}", 422),
    "a path elsewhere": ("application/json", b'{"data": [{"path": "http://127.0.0.1:9/x"}]}', 422),
}


@pytest.mark.parametrize("way", WAYS)
def test_json_is_taken_however_programs_send_it(way):
    kind, body, status = WAYS[way]
    route = Route("/", partial(api._posted, lambda asked: {"asked": asked}), methods=["POST"])
    answer = ask(Starlette(routes=[route]), "/", content=body, headers={"content-type": kind} if kind else {})
    assert answer.status_code == status
    assert status != 200 or answer.json()["data"] == [{"asked": {"prompt": "红色"}}]


def test_the_page_is_well_while_every_thread_waits_for_the_store():
    app = FastAPI()
    server._add_routes(app, None)

    async def while_none_is_free():
        transport, limiter = httpx.ASGITransport(app=app), anyio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = 1
        limiter.acquire_nowait()
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as session:
            return await asyncio.wait_for(session.get("/healthz"), 5)

    with ThreadPoolExecutor(1) as beside:
        assert beside.submit(asyncio.run, while_none_is_free()).result().status_code == 200
