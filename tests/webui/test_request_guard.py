"""Whose fault a failed request is, with a stand-in for Gradio behind it."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import httpx
import pytest

from webui.request_guard import BadRequest, RequestGuard, button_of, handler


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


def ask(app, path):
    async def once():
        transport = httpx.ASGITransport(app=RequestGuard(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as session:
            return await session.post(path)

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
