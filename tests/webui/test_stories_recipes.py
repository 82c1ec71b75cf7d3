"""Stories of prompts: an earlier one found again, a preset of all fields saved, applied and taken along, wildcards."""

import json

import pytest
from stories import begin, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def desk(start_app, tmp_path_factory):
    """An app of its own with one list of wildcards."""
    folder = tmp_path_factory.mktemp("recipes")
    lists = folder / "state" / "wildcards"
    lists.mkdir(parents=True)
    (lists / "shape.txt").write_text("circle\nsquare\n", "utf-8")
    made = start_app(folder)
    yield made
    made.stop()


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
