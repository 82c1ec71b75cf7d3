"""Stories of prompts: one lengthened, an earlier one found again, a preset saved, applied and exported, wildcards."""

import json

import pytest
from stories import begin, tab, wait_done, write_prompt

from tests.prompt.test_enhancer import Server

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def desk(start_app, tmp_path_factory):
    """An app of its own with one list of wildcards."""
    folder = tmp_path_factory.mktemp("recipes")
    lists = folder / "state" / "wildcards"
    lists.mkdir(parents=True)
    (lists / "shape.txt").write_text("circle\nsquare\n", "utf-8")
    server = Server()  # answers prompts, slowly
    server.says("A red circle glides slowly to the right across a deep black background. <b>{now|then}</b>")
    server.every_s = 0.4
    made = start_app(folder, "--enhancer", f"http://127.0.0.1:{server.server_port}/v1")
    yield made
    made.stop()
    server.shutdown()
    server.server_close()


def test_wildcards_are_chosen_and_the_prompt_as_it_was_written_is_found_again(desk, chromium):
    with tab(chromium, desk) as page:
        write_prompt(page, "a {red|blue} __shape__ moves right")
        job = wait_done(desk, begin(page, desk))
        assert job.request.prompt in {f"a {c} {s} moves right" for c in ("red", "blue") for s in ("circle", "square")}
        write_prompt(page, "another prompt")
        page.click("#recipes button >> nth=0")
        page.fill("#recall input, #recall textarea", "__shape__ red")
        page.click("#prompt-list .what:has-text('__shape__')")
        page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('a {red|blue}')")
        write_prompt(page, "a __nothing__ moves")
        page.click("#go")
        page.wait_for_selector("#note :text('__shape__')")


def test_a_preset_is_saved_applied_taken_along_and_deleted(desk, chromium, tmp_path):
    with tab(chromium, desk) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        write_prompt(page, "a green square")
        page.fill("#seed input, #seed textarea", "77")
        page.click("#recipes button >> nth=0")
        page.fill("#preset-name", "夜 1")
        page.click("[data-form=save_preset]")
        page.wait_for_selector("#presets [data-preset='夜 1']")
        page.reload()
        page.wait_for_selector("#meter .td-meter")
        write_prompt(page, "something else")
        page.click("#recipes button >> nth=0")
        page.click("#presets [data-preset='夜 1'] [data-form=preset]")
        page.wait_for_function("document.querySelector('#prompt textarea').value === 'a green square'")
        assert page.input_value("#seed input, #seed textarea") == "77"
        with page.expect_download() as saved:
            page.click("#presets a[download]")
        saved.value.save_as(tmp_path / "presets.json")
        assert json.loads((tmp_path / "presets.json").read_text("utf-8"))["夜 1"]["seed"] == "77"
        page.click("#presets [data-act=delete_preset]")
        page.wait_for_selector("#presets [data-preset]", state="detached")
        with page.expect_file_chooser() as chooser:
            page.click("#preset-file")
        chooser.value.set_files(tmp_path / "presets.json")
        page.wait_for_selector("#presets [data-preset='夜 1']")


def test_a_prompt_is_lengthened_beside_the_persons_own_while_generate_works_and_one_click_undoes(desk, chromium):
    mine, box = "a red circle moves right", "#prompt textarea"
    with tab(chromium, desk) as page:
        page.fill("#seed textarea, #seed input", "41")
        write_prompt(page, mine)
        page.click("#longer-go")
        page.wait_for_selector("#longer:has-text('Generate works meanwhile')")
        assert wait_done(desk, begin(page, desk)).request.prompt == mine  # it was not waited for
        page.wait_for_selector("#longer ins:has-text('slowly')")
        assert page.input_value(box) == mine and not page.locator("#longer b b").count()
        page.click("#longer .main")
        page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('A red circle glides')")
        assert not set(page.input_value(box)) & set("{}|<>")
        assert page.input_value("#seed textarea, #seed input") == "41"
        page.click("#longer button:has-text('Back to mine')")
        page.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(mine)}")
        page.click(".td-examples .td-btn >> nth=1")
        page.wait_for_function(f"document.querySelector('#prompt textarea').value !== {json.dumps(mine)}")
        page.click("#undo-form button")
        page.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(mine)}")
