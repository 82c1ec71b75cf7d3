"""Stories of what misled a newcomer: each on one start of the page, for several claims."""

import json

import pytest
from PIL import Image
from stories import begin, choose, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser

SLOW = json.dumps({"steps": 400, "dt_s": 0.5})  # it is stopped
WATCH = """() => { window.told = []; new MutationObserver(() => document.querySelectorAll('#meter .td-note').forEach(
  (note) => window.told.push(note.textContent))).observe(document.getElementById('meter'),
  {subtree: true, childList: true, characterData: true}); }"""
COVERED = """() => [...document.querySelectorAll('#form span[data-testid=block-info], #alternatives button')]
  .filter(e => e.offsetParent).map(e => [e, e.getBoundingClientRect()])
  .filter(([e, r]) => r.bottom > 0 && r.bottom < innerHeight)
  .filter(([e, r]) => document.elementFromPoint(r.left + 4, r.top + r.height / 2)?.closest('#go-box'))
  .map(([e]) => e.textContent)"""
IN_VIEW = """(() => {{ const r = document.querySelector('{0}').getBoundingClientRect();
  return r.top >= -60 && r.top < 500; }})()"""
SMALL = """() => [...document.querySelectorAll("button, a.td-btn, summary, select, .td-input, fieldset label")]
  .map(e => [e, e.getBoundingClientRect()])
  .filter(([e, r]) => e.offsetParent && r.width > 2 && Math.min(r.width, r.height) < 43.9)
  .map(([e, r]) => `${Math.round(r.width)}x${Math.round(r.height)} ${e.outerHTML.slice(0, 120)}`)"""
CUT_OFF = """() => [...document.querySelectorAll("#queue-list .td-list, #queue-list .td-sec, #progress .td-card")]
  .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"""
BOTTOMS = """() => [...document.querySelectorAll("#advanced .row")].map(row => [...row.querySelectorAll("input")]
  .filter(e => e.offsetParent).map(e => Math.round(e.getBoundingClientRect().bottom))).filter(row => row.length)"""
FOCUS = "document.activeElement.id || document.activeElement.getAttribute('data-arg') || document.activeElement.value"


def test_a_second_job_stands_beside_the_one_that_runs_and_a_stop_is_asked_about(app, chromium):
    with tab(chromium, app) as page:
        write_prompt(page, SLOW)
        first = begin(page, app)
        page.wait_for_selector(f"#progress [data-job='{first}']")
        second = begin(page, app)
        page.wait_for_selector(f"#progress .td-note:has-text('Job {second} is in the queue')")
        assert page.is_visible(f"#progress [data-job='{first}'] .td-prog")
        page.wait_for_selector(f"#queue [data-job='{second}'] .starts")
        for width, least in ((2560, 2200), (1440, 1400), (768, 700), (390, 370)):  # the page takes what room there is
            page.set_viewport_size({"width": width, "height": 1000})
            assert width < 700 or page.locator("#bar").bounding_box()["height"] < 70  # one row, also while a job runs
            assert page.locator("#tabs").bounding_box()["width"] >= least
            assert page.evaluate(CUT_OFF) == []
        page.click(f"#queue [data-job='{second}'] [data-act=cancel]")
        wait_done(app, second, "cancelled")
        asked = []
        page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
        page.click("#progress [data-act=cancel]")
        assert asked and app.store.job(first).state == "running"
        page.once("dialog", lambda dialog: dialog.accept())
        page.click("#progress [data-act=cancel]")
        page.wait_for_selector(f"#note .td-note:has-text('Job {first} is stopped')")
        wait_done(app, first, "cancelled")
        page.click("#tabs [role=tab] >> nth=4")  # what was said stays with its tab
        page.wait_for_selector("#note .td-note", state="hidden")


def test_a_change_of_model_is_one_step_and_its_list_opens_again_after_escape(app, chromium):
    with tab(chromium, app) as page:
        assert "red circle" in page.get_attribute("#prompt textarea", "placeholder")
        assert "tokens" not in page.inner_text("#lint")
        model_y = page.locator("#model").bounding_box()["y"]
        for prompt, tokens in (("a red circle moves right", 8), ("a red circle moves right on a white background", 12)):
            write_prompt(page, prompt)
            page.wait_for_selector(f"#lint:has-text('{tokens} of 512 tokens')")
            assert page.locator("#model").bounding_box()["y"] == model_y  # the count of tokens shifts nothing
        page.click("#advanced > button")
        page.wait_for_selector("#advanced input[aria-label='Shift']")
        assert [len(set(row)) for row in page.evaluate(BOTTOMS)] == [1, 1]  # however their hints wrap
        page.evaluate(WATCH)
        choose(page, "Wan2.1-14B")
        page.wait_for_function("document.querySelector('#prompt textarea').placeholder.includes('cat')")
        page.wait_for_selector(".td-examples :text('astronaut')")
        write_prompt(page, "a red circle moves right on a white background")
        assert page.locator("#lint [data-key=unknown]").count() == 0  # Wan knows it
        choose(page, "Demo")
        page.wait_for_function("document.querySelector('#prompt textarea').placeholder.includes('red circle')")
        page.wait_for_selector("#lint [data-key=unknown]:has-text('white background')")
        assert page.locator(".td-examples :text('astronaut')").count() == 0
        page.click(".td-examples [data-form]:has-text('circle')")
        page.wait_for_selector("#lint [data-key=unknown]", state="detached")
        assert not [said for said in page.evaluate("window.told") if "no resolution" in said]
        page.click("#model input")
        page.wait_for_selector("ul[role=listbox]")
        page.keyboard.press("Escape")
        page.wait_for_selector("ul[role=listbox]", state="detached")
        page.click("#model input")
        page.wait_for_selector("ul[role=listbox]")
        page.keyboard.press("Escape")
        page.wait_for_selector("ul[role=listbox]", state="detached")


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (1920, 1080)])
def test_generate_covers_no_label_and_no_way_out(app, chromium, width, height):
    with tab(chromium, app, viewport={"width": width, "height": height}) as page:
        choose(page, "Wan2.1-14B")
        assert page.evaluate(COVERED) == []
        assert page.is_visible("#verdict .td-verdict")


def test_a_reload_keeps_the_picture_and_the_verdict_stays_on_the_screen(app, chromium, tmp_path):
    Image.new("RGB", (640, 360), "navy").save(tmp_path / "start.png")
    with tab(chromium, app, viewport={"width": 1440, "height": 900}) as page:
        page.click("#kind label >> nth=1")
        page.wait_for_selector("#image", state="visible")
        page.set_input_files("#image input[type=file]", str(tmp_path / "start.png"))
        page.wait_for_selector("#picture .td-figure")
        page.wait_for_timeout(800)
        page.reload()
        page.wait_for_selector("#picture .td-figure")
        box = page.locator("#verdict .td-verdict").bounding_box()
        assert 0 < box["y"] < 900


def test_on_a_phone_generate_and_a_tile_lead_to_what_they_show(app, chromium):
    with tab(chromium, app, viewport={"width": 390, "height": 844}) as page:
        write_prompt(page, json.dumps({"steps": 1}))
        wait_done(app, begin(page, app))
        page.wait_for_function(IN_VIEW.format("#player"))
        page.wait_for_selector("#card .td-stars button")
        assert page.locator("#card .td-stars button").first.bounding_box()["width"] >= 44
        page.evaluate("scrollTo(0, 0)")
        page.click("#tabs [role=tab] >> nth=1")
        page.click("#gallery-grid .td-tile >> nth=0")
        page.wait_for_selector("#side video")
        page.wait_for_function(IN_VIEW.format("#side"))
        for number in range(6):
            page.evaluate(f"document.querySelectorAll('#tabs [role=tab], .overflow-dropdown button')[{number}].click()")
            page.wait_for_timeout(500)
            assert page.evaluate(SMALL) == []


def test_the_keyboard_reaches_generate_and_goes_into_and_out_of_dialogs(app, chromium):
    with tab(chromium, app) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.matches('.skip')")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.closest('#prompt') !== null")
        stops = []
        while "go" not in stops and len(stops) < 12:
            page.keyboard.press("Tab")
            stops.append(page.evaluate(FOCUS))
        assert len(stops) <= 8, stops
        page.focus("#frames input:checked")
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("document.querySelector('#go').innerText.includes('9 frames')")
        page.focus("#go")
        page.keyboard.press("?")
        assert page.evaluate("document.activeElement.closest('#help') !== null")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('#help') !== null")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "go"
        page.click("#bar [data-do=aid]")
        assert page.evaluate("document.activeElement.closest('#aid') !== null")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.closest('#bar') !== null")
        assert page.locator("h1").count() == 1
