"""Stories of a run that somebody disturbs: a restart, a killed worker, a killed page. The job always finishes."""

import json
import os
import re
import signal

import psutil
import pytest
from literals import LITERAL_ON_THE_PAGE
from stories import begin, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser

VERSION = re.compile(r"[0-9a-f]{12}|n?\d[\w.+-]*", re.ASCII)  # of torch, of ffmpeg; a checksum
SELFTEST_MS = 300_000  # it makes a clip in a process of its own, whatever else the machine does
NEWS = "#bar .td-pill.good"
SHOWN_LINES = "[...document.querySelectorAll('#log .td-log > div')].filter((line) => line.offsetParent).length"
NO_LINE = "getComputedStyle(document.querySelector('#log .td-log'), '::before').content"
SLOW_AT_FIRST = json.dumps({"attempts": [{"steps": 200, "dt_s": 0.5}, {"steps": 2, "dt_s": 0.1}]})


def web_process(app):
    """The process that serves the page."""
    children = psutil.Process(app.process.pid).children(recursive=True)
    return next(child for child in children if "webui.server" in child.cmdline())


def a_step_of(page, app, prompt):
    """Start a job and wait until it has made a step and the page shows it."""
    write_prompt(page, prompt)
    job = begin(page, app)
    page.wait_for_selector(f"#progress [data-job='{job}']")
    app.wait(lambda: (now := app.store.job(job).progress) and now.step >= 1)
    return job


def shows_the_clip(page, app, job):
    """The player has the clip of this job."""
    clip = app.store.job(job).result.path.rsplit("/", 1)[-1].removesuffix(".mp4")
    page.wait_for_selector(f"#player .td-player[data-clip='{clip}'] video")


def test_the_restart_button_during_a_run_costs_the_worker_and_not_the_job_and_its_news_leaves_again(app, chromium):
    with tab(chromium, app, "/zh/") as page:
        page.on("dialog", lambda dialog: dialog.accept())
        job = a_step_of(page, app, SLOW_AT_FIRST)
        before = app.store.fact("worker0")["pid"]
        page.click("#bar [data-act=restart]")
        page.wait_for_selector(NEWS)
        wait_done(app, job)
        assert app.store.fact("worker0")["pid"] != before
        assert not psutil.pid_exists(before)
        shows_the_clip(page, app, job)
        page.click("#tabs [role=tab] >> nth=3")
        page.click("#system [data-act=selftest]")
        page.click("#tabs [role=tab] >> nth=4")
        page.click("[data-do=level][data-arg=errors]")
        page.wait_for_function(f"({SHOWN_LINES}) || {NO_LINE}.includes('没有这样的行')")
        page.click("#tabs [role=tab] >> nth=3")
        ram = re.search(r"/ ([\d.]+ GiB)", page.inner_text("#bar .td-gauge:has-text('内存')"))[1]
        twice = f"document.querySelector('#system').innerText.split('{ram}').length > 2"  # of the machine, of versions
        page.wait_for_function(twice)
        page.wait_for_selector("#selftest > div >> nth=3", timeout=SELFTEST_MS)
        page.wait_for_selector("#system [data-act=selftest]:enabled", timeout=SELFTEST_MS)
        found = [text for text in page.locator("#selftest > div").all_inner_texts() if "显卡" not in text]
        told = LITERAL_ON_THE_PAGE.sub(" ", VERSION.sub(" ", " ".join(found)))
        assert len(found) == 3 and not re.search("[A-Za-z]{2,}", told), told
        page.wait_for_selector(NEWS, state="detached")


def test_a_killed_worker_is_replaced_says_so_and_the_job_finishes(app, chromium):
    with tab(chromium, app) as page:
        job = a_step_of(page, app, json.dumps({"steps": 200, "dt_s": 0.5}))
        os.kill(app.store.fact("worker0")["pid"], signal.SIGKILL)
        page.wait_for_selector("#progress .td-note:has-text('Attempt 2, by itself')")
        page.click("#progress [data-act=stop_and_decode]")
        done = wait_done(app, job)
        assert done.attempt == 2
        shows_the_clip(page, app, job)


def test_a_killed_page_comes_back_by_itself_in_the_same_tab_and_the_job_finishes(app, chromium):
    with tab(chromium, app) as page:
        job = a_step_of(page, app, json.dumps({"steps": 12, "dt_s": 0.5}))
        before = web_process(app).pid
        os.kill(before, signal.SIGKILL)
        app.wait(lambda: psutil.pid_exists(before) is False and web_process_or_none(app))
        done = wait_done(app, job)
        assert done.attempt == 1  # the worker never noticed
        shows_the_clip(page, app, job)
        write_prompt(page, json.dumps({"steps": 1}))  # and the form still works
        wait_done(app, begin(page, app))


def web_process_or_none(app):
    """The process that serves the page, or None while there is none."""
    try:
        return web_process(app)
    except (StopIteration, psutil.Error):
        return None


def test_a_hidden_tab_misses_nothing(app, chromium):
    with tab(chromium, app) as page:
        job = a_step_of(page, app, json.dumps({"steps": 6, "dt_s": 0.5}))
        front = page.context.new_page()  # covers the first one
        front.bring_to_front()
        wait_done(app, job)
        page.bring_to_front()
        front.close()
        shows_the_clip(page, app, job)


def test_a_failed_card_on_a_phone_leads_to_who_holds_the_memory(app, chromium):
    oom = {"error": {"code": "oom", "what": "out of memory", "exit_code": 1}}
    with tab(chromium, app, viewport={"width": 390, "height": 844}) as page:
        write_prompt(page, json.dumps(oom))
        wait_done(app, begin(page, app), "parked")
        page.click("#progress .failed [data-do=tab]")  # a tab that is behind a menu at this width
        page.wait_for_selector("#system [data-model=Demo]", state="visible")


def test_a_failed_card_leads_to_the_run_log_with_its_cause(app, chromium):
    failed = {"error": {"code": "key_missing", "what": "a key is missing", "try_instead": "another file"}}
    with tab(chromium, app) as page:
        write_prompt(page, json.dumps(failed))
        job = begin(page, app)
        wait_done(app, job, "failed")
        page.click("#progress .failed [data-act=log]")
        page.wait_for_selector(
            f"#log div.ERROR:has-text('j{job} verdict'):has-text('try: another file')", state="visible"
        )
        page.click("#logs [data-arg^=webui_startup]")
        page.wait_for_selector("#log div:has-text('turbodiff supervisor')", state="visible")
        page.wait_for_selector("#log div:has-text('verdict')", state="detached")


def test_a_clip_is_rated_in_words_and_stars_with_one_click(app, chromium):
    with tab(chromium, app, "/zh/") as page:
        write_prompt(page, json.dumps({"steps": 1}))
        wait_done(app, begin(page, app))
        page.fill("#card #praise-stage", "动作流畅,光影绝美", timeout=30_000)
        page.click("#card .td-stars button >> nth=3")
        page.wait_for_selector("#card .td-stars .on >> nth=3")
        assert page.input_value("#card #praise-stage") == "动作流畅,光影绝美"
        assert "| ★★★★☆ 动作流畅,光影绝美 |" in (app.outputs / "seeds.md").read_text("utf-8")
