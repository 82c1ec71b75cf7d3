"""Clips whose files are named as people and other programs name them: shown, played, exported, deleted."""

import json
import shutil
import time
from urllib.parse import quote

import httpx
import pytest
import shelves
from stories import tab

from turbodiff.spec.clips import clip_id, clip_stem

STEMS = (
    "[draft] take (2)", "100% sure", "a%20b", "what?", "no #1", 'she said "no"', "it's", "a&b=c;d", "<b>bold<", "-rf",
    "\u202egnp.exe", "\u200fmarked", "\u0645\u0634\u0647\u062f", "猫 在 跳", "\U0001f3ac final", "two  blanks ",
    "back\\slash", "a\nb", "*", "{a,b}", "e\u0301t\u00e9", "~", "+1", "x.mp4", "C:", "猫" * 81,
)  # fmt: skip
NO_IDS = ("", ".hidden", "%2Fetc", "..", "a/b", "%00", "%", "%zz", "a b", "%61", "%FF", "%2E%2E%2Fa", "a" * 500)


@pytest.fixture(scope="module")
def named(start_app, tmp_path_factory):
    """An app over a library of one clip under many names, and the folder of that."""
    folder = tmp_path_factory.mktemp("named")
    (source,) = shelves.fill(folder / "outputs", 1, videos=1)
    day = next((folder / "outputs").glob(f"*/{source}.mp4")).parent
    for stem in STEMS:
        (day / f"{stem}.mp4").hardlink_to(day / f"{source}.mp4")
        shutil.copy(day / f"{source}.mp4.json", day / f"{stem}.mp4.json")
    made = start_app(folder)
    yield made, day
    made.stop()


@pytest.mark.parametrize("stem", STEMS)
def test_an_id_is_one_word_and_leads_back_to_its_name(stem):
    told = clip_id(stem)
    assert told and clip_stem(told) == stem and told.split() == [told] and told.isprintable()


@pytest.mark.parametrize("told", NO_IDS)
def test_what_is_no_id_has_no_name(told):
    assert clip_stem(told) == ""


@pytest.mark.parametrize("stem", STEMS)
def test_a_clip_of_any_name_is_served(named, stem):
    app, day = named
    answer = httpx.get(f"{app.url}/media/{quote(clip_id(stem))}", timeout=60)
    assert answer.status_code == 200 and answer.content == (day / f"{stem}.mp4").read_bytes()


def test_an_export_of_a_strange_name_can_be_fetched(named):
    app, _ = named
    asked, end_s = {"data": [{"clip": clip_id('she said "no"'), "format": "gif"}]}, time.monotonic() + 120
    told = {"state": "running"}
    while told["state"] == "running" and time.monotonic() < end_s:
        told = httpx.post(f"{app.url}/gradio_api/run/export", json=asked, timeout=60).json()["data"][0]
        time.sleep(0.5)
    assert told["state"] == "done", told
    assert httpx.get(app.url + told["url"], timeout=60).content.startswith(b"GIF8")


@pytest.mark.browser
def test_the_gallery_plays_and_deletes_them(named, chromium):
    app, day = named
    plays = (
        "wanted => document.querySelector('#side video')?.currentSrc.endsWith(wanted)"
        " && document.querySelector('#side video').videoWidth > 0"
    )
    with tab(chromium, app) as page:
        page.click("#tabs [role=tab] >> nth=1")
        page.wait_for_function(f"document.querySelectorAll('#gallery-grid .td-tile').length > {len(STEMS)}")
        shown = page.eval_on_selector_all("#gallery-grid .td-tile", "all => all.map(one => one.dataset.clip)")
        assert {clip_id(stem) for stem in STEMS} <= set(shown)
        for stem in ("[draft] take (2)", "100% sure", "\u202egnp.exe"):
            page.click(f"[data-clip={json.dumps(clip_id(stem))}] .pic")
            page.wait_for_function(plays, arg=f"/media/{quote(clip_id(stem))}")
        blanks = f"#gallery-grid [data-clip={json.dumps(clip_id('two  blanks '))}]"
        page.click(f"{blanks} .td-check")
        page.wait_for_selector(f"{blanks}.picked")
        page.focus(f"{blanks} .pic")
        page.keyboard.press("Delete")
        page.wait_for_selector(blanks, state="detached")
    assert not (day / "two  blanks .mp4").exists() and (day / "what?.mp4").exists()
