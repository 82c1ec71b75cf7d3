"""A story of two cards: both busy, both named, one taken out in the middle; one paused by its switch, a clip for it."""

import json
import os
from pathlib import Path

import pytest
from conftest import SUPERVISE, start
from stories import begin, tab, wait_done, write_prompt

pytestmark = pytest.mark.browser

# the supervisor on cards that a file lists, in place of a driver
CARDS = """
import json
from turbodiff.gpu.probe import CardSample, Sample
def sample():
    listed, gib = json.loads(Path(CARDS).read_text()), 1 << 30
    cards = [
        CardSample(name="NVIDIA GeForce " + name, uuid="GPU-" + name[-4:] * 2, nvml_index=n, capability=(8, 9),
                   total_bytes=size * gib, free_bytes=(size - 1) * gib, used_bytes=gib)
        for n, (name, size) in enumerate(listed)
    ]
    return Sample(state="ok", error="", driver="580.1", cards=tuple(cards), taken_s=id(cards) / 1e6)
"""
TWO = [["RTX 4090", 24], ["RTX 3060", 12]]
SLOW = json.dumps({"attempts": [{"steps": 900, "dt_s": 0.2}, {"steps": 2, "dt_s": 0.1}]})


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """An app on two cards, and the file that lists them."""
    folder = tmp_path_factory.mktemp("cards")
    listed = folder / "cards.json"
    listed.write_text(json.dumps(TWO))
    before, after = SUPERVISE.split("state, outputs, worker", 1)
    told = CARDS.replace("Path(CARDS)", f"Path({str(listed)!r})")
    supervise = f"{before}{told}state, outputs, worker{after}".replace("working=state", "working=state, sample=sample")
    app = start(folder, supervise=supervise)
    app.listed = listed
    yield app
    app.stop()


def look(page, name):
    """Pictures for a person who asks for them: TURBODIFF_LOOK=folder."""
    if folder := os.environ.get("TURBODIFF_LOOK"):
        for width in (1440, 390):
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(500)
            page.screenshot(path=str(Path(folder) / f"{name}_{width}.png"), full_page=True)
        page.set_viewport_size({"width": 1440, "height": 1000})


def test_two_cards_are_both_busy_and_named_and_the_job_of_one_that_is_taken_out_moves(cards, chromium):
    app = cards
    with tab(chromium, app, viewport={"width": 1440, "height": 1000}) as page, tab(chromium, app, "/zh") as zh:
        write_prompt(page, SLOW)
        jobs = [begin(page, app) for _ in range(2)]
        app.wait(lambda: [app.store.job(job).state for job in jobs] == ["running"] * 2)
        names = {app.store.job(job).slot: job for job in jobs}
        for slot, (name, _) in enumerate(TWO):
            page.wait_for_selector(f"#queue-list [data-job='{names[slot]}'] .starts:has-text('on {name}')")
        write_prompt(page, json.dumps({"steps": 2}))
        waits = begin(page, app)
        page.wait_for_selector(f"#queue-list [data-job='{waits}'] .starts:has-text('starts in about')")
        page.wait_for_selector("#verdict:has-text('starts in about')", timeout=30_000)
        assert "RTX" in page.inner_text("#go")
        zh.wait_for_selector(f"#queue-list [data-job='{waits}'] .starts:has-text('后在 RTX')")
        look(page, "busy_en")
        look(zh, "busy_zh")

        lost = names[1]
        app.listed.write_text(json.dumps(TWO[:1]))
        app.wait(lambda: app.store.job(lost).state == "queued")
        app.store.cancel(names[0])
        assert wait_done(app, lost).strikes == {}
        assert wait_done(app, waits).attempt == 1
        app.listed.write_text(json.dumps(TWO))
        app.wait(lambda: len(app.store.fact("fleet")["cards"]) == 2)


def test_a_clip_for_a_paused_card_says_so_and_any_card_lets_it_go(cards, chromium):
    app = cards
    with tab(chromium, app, viewport={"width": 1440, "height": 1000}) as page:
        page.click("button[role=tab]:has-text('System')")
        page.click("[data-card='GPU-30603060'] [data-arg$=' paused']")
        page.wait_for_selector("[data-card='GPU-30603060'] [data-arg$=' paused'][aria-pressed=true]")
        look(page, "system_en")
        page.click("button[role=tab]:has-text('Create')")
        write_prompt(page, json.dumps({"steps": 1}))
        page.click("#for-card button:has-text('RTX 3060')")
        page.wait_for_selector("#for-card button[aria-pressed=true]:has-text('RTX 3060')")
        mine = begin(page, app)
        assert app.store.job(mine).request.gpu == "GPU-30603060"
        page.wait_for_selector(f"#queue-list [data-job='{mine}']:has-text('RTX 3060, which is paused')")
        look(page, "paused_en")
        page.click(f"#queue-list [data-job='{mine}'] [data-act=any_card]")
        assert app.store.job(wait_done(app, mine).id).slot == 0
