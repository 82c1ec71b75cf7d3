"""Stories of waiting: the tab's title tells the percent, and who asked for it hears and sees that a clip is done."""

import json

import pytest
from stories import begin, submit, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser
SETTINGS = 5
SPY = """
window.told = [];
window.Notification = class { constructor(title, options) { window.told.push(options.body); } close() {}
  static permission = "granted"; static async requestPermission() { return "granted"; } };
window.AudioContext = class { constructor() { window.told.push("ring"); this.currentTime = 0; this.destination = {}; }
  close() {} };
window.OscillatorNode = class { connect() { return { connect() {} }; } start() {} stop() {} };
window.GainNode = class { constructor() { this.gain = { setTargetAtTime() {} }; } };
"""
HIDE = "Object.defineProperty(document, 'hidden', { get: () => true, configurable: true })"


def test_the_title_tells_the_percent_and_that_it_is_done(app, chromium):
    with tab(chromium, app) as page:
        write_prompt(page, json.dumps({"steps": 4, "dt_s": 1.0}))
        job = begin(page, app)
        page.wait_for_function("/^[0-9]+ % · turbodiff$/.test(document.title)")
        wait_done(app, job)
        page.wait_for_function("document.title === '✓ turbodiff'")
        page.evaluate("dispatchEvent(new Event('focus'))")
        assert page.title() == "turbodiff"


def test_sound_and_notification_come_only_when_asked_for_also_while_hidden(app, chromium):
    with tab(chromium, app) as page:
        page.evaluate(f"() => {{ {SPY} }}")
        write_prompt(page, json.dumps({"steps": 4, "dt_s": 1.0}))  # the page looks once a second
        submit(page, app)
        page.wait_for_function("document.title.startsWith('✓')")
        assert page.evaluate("window.told") == []
        page.click(f"#tabs [role=tab] >> nth={SETTINGS}")
        for wish in ("sound", "notify"):
            page.click(f"[data-wish={wish}]")
            page.wait_for_selector(f"[data-wish={wish}][aria-pressed=true]")
        assert page.evaluate("window.told.splice(0)") == ["ring"], "the sound is heard when it is chosen"
        page.click("#tabs [role=tab] >> nth=0")
        write_prompt(page, json.dumps({"steps": 4, "dt_s": 1.5, "again": 1}))
        job = begin(page, app)
        page.wait_for_function("document.title.includes('%')")
        page.evaluate(HIDE)
        wait_done(app, job)
        page.wait_for_function(f"window.told.includes('Job {job} is done.') && window.told.includes('ring')")
