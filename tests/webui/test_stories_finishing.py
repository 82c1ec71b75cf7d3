"""Stories of last phases and grids: a clip is smoother and larger, two fields become one contact sheet."""

import pytest
from stories import begin, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def real(tmp_path_factory, start_app):
    """The app with the worker itself and the demo model."""
    made = start_app(tmp_path_factory.mktemp("finishing"), worker="real_worker.py")
    yield made
    made.stop()


def test_a_clip_is_made_smoother_and_larger_and_the_meter_and_the_card_say_so(real, chromium):
    with tab(chromium, real) as page:
        page.click("#frames label:has-text('5 ·')")
        write_prompt(page, "a red circle moves right on a black background")
        page.click("#advanced > button")
        page.click("#smooth-fps label:has-text('30')")
        page.click("#upscale label:has-text('2 ×')")
        page.wait_for_selector("#meter:has-text('Frames in between')")
        done = wait_done(real, begin(page, real))
        assert (done.result.fps, done.result.width, done.result.frames) == (30, 256, 9)
        assert [phase.name for phase in done.plan.phases][-3:] == ["interpolate", "upscale", "write"]


def test_two_fields_become_clips_and_one_contact_sheet(real, chromium):
    with tab(chromium, real, "/zh/") as page:
        page.click("#frames label:has-text('5 ·')")
        write_prompt(page, "一个红色的圆形向右移动,黑色背景")
        page.click("#grid-box > button")
        page.fill("#grid-rows-values input, #grid-rows-values textarea", "1，2")
        page.fill("#grid-columns-values input, #grid-columns-values textarea", "1, 9")
        page.click("#grid-go")
        page.wait_for_selector("#note:has-text('步')")  # 9 steps are too many: none of the clips is queued
        before = len(real.store.jobs())
        page.fill("#grid-columns-values input, #grid-columns-values textarea", "1, 2")
        page.click("#grid-go")
        page.wait_for_selector("#note:has-text('4')")
        jobs = real.wait(lambda: len(real.store.jobs()) == before + 4 and real.store.jobs()[:4])
        assert all(job.request.grid for job in jobs)
        for job in jobs:
            wait_done(real, job.id)
        sheet = real.wait(lambda: next(real.outputs.rglob("grid_*.mp4"), None))
        page.wait_for_selector(f"#strip [data-arg='{sheet.stem}'], #player [data-clip='{sheet.stem}']")
