"""Stories of longer clips: a clip goes on, a storyboard becomes one clip, a failed segment holds up what follows."""

import json

import pytest
from stories import begin, newest, submit, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser
FRAMES = 5  # of a segment: the shortest that moves


def write_row(page, row, *cells):
    """Fill a row of the storyboard as a person does: a click, then from field to field by Tab."""
    page.locator("#segments textarea").nth(row).click()
    for text in cells:
        page.keyboard.press("Control+a")
        page.keyboard.type(text)
        page.keyboard.press("Tab")


def clip_of(job):
    return job.result.path.rsplit("/", 1)[-1].removesuffix(".mp4")


@pytest.fixture(scope="module")
def real(tmp_path_factory, start_app):
    """The app with the worker itself and the demo model."""
    made = start_app(tmp_path_factory.mktemp("longer"), worker="real_worker.py")
    yield made
    made.stop()


def test_a_clip_is_continued_and_goes_on_through_a_storyboard(real, chromium):
    with tab(chromium, real) as page:
        page.click(f"#frames label:has-text('{FRAMES} ·')")
        write_prompt(page, "a red circle moves right on a black background")
        first = submit(page, real)
        page.click(f"#card [data-form=continue][data-arg='{clip_of(first)}']")
        page.wait_for_selector(f"#continued[data-clip='{clip_of(first)}']")
        assert page.locator("#image").is_hidden()
        page.click(f"#frames label:has-text('{FRAMES} ·')")
        write_prompt(page, "a red circle moves left on a black background")
        page.click("#storyboard-box > button")
        write_row(page, 0, "a red circle moves up on a black background", "0.25", "3")
        page.wait_for_selector("#storyboard-sum:has-text('2 segments · 13 frames')")
        last = wait_done(real, begin(page, real) and newest(real).id)
        assert (last.result.frames, last.request.seed) == (3 * FRAMES - 2, 3)
        page.wait_for_selector(f"#player [data-clip='{clip_of(last)}'] video")
        page.wait_for_selector("#card:has-text('13 frames')")
        page.reload()  # the draft knows the clip and the rows
        page.wait_for_selector(f"#continued[data-clip='{clip_of(first)}']")
        page.wait_for_selector("#storyboard-sum:has-text('2 segments · 13 frames')")
        page.click("#storyboard-box > button")
        assert page.locator("#segments textarea").input_value() == "a red circle moves up on a black background"
        page.click("#segments [data-do=dropsegment]")
        page.wait_for_selector("#storyboard-sum:has-text('segments')", state="detached")
        page.click("#continued button")
        page.wait_for_selector("#continued", state="detached")
        page.wait_for_selector("#image", state="visible")


def test_what_comes_after_a_failed_segment_waits_and_says_so(app, chromium):
    with tab(chromium, app) as page:
        write_prompt(page, json.dumps({"error": {"what": "it broke", "code": "broken"}}))
        page.click("#storyboard-box > button")
        write_row(page, 0, "a red circle moves up", "1")
        page.click("#segments [data-do=addsegment]")
        write_row(page, 1, "a red circle moves down", "0")
        page.wait_for_selector("#storyboard-sum:has-text('Segment 3')")  # no length
        before = newest(app).id if app.store.jobs(1) else 0
        write_row(page, 1, "a red circle moves down", "1", "1e9")
        page.wait_for_selector("#storyboard-sum:has-text('Segment 3: 1e9 is not a seed')")
        write_row(page, 1, "a red circle moves down", "1", "7")
        page.wait_for_selector("#storyboard-sum:has-text('3 segments · 49 frames')")
        page.click("#go")
        app.wait(
            lambda: (
                len(app.store.jobs()) >= 3
                and newest(app).id == before + 3
                and app.store.job(before + 1).state == "failed"
            )
        )
        page.wait_for_selector("#queue:has-text('waits for the segment before it')")
        assert [app.store.job(before + n).state for n in (2, 3)] == ["queued", "queued"]
        for job in (before + 2, before + 3):
            app.store.cancel(job)
