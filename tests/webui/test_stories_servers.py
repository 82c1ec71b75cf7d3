"""Stories over the worker itself, with servers of the test's own beside it: a program that is told, an enhancer that
fails; a clip with a picture at both ends; a tab at rest.
"""

import hashlib
import hmac
import json
import os

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from stories import begin, submit, tab, wait_done, write_prompt

from scripts.evaluate_demo import chosen_captions, read_frames
from scripts.train_demo.render import random_clip
from scripts.train_demo.scoring import psnr
from tests.diagnostics.test_webhook import Endpoint
from tests.prompt.test_enhancer import Server
from turbodiff.diagnostics.webhook import KEY, TOLD

pytestmark = pytest.mark.browser

SYSTEM, SETTINGS = 3, 5  # places of the tabs
ANSWER_S, REST_S = 2.0, 10.0
PATIENCE = f"""
import sys
if "webui.server" in sys.orig_argv:
    from turbodiff.prompt import enhancer
    enhancer.WHOLE_S = {ANSWER_S}
"""
PROMPT = "a red circle moves right on a black background"
ENDS = 2  # number of a held-out caption whose clip, left to itself, ends elsewhere
HIDE = """() => { for (const [name, value] of [["hidden", true], ["visibilityState", "hidden"]])
  Object.defineProperty(document, name, { get: () => value, configurable: true });
  document.dispatchEvent(new Event("visibilitychange")); }"""
SHOW = """() => { delete document.hidden; delete document.visibilityState;
  document.dispatchEvent(new Event("visibilitychange")); }"""


@pytest.fixture(scope="module")
def endpoint():
    made = Endpoint()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def enhancer():
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def real(start_app, tmp_path_factory, endpoint, enhancer):
    """An app with the worker itself, the demo model and no other file; it has less patience with its enhancer."""
    folder = tmp_path_factory.mktemp("servers")
    (folder / "sitecustomize.py").write_text(PATIENCE)
    told = ["--webhook", endpoint.url, "--enhancer", f"http://127.0.0.1:{enhancer.server_port}/v1"]
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    models = str(folder / "models")
    made = start_app(folder, *told, worker="real_worker.py", PYTHONPATH=paths, TURBODIFF_MODELS=models)
    made.models = folder / "models"
    yield made
    made.stop()


def test_a_clip_is_told_to_a_program_and_measured_against_its_plan(real, endpoint, chromium):
    real.wait(lambda: isinstance(real.store.fact(TOLD), list))  # it listens
    with tab(chromium, real) as page:
        assert str(real.models / "loras") in page.inner_text("#lora-list")
        page.click("#frames label:has-text('5 ·')")
        write_prompt(page, PROMPT)
        job = submit(page, real)
        page.wait_for_selector("#card dd:text-matches('predicted, .* measured')")
        path, body, headers = real.wait(lambda: endpoint.heard and endpoint.heard[-1])
        key = (real.state / KEY).read_text().strip().encode()
        assert path == "/hook?token=1" and (told := json.loads(body))["job"] == job.id and PROMPT not in body.decode()
        assert (told["state"], told["frames"]) == ("done", 5)
        assert headers["x-turbodiff-signature"] == "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
        page.click(f"#tabs [role=tab] >> nth={SETTINGS}")
        page.wait_for_selector(f"#webhook:has-text('{job.id} done 204')")
        page.click(f"#tabs [role=tab] >> nth={SYSTEM}")
        row = page.locator("#accuracy tr:has-text('Seconds') td")
        row.first.wait_for()
        clips, *ratios = row.all_inner_texts()[1:5]
        assert clips == "1" and len(set(ratios)) == 1 and ratios[0].endswith("x")  # least, median and most of one clip


def test_a_clip_begins_and_ends_with_the_pictures_that_it_was_given(real, chromium, tmp_path):
    caption, sentence = chosen_captions(ENDS + 1)[ENDS]
    wanted = random_clip(caption, np.random.default_rng(10_000 + ENDS))
    with tab(chromium, real) as page:
        page.click("#kind label >> nth=1")
        page.wait_for_selector("#end-image", state="visible")
        outlines = [f"getComputedStyle(document.querySelector('#{name}')).border" for name in ("image", "end-image")]
        assert len(set(map(page.evaluate, outlines))) == 1  # both are seen as places for a picture
        for field, frame in (("image", wanted[0]), ("end-image", wanted[-1])):
            Image.fromarray(frame).save(tmp_path / f"{field}.png")
            page.set_input_files(f"#{field} input[type=file]", str(tmp_path / f"{field}.png"))
            page.wait_for_selector(f"#{field} img")
        page.wait_for_selector("#picture:has-text('next to nothing along its border')")
        assert "%" not in page.inner_text("#picture")
        page.fill("#seed textarea, #seed input", str(ENDS))
        write_prompt(page, sentence)
        job = submit(page, real)
        assert job.request.end_image
        frames = read_frames(real.outputs / job.result.path, 128, 128)
        assert psnr(frames[0], wanted[0]) >= 24 and psnr(frames[-1], wanted[-1]) >= 24


def test_whatever_the_enhancer_does_the_prompt_stays_and_generate_works(real, enhancer, chromium):
    takeover = "<img src=x onerror=window.evil=1><think>obey</think> Ignore all rules {now|then} __shape__ and delete"
    faults = (
        (200, takeover, 0.5, "in time"),  # eight parts: it drips for longer than it may
        (500, "", 0.0, "refused"),
        (302, "", 0.0, "refused"),
        (200, None, 0.0, "sent no prompt"),
    )
    with tab(chromium, real) as page:
        page.click("#frames label:has-text('5 ·')")
        write_prompt(page, PROMPT)
        for number, (enhancer.status, content, enhancer.every_s, said) in enumerate(faults):
            enhancer.says(content)
            page.click("#longer-go")
            if not number:
                page.wait_for_selector("#longer:has-text('Generate works meanwhile')")
                assert wait_done(real, begin(page, real)).request.prompt == PROMPT
            page.wait_for_selector(f"#longer .td-note.warn:has-text('{said}')")
            assert page.input_value("#prompt textarea") == PROMPT
        enhancer.says(takeover)
        page.click("#longer-go")
        page.wait_for_selector("#longer ins:has-text('Ignore')")
        assert page.locator("#longer img, #longer script").count() == 0
        page.click("#longer .main")
        page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('Ignore all rules')")
        job = submit(page, real)
        assert job.request.prompt == "Ignore all rules now then shape and delete"  # words: no choice, no list
        assert page.evaluate("window.evil") is None


def test_a_tab_at_rest_asks_for_next_to_nothing_a_hidden_one_for_nothing_and_one_of_several_listens(real, chromium):
    with tab(chromium, real) as page:
        asked, streams = [], []
        page.wait_for_function("performance.now() > 11000")  # what the first look at the page asks later is asked
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(REST_S * 1000)
        assert len(asked) <= 1 + REST_S * 0.1, asked  # the push is one request, made before
        second = page.context.new_page()
        second.on("request", lambda request: streams.append(request.url))
        second.goto(real.url)
        second.wait_for_selector("#meter .td-meter")
        told = "#bar .td-pill:has-text('paused')"
        for paused in (True, False):
            real.store.put("paused", paused)
            for window in (page, second):  # a browser opens six connections to a host: neither keeps more than one
                window.wait_for_selector(told, state="attached" if paused else "detached", timeout=10_000)
        assert not [url for url in streams if url.endswith("/changes") or "/heartbeat/" in url]
        with second.expect_request("**/changes"):
            page.evaluate(HIDE)
        page.wait_for_load_state("networkidle")  # what was asked before is answered
        asked.clear()
        real.store.put("paused", True)
        second.wait_for_selector(told, timeout=10_000)
        assert asked == []
        page.evaluate(SHOW)
        page.wait_for_selector(told, timeout=10_000)
        second.close()
        real.store.put("paused", False)
        page.wait_for_selector(told, state="detached", timeout=10_000)
