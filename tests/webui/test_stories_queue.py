"""A story of the queue: jobs wait for the night, change places by key and by hand, are edited and cleared."""

import json
import time

import pytest
from stories import begin, newest, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser


@pytest.fixture(autouse=True)
def calm(app):
    """However a story ends, the next one finds a queue that runs."""
    yield
    app.store.put("paused", False)
    app.store.put("held_until_s", 0)
    for job in app.store.queue():
        app.store.cancel(job.id)


def script(name):
    return json.dumps({"steps": 1, "name": name})


def order(app):
    return [json.loads(job.request.prompt)["name"] for job in app.store.queue()]


def test_a_queue_is_held_ordered_edited_and_cleared(app, chromium):
    with tab(chromium, app) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#night summary")
        page.fill("#night-time", time.strftime("%H:%M", time.localtime(time.time() + 7200)))
        page.click("#night [data-act=hold]")
        page.wait_for_selector("#held")
        made = {}
        for name in ("one", "two", "three"):
            write_prompt(page, script(name))
            made[name] = begin(page, app)
        page.wait_for_selector("#queue-list .td-sec:has-text('3 waiting, about')")
        page.wait_for_selector("#bar:has-text('nothing starts before')")

        page.focus(f"#queue-list [data-job='{made['three']}'] [data-act=up]")
        page.keyboard.press("Enter")
        app.wait(lambda: order(app) == ["one", "three", "two"])
        page.wait_for_selector(f"#queue-list [data-job='{made['three']}'] + [data-job='{made['two']}']")
        page.keyboard.press("Enter")  # the button keeps the focus in its new place
        app.wait(lambda: order(app) == ["three", "one", "two"])
        page.wait_for_selector(f"#queue-list [data-job='{made['one']}'] + [data-job='{made['two']}']")
        page.drag_and_drop(f"[data-job='{made['three']}'] .what", f"[data-job='{made['two']}'] .what")
        app.wait(lambda: order(app) == ["one", "two", "three"])
        # drawn, too: until then a button may turn into that of another job under the pointer
        page.wait_for_selector(f"#queue-list [data-job='{made['two']}'] + [data-job='{made['three']}']")

        page.click(f"#queue-list [data-job='{made['two']}'] [data-form=edit_job]")
        page.wait_for_selector("#editing")
        page.wait_for_selector(f"#go:has-text('Save job {made['two']}')")
        write_prompt(page, script("better"))
        page.wait_for_selector("#lint:has-text('better')")
        page.click("#go")
        app.wait(lambda: order(app) == ["one", "better", "three"])
        page.wait_for_selector("#editing", state="detached")
        page.wait_for_selector("#go:has-text('Generate')")
        assert newest(app).id == made["three"]

        page.click(f"#queue-list [data-job='{made['two']}'] [data-form=edit_job]")
        page.wait_for_selector("#editing")
        page.click("#held [data-act=hold]")
        wait_done(app, made["two"])  # it did not wait for the form
        page.click("#go")
        late = app.wait(lambda: newest(app).id > made["three"] and newest(app).id)
        page.wait_for_selector(f"#note:has-text('new job: {late}')")
        wait_done(app, late)

        app.store.put("paused", True)
        for _ in range(2):
            begin(page, app)
        page.click("#queue-list [data-act=clear]")
        app.wait(lambda: not app.store.queue())


def test_a_segment_whose_start_was_cancelled_offers_to_retry_it_or_to_drop(app, chromium):
    with tab(chromium, app, "/zh/", viewport={"width": 390, "height": 844}) as page:
        app.store.put("paused", True)
        write_prompt(page, script("first"))
        page.click("#storyboard-box > button")
        page.locator("#segments textarea").first.fill(script("second"))
        page.wait_for_selector("#go:has-text('生成 2 段')")
        last = begin(page, app)
        app.wait(lambda: newest(app).id == last + 1 or newest(app).id == last)
        second = newest(app).id
        app.store.cancel(second - 1)
        page.click(f"#queue-list [data-job='{second}'] [data-act=retry]")
        again = app.wait(lambda: newest(app).id > second and newest(app).id)
        assert app.store.job(again).parent == second - 1
        page.wait_for_selector(f"#queue-list [data-job='{second}']:has-text('等待前一段')")
        page.wait_for_timeout(2500)  # an answer that was on its way at the press may draw the list as it was, once
        app.store.cancel(again)
        page.click(f"#queue-list [data-job='{second}'] [data-act=drop_chain]")
        wait_done(app, second, "cancelled")


REDRAW = "() => { const list = document.querySelector('.td-examples'); list.outerHTML = list.outerHTML; }"
REMOVE = "() => document.querySelector('.td-examples [data-form]').remove()"  # the next one comes to lie there


def test_a_button_that_is_redrawn_while_it_is_held_down_is_pressed_once_all_the_same(app, chromium):
    """Lists are redrawn each second; a click of a browser needs the same button under it at both ends."""
    with tab(chromium, app) as page:
        page.evaluate("""() => { window.pressed = []; const form = window.tdForm;
            window.tdForm = (what, value) => { window.pressed.push(value); form(what, value); }; }""")
        example = page.locator(".td-examples [data-form]").first
        offered = example.get_attribute("data-arg")
        for meanwhile, presses in (("", 1), (REDRAW, 2), (REMOVE, 2)):
            example.hover()
            page.mouse.down()
            if meanwhile:
                page.evaluate(meanwhile)
            page.mouse.up()
            page.wait_for_timeout(1500)
            assert page.evaluate("window.pressed") == [offered] * presses, meanwhile


def test_a_second_press_before_the_answer_to_the_first_makes_a_second_job(app, chromium):
    app.store.put("paused", True)
    with tab(chromium, app) as page:
        write_prompt(page, script("twice"))
        before = newest(app).id if app.store.jobs(1) else 0
        page.evaluate("() => { const go = document.querySelector('#go'); go.click(); go.click(); }")
        app.wait(lambda: app.store.jobs(1) and newest(app).id == before + 2)
        page.wait_for_selector(f"#queue-list [data-job='{before + 2}']")
