"""What the first load of the page costs the network, beside a bare page of Gradio's in the same browser."""

import subprocess
import sys

import pytest
from conftest import free_port, wait_until_open

pytestmark = pytest.mark.browser
MOST_REQUESTS, MOST_BYTES, MOST_RATIO = 30, 250_000, 1.6  # beside Gradio's own; of both
BARE = """
import sys
import gradio as gr
with gr.Blocks() as page:
    prompt, go, clip = gr.Textbox(), gr.Button("Generate", elem_id="go"), gr.Video()
    go.click(lambda prompt: None, prompt, clip)
page.launch(server_port=int(sys.argv[1]), quiet=True)
"""


@pytest.fixture(scope="module")
def bare():
    """The address of a page that has a prompt, a button and a player."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", BARE, str(port)])
    wait_until_open(process, port)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


def first_load(chromium, url, shown):
    """Requests and bytes on the wire of a browser that was never here, until `shown` is seen."""
    context = chromium.new_context(locale="en-US")
    page = context.new_page()
    wire, sizes = context.new_cdp_session(page), []
    wire.send("Network.enable")
    wire.on("Network.loadingFinished", lambda told: sizes.append(told["encodedDataLength"]))
    page.goto(url)
    page.wait_for_selector(shown, timeout=90_000)
    page.wait_for_load_state("load")
    context.close()
    return len(sizes), sum(sizes)


def test_the_first_load_stays_near_that_of_a_bare_page(chromium, app, bare):
    requests, size_bytes = first_load(chromium, bare, "#go")
    our_requests, our_bytes = first_load(chromium, app.url, "#meter .td-meter")
    print(f"{our_requests} requests, {our_bytes} bytes; bare {requests}, {size_bytes}")
    assert our_requests <= min(requests + MOST_REQUESTS, requests * MOST_RATIO)
    assert our_bytes <= min(size_bytes + MOST_BYTES, size_bytes * MOST_RATIO)
