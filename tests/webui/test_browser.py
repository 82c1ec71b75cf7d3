"""Stories in a real browser: the page over the real supervisor and store, with a scripted worker."""

import json
import re

import pytest
from literals import LITERAL_ON_THE_PAGE
from stories import begin, choose, newest, submit, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser

CLIP = json.dumps({"steps": 3, "dt_s": 0.2})
LONG = json.dumps({"steps": 60, "dt_s": 4.0})  # outlives two page loads on a busy machine; it is cancelled
OOM = {"error": {"code": "oom", "what": "out of memory", "exit_code": 1}}


def test_a_first_clip_takes_two_clicks(app, chromium):
    with tab(chromium, app) as page:
        page.click("#examples button >> nth=0")
        page.wait_for_function("document.querySelector('#prompt textarea').value.length > 10")
        before = newest(app).id if app.store.jobs(1) else 0
        page.click("#go")
        job = app.wait(lambda: app.store.jobs(1) and newest(app).id > before and newest(app))
        assert job.request.model == "demo"
        wait_done(app, job.id)
        page.wait_for_selector("#player video", timeout=30_000)
        assert "/media/" in page.get_attribute("#player video", "src")
        assert "Demo model" in page.inner_text("#card")


def test_the_button_says_what_will_run(app, chromium):
    with tab(chromium, app, "/zh/") as page:
        assert page.inner_text("#go") == "生成 · Demo 128 17帧"
        page.click("#frames label:has(input[value='9'])")
        page.wait_for_function("document.querySelector('#go').innerText.includes('9帧')")


def test_a_reload_and_a_second_tab_show_the_running_job(app, chromium):
    with tab(chromium, app) as page:
        write_prompt(page, LONG)
        job = begin(page, app)
        page.wait_for_selector(f"#progress [data-job='{job}']", timeout=30_000)
        page.reload()
        page.wait_for_selector(f"#progress [data-job='{job}']", timeout=90_000)
        # the draft comes back, too: the panels come with the page, the draft with its first answer
        page.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(LONG)}")
        with tab(chromium, app, "/zh/") as second:
            second.wait_for_selector(f"#progress [data-job='{job}']", timeout=30_000)
            second.on("dialog", lambda dialog: dialog.accept())
            second.click("#progress [data-act=cancel]")
            wait_done(app, job, "cancelled")  # a tab that is closed at once may not have sent its click


def test_a_lost_network_loses_nothing(app, chromium):
    with tab(chromium, app) as page:
        write_prompt(page, json.dumps({"steps": 4, "dt_s": 0.7}))
        job = begin(page, app)
        page.wait_for_selector(f"#progress [data-job='{job}']", timeout=30_000)
        page.context.set_offline(True)
        wait_done(app, job)
        page.context.set_offline(False)
        page.wait_for_selector("#player video", timeout=60_000)


def test_a_failed_card_leads_to_a_running_clip_in_one_click(app, chromium):
    with tab(chromium, app) as page:
        write_prompt(page, json.dumps({"attempts": [OOM, OOM, OOM, {"steps": 1}]}))
        job = submit(page, app, "parked")
        page.wait_for_selector("#progress .failed [data-act=retry_smaller]", timeout=30_000)
        assert "重启应用" in page.inner_text("#progress .failed")
        page.click("#progress .failed [data-act=retry_smaller]")
        app.wait(lambda: app.store.job(job.id).state == "done")  # the same job: what follows it keeps its place
        assert app.store.job(job.id).request.num_frames == 9


@pytest.fixture(scope="module")
def small_card(start_app, tmp_path_factory):
    """The app on a card of 6 GiB, as far as it knows."""
    made = start_app(tmp_path_factory.mktemp("small"), TURBODIFF_PRETEND_VRAM="6")
    yield made
    made.stop()


def test_what_does_not_fit_is_changed_in_the_open_and_an_alternative_takes_one_click(small_card, chromium):
    with tab(chromium, small_card) as page:
        write_prompt(page, "an astronaut bounces across the moon, the earth turns slowly behind")
        choose(page, "Wan2.1-14B")
        page.click("#resolution label:has(input[value='720p'])")
        page.wait_for_selector("#changes", timeout=20_000)
        assert "14B" in page.inner_text("#go") and "81" not in page.inner_text("#go")
        assert "changes the picture" in page.inner_text("#changes")
        assert page.is_visible("#anyway")
        mark = page.evaluate("getComputedStyle(document.querySelector('#frames label:last-child'), '::after').content")
        assert "✕" in mark
        before = page.inner_text("#go")
        page.click("#alternatives button >> nth=0")
        page.wait_for_function(f"document.querySelector('#go').innerText !== {json.dumps(before)}", timeout=20_000)


@pytest.mark.parametrize("where", ["app", "small_card"])
def test_the_system_tab_says_of_files_what_the_meter_says_of_their_clip(where, request, chromium):
    with tab(chromium, request.getfixturevalue(where)) as page:
        page.click("#tabs [role=tab] >> nth=3")
        row = page.locator("[data-model='Wan2.1-14B'] [data-variant='480p-quant']")
        mark, told = row.locator("[data-mark]").get_attribute("data-mark"), row.inner_text()
        assert "no" not in [one.get_attribute("data-mark") for one in page.locator(".td-variant:has(.main)").all()]
        page.click("#tabs [role=tab] >> nth=0")
        choose(page, "Wan2.1-14B")
        page.wait_for_function("document.querySelector('#go').innerText.includes('14B')")
        page.wait_for_timeout(1000)
        said = page.inner_text("#verdict")
        assert (mark == "no") == ("Does not fit" in said), (told, said)
        page.click("#tabs [role=tab] >> nth=3")
        page.click("#cards [data-arg='80']")
        page.click("#tabs [role=tab] >> nth=0")
        page.wait_for_selector("#pretended:has-text('80 GiB')")
        assert page.get_attribute("#meter .td-meter", "data-band") == "fits"
        assert page.inner_text("#verdict").startswith(said.partition(" ·")[0])  # what Generate does is of this machine


def test_every_model_can_be_chosen_and_left_again(small_card, chromium):
    with tab(chromium, small_card, "/zh/") as page:
        for model in ("Wan2.1-1.3B", "Wan2.1-14B", "Demo"):
            choose(page, model)
        page.click("#kind label >> nth=1")
        page.wait_for_selector("#image", state="visible", timeout=15_000)
        page.wait_for_selector("#meter .td-meter", timeout=15_000)  # no leftover of the model before
        choose(page, "Wan2.2-A14B")
        page.click("#advanced > button")
        page.wait_for_selector("#experts [data-letters=HHLL]", timeout=15_000)
        page.click("#kind label >> nth=0")
        page.wait_for_selector("#image", state="hidden", timeout=15_000)


def test_a_waiting_job_can_be_cancelled_and_the_queue_paused(app, chromium):
    with tab(chromium, app) as page:
        app.store.put("paused", True)
        write_prompt(page, CLIP)
        job = begin(page, app)
        page.wait_for_selector("#queue [data-state=queued]", timeout=30_000)
        page.click("#queue [data-act=cancel]")
        wait_done(app, job, "cancelled")
        page.click("#queue [data-act=resume]")
        app.wait(lambda: not app.store.paused)


def test_a_restart_from_the_bar_keeps_page_and_queue(app, chromium):
    with tab(chromium, app) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#bar [data-act=restart]")
        page.wait_for_function("document.querySelector('#bar').innerText.includes('was restarted')", timeout=60_000)
        write_prompt(page, CLIP)
        submit(page, app)


def test_an_illegal_field_is_explained_where_the_meter_is(app, chromium):
    with tab(chromium, app) as page:
        page.fill("#seed textarea, #seed input", "abc")
        page.wait_for_selector("#meter .td-note", timeout=15_000)
        assert "abc" in page.inner_text("#meter")


def test_text_of_a_person_never_becomes_markup(app, chromium):
    with tab(chromium, app) as page:
        write_prompt(page, "<img src=x onerror=window.evil=1> {{7*7}} ${window.evil=2}")
        submit(page, app)
        page.wait_for_selector("#card h3", timeout=30_000)
        page.wait_for_timeout(1500)
        assert page.evaluate("window.evil") is None
        assert "{{7*7}}" in page.inner_text("#card h3")


def test_settings_come_back_from_the_card(app, chromium):
    with tab(chromium, app) as page:
        page.click("#frames label:has(input[value='9'])")
        page.fill("#seed textarea, #seed input", "41")
        write_prompt(page, CLIP)
        submit(page, app)
        page.wait_for_selector("#card [data-form=reuse]", timeout=30_000)
        write_prompt(page, "something else that runs")
        page.click("#card [data-form=reuse]")
        page.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(CLIP)}")
        assert page.input_value("#seed textarea, #seed input") == "41"


def test_keys_open_help_and_generate(app, chromium):
    with tab(chromium, app) as page:
        page.click("#bar .name")
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("Escape")
        assert not page.is_visible("#help")
        write_prompt(page, CLIP)
        before = newest(app).id if app.store.jobs(1) else 0
        page.press("#prompt textarea", "Control+Enter")
        app.wait(lambda: app.store.jobs(1) and newest(app).id > before)


PLACE = re.compile(r"[\w.~-]*/[\w./~-]+|(?:[\w*-]+\.)+[a-z]{2,}", re.ASCII)  # files and hosts are no words of ours


@pytest.mark.parametrize(("path", "stray"), [("/", "[\u4e00-\u9fff]+"), ("/zh/", "[A-Za-z]{2,}")])
def test_no_word_of_the_other_language_on_any_tab(app, chromium, path, stray):
    with tab(chromium, app, path) as page:
        found = []
        for number in range(6):
            page.click(f"#tabs [role=tab] >> nth={number}")
            page.wait_for_timeout(700)
            found += page.evaluate(WORDS_OF_THE_PAGE)
        bad = [
            text
            for text in found
            if re.search(
                stray, LITERAL_ON_THE_PAGE.sub(" ", PLACE.sub(" ", text)).replace("重启应用", "").replace("中文", "")
            )
        ]
        assert not bad


# what we say; not what people wrote (prompts, notes), file names, versions, log lines
WORDS_OF_THE_PAGE = """() => {
  const skip = '.td-log, kbd, h3, .cap, .what, textarea, input, code, .td-table td, dd, script, style, [hidden],' +
    ' #strip';
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (text && parent.offsetParent && !parent.closest(skip) && !parent.closest('.td-facts')) found.push(text);
  }
  return found;
}"""


@pytest.mark.parametrize("path", ["/", "/zh/"])
def test_a_phone_needs_no_sideways_scrolling(app, chromium, path):
    with tab(chromium, app, path, viewport={"width": 390, "height": 844}) as page:
        for number in range(6):
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, number
        box = page.locator("#go").bounding_box()
        assert box["y"] + box["height"] <= 844 + 1  # Generate stays at hand


def test_dark_and_light_have_readable_contrast(app, chromium):
    for scheme in ("light", "dark"):
        with tab(chromium, app, color_scheme=scheme) as page:
            page.wait_for_timeout(600)
            worst = page.evaluate(CONTRAST)
            assert worst["ratio"] >= 4.5, worst


# WCAG 2.1 contrast of our own text on the first tab
CONTRAST = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const back = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > .95) return c; } return [255, 255, 255]; };
  let worst = {ratio: 99};
  const ours = '.td-bar *, .td-meter *, .td-card *, #form label span, #go, .tab-container button';
  for (const e of document.querySelectorAll(ours)) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetParent || e.closest('.td-stars')) continue;
    const a = lum(parse(getComputedStyle(e).color)), b = lum(back(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst.ratio) worst = {ratio, text: e.textContent.trim().slice(0, 40)};
  }
  return worst;
}"""
