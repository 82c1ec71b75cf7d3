"""What an agent is offered with `--mcp`: the seven calls of the API, and nothing that ends or deletes anything."""

import json
import re

import httpx
import pytest


@pytest.fixture(scope="module")
def served(start_app, tmp_path_factory):
    pytest.importorskip("mcp", reason="the optional package mcp is not installed")
    made = start_app(tmp_path_factory.mktemp("mcp"), "--mcp")
    yield made
    made.stop()


def call(app, method, **params):
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    heads = {"accept": "application/json, text/event-stream"}
    answer = httpx.post(f"{app.url}/gradio_api/mcp/", json=body, headers=heads, timeout=60)
    assert answer.status_code == 200, answer.text
    return json.loads(re.search(r"data: (.*)", answer.text).group(1))["result"]


def test_agents_get_the_six_calls_of_the_api_and_no_other(served):
    names = {tool["name"] for tool in call(served, "tools/list")["tools"]}
    assert names == {"estimate", "submit", "status", "cancel", "list_jobs", "result", "export"}


def test_an_agent_can_ask_what_would_run(served):
    answer = call(served, "tools/call", name="estimate", arguments={"fields": {"prompt": "a red circle moves right"}})
    assert "'band': 'fits'" in answer["content"][0]["text"]


def test_without_the_flag_there_is_nothing_to_talk_to(app):
    assert httpx.post(f"{app.url}/gradio_api/mcp/", json={}, timeout=30).status_code in (404, 405, 422)
