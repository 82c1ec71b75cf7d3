"""Stories of the gallery: an old clip found, several deleted and brought back, two compared, keys and a phone."""

import os
import re

import pytest
import shelves
from PIL import Image
from stories import PATIENCE_MS, tab

from turbodiff.archive.trash import TRASH

pytestmark = pytest.mark.browser
CLIPS, GALLERY = 150, 1
TILE = "#gallery-grid .td-tile"
PLAYERS = """const all = [...document.querySelectorAll('#compare video.sync')];
  const long = all.filter((one) => one.duration > 2).map((one) => one.currentTime);
  const apart = Math.max(...long) - Math.min(...long);"""
SOURCES = "[...document.querySelectorAll('#compare video')].map((one) => one.src)"


@pytest.fixture(scope="module")
def shelf(start_app, tmp_path_factory):
    """An app of its own over 150 clips."""
    folder = tmp_path_factory.mktemp("gallery")
    names = shelves.fill(folder / "outputs", CLIPS)
    made = start_app(folder)
    made.names = names
    yield made
    made.stop()


def open_gallery(page):
    page.click(f"#tabs [role=tab] >> nth={GALLERY}")
    total = "document.querySelector('#gallery-grid [data-total]')?.dataset.total"
    page.wait_for_function(f"{total} >= {CLIPS}", timeout=PATIENCE_MS)  # more, once a story made clips of its own


def find(page, words, total):
    page.fill("#find input, #find textarea", words)
    page.wait_for_selector(f"#gallery-grid [data-total='{total}']" if total else "#gallery-grid .td-blank")


def show_first(page):
    """Show the first clip of the grid beside it; until then the one before is there, and its buttons."""
    name = page.get_attribute(f"{TILE} >> nth=0", "data-clip")
    page.click(f"{TILE} .pic")
    page.wait_for_selector(f"#side [data-clip='{name}']")


def shot(page, name):
    if folder := os.environ.get("TURBODIFF_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_an_old_clip_is_found_by_words_and_shown(shelf, chromium):
    with tab(chromium, shelf) as page:
        open_gallery(page)
        assert page.locator(TILE).count() == 60
        shot(page, "gallery")
        page.click("#page-after")
        page.wait_for_selector(f"{TILE}[data-clip='{shelf.names[60]}']")
        find(page, "seed:149", 1)
        page.click(f"{TILE} .pic")
        page.wait_for_selector(f"#side [data-clip='{shelf.names[149]}'] video")
        with page.context.expect_page() as opened:
            page.click("#side a:has-text('Open the file')")
        opened.value.wait_for_selector("video")  # it plays in a tab; a file that is saved leaves that empty
        opened.value.close()
        page.fill("#tags-side", "of this clip")
        page.fill("#note-side", "not saved")
        page.press("#tags-side", "Enter")
        page.wait_for_selector(f"{TILE} small:has-text('#clip')")
        find(page, "seed：148", 1)
        page.wait_for_selector(f"{TILE}[data-clip='{shelf.names[148]}']")  # there was one before, too
        page.click(f"{TILE} .pic")
        page.wait_for_selector(f"#side .td-card[data-clip='{shelf.names[148]}']")
        assert [page.input_value(field) for field in ("#tags-side", "#note-side")] == ["", ""]
        find(page, "猫 take", CLIPS // 4)
        page.click("#order input")
        page.click("ul[role=listbox] li:has-text('Oldest')")
        oldest = max(number for number in range(CLIPS) if number % 4 == 3)
        page.wait_for_function(f"document.querySelector('{TILE}').dataset.clip === '{shelf.names[oldest]}'")
        assert re.search(r"\d+ clips, [\d.]+ [KMG]iB", page.inner_text(".td-gallery"))  # room on the disk
        find(page, "no such words", 0)


def test_several_are_starred_tagged_deleted_and_brought_back(shelf, chromium):
    with tab(chromium, shelf) as page:
        open_gallery(page)
        find(page, "rating:5", CLIPS // 6)
        page.hover(f"{TILE} >> nth=0")
        page.click(f"{TILE} .td-check >> nth=0")
        page.wait_for_selector(".td-gallery b:has-text('1 chosen')")
        page.click(f"{TILE} .td-check >> nth=3", modifiers=["Shift"])
        page.wait_for_selector(".td-gallery b:has-text('4 chosen')")
        shot(page, "chosen")
        page.fill("#pick-tags", "best, 夜景")
        page.click("[data-act=tag_all]")
        page.wait_for_selector(f"{TILE} small:has-text('#夜景') >> nth=3")
        page.click("[data-act=star_all]")
        page.wait_for_selector(f"{TILE} .td-star.on >> nth=3")
        page.click("#gallery-grid [data-act=trash]")
        page.wait_for_selector("#note :text('30 days')")
        page.wait_for_selector(f"#gallery-grid [data-total='{CLIPS // 6 - 4}']")
        assert len(list((shelf.outputs / TRASH).rglob("*.mp4"))) == 4
        shot(page, "deleted")
        page.click("#undo")
        page.wait_for_selector(f"#gallery-grid [data-total='{CLIPS // 6}']")
        find(page, "tag:夜景", 4)
        assert not list((shelf.outputs / TRASH).rglob("*.mp4"))
        page.reload()
        open_gallery(page)
        find(page, "tag:best", 4)


def test_the_trash_is_looked_at_and_emptied_by_hand(shelf, chromium):
    with tab(chromium, shelf) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        open_gallery(page)
        find(page, "seed:7", 1)
        show_first(page)
        page.wait_for_function("document.querySelector('#side video')?.readyState >= 2")
        page.click("#side [data-act=trash]")
        page.wait_for_selector("#undo")
        find(page, "", CLIPS - 1)
        page.click("#only input")
        page.click("ul[role=listbox] li:has-text('Trash')")
        page.wait_for_selector("#gallery-grid [data-total='1']")
        page.click(f"{TILE} .pic")
        page.click("[data-act=restore]")
        page.wait_for_selector("#gallery-grid .td-blank")
        assert (found := list(shelf.outputs.glob("2*/t2v_7_*.mp4"))) and found[0].stat().st_size
        shot(page, "trash")


def test_two_are_compared_side_by_side_and_under_a_wipe_and_play_in_sync(shelf, chromium):
    with tab(chromium, shelf) as page:
        open_gallery(page)
        for number in (0, 1):
            page.hover(f"{TILE} >> nth={number}")
            page.click(f"{TILE} .td-check >> nth={number}")
            page.wait_for_selector(f".td-gallery b:has-text('{number + 1} chosen')")
        page.click("[data-act=versus]")
        page.wait_for_selector("#compare video >> nth=1")
        shot(page, "beside")
        page.click("#compare [data-act=wipe]")
        page.wait_for_selector("#compare .td-wipe video >> nth=1")
        page.fill("#compare .edge", "20")
        edge = "getComputedStyle(document.querySelector('.td-wipe .over')).clipPath"
        assert "20%" in page.evaluate(edge)
        page.click("#compare [data-do=play]")
        page.wait_for_timeout(500)
        page.click("#compare [data-do=pause]")
        times = "[...document.querySelectorAll('video.sync')].map((video) => video.currentTime)"
        page.wait_for_function(f"({times}).every((time, _, all) => Math.abs(time - all[0]) < 0.15)")
        shot(page, "wipe")
        page.click("#compare [data-act=stop_compare]")
        page.wait_for_selector("#compare video", state="detached")
        for _ in range(2):  # also the second time it begins with one clip and waits for another
            show_first(page)
            page.click("#side [data-act=compare]")
            page.wait_for_selector("#compare .td-note")
            page.click(f"{TILE} .pic >> nth=1")
            page.wait_for_selector("#compare video >> nth=1")
            assert len(set(page.evaluate(SOURCES))) == 2 == page.locator("#compare video").count()
            page.click("#side [data-act=stop_compare]")
            page.wait_for_selector("#compare video", state="detached")


def test_the_gallery_is_used_with_keys_alone(shelf, chromium):
    with tab(chromium, shelf) as page:
        open_gallery(page)
        page.focus(f"{TILE} .pic >> nth=0")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("x")
        page.wait_for_selector(f"{TILE}.picked[data-clip='{shelf.names[1]}']")
        focus = "document.activeElement.closest('.td-tile')?.dataset.clip"
        page.wait_for_function(f"{focus} === '{shelf.names[1]}'")
        page.keyboard.press("Delete")
        page.wait_for_selector(f"#gallery-grid [data-total='{CLIPS - 1}']")
        page.wait_for_function(f"{focus} === '{shelf.names[2]}'")
        page.keyboard.press("Control+z")
        page.wait_for_selector(f"#gallery-grid [data-total='{CLIPS}']")
        page.wait_for_function(f"{focus} !== undefined")
        focused = page.evaluate(focus)
        page.keyboard.press("4")
        page.wait_for_selector(f"{TILE}[data-clip='{focused}'] small:has-text('★★★★☆')")
        page.keyboard.press("PageDown")
        page.wait_for_selector(f"{TILE}[data-clip='{shelf.names[60]}']")


def test_four_seeds_of_one_prompt_are_made_and_compared(shelf, chromium):
    with tab(chromium, shelf, "/zh/") as page:
        open_gallery(page)
        find(page, "seed:12", 1)
        show_first(page)
        page.click("#side [data-act=seeds]")
        page.wait_for_selector("#note :text('另外 3 个种子')")
        jobs = shelf.store.jobs(3)
        assert sorted(job.request.seed for job in jobs) == [13, 14, 15]
        assert len({job.request.prompt for job in jobs}) == 1


def test_four_seeds_play_in_sync_to_the_end_of_the_longest(shelf, chromium):
    shelves.add(shelf.outputs, "one family", (97, 97, 17, 97))  # 6 s, and one of 1 s
    with tab(chromium, shelf, viewport={"width": 1440, "height": 900}) as page:

        def until(condition):
            page.wait_for_function(f"(() => {{ {PLAYERS} return {condition}; }})()")

        open_gallery(page)
        find(page, "family seed:0", 1)
        show_first(page)
        page.click("#side [data-act=seeds]")
        page.wait_for_function(f"new Set({SOURCES}).size === 4")  # of seed 1, 2, 3 and 0
        until("all.every((one) => one.readyState >= 2 && one.getBoundingClientRect().bottom < innerHeight)")
        shot(page, "four")
        page.evaluate(f"{PLAYERS} all[0].playbackRate = 0.5")  # as on a busy machine: alone it would fall behind by 2 s
        page.click("#compare [data-do=play]")
        until("Math.min(...long) > 2 && Math.min(...long) < 4 && apart < 1 && all[1].paused && all[1].ended")
        page.evaluate(f"{PLAYERS} all[2].currentTime = 4")
        until("Math.min(...long) > 3.9 && apart < 1 && all.filter((one) => !one.paused).length === 3")
        page.click("#compare [data-do=pause]")
        until("all.every((one) => one.paused) && apart < 0.01")
        page.evaluate(f"{PLAYERS} all[3].currentTime = 0.5")
        until("all.every((one) => one.paused && !one.seeking && Math.abs(one.currentTime - 0.5) < 0.01)")
        page.evaluate(f"{PLAYERS} all[2].play()")
        until("all.every((one) => !one.paused) && apart < 1")
        page.evaluate(f"{PLAYERS} all[3].currentTime = 5.5")
        until("Math.min(...long) > 5.4 && all[1].ended")
        until("Math.max(...long) < 3 && all.every((one) => !one.paused)")  # and all begin again


@pytest.mark.parametrize("path", ["/", "/zh/"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_gallery_fits_a_phone(shelf, chromium, path, scheme):
    with tab(chromium, shelf, path, viewport={"width": 390, "height": 844}, color_scheme=scheme) as page:
        open_gallery(page)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        box = page.locator(f"{TILE} .td-check >> nth=0").bounding_box()
        assert min(box["width"], box["height"]) >= 40
        page.click(f"{TILE} .td-check >> nth=0")
        page.wait_for_selector(f"{TILE}.picked")
        shot(page, f"phone{path.strip('/')}-{scheme}")


def test_on_a_phone_what_a_search_finds_is_on_the_screen(shelf, chromium):
    with tab(chromium, shelf, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        open_gallery(page)

        def top(selector):
            return page.locator(selector).first.bounding_box()["y"]

        assert top(f"{TILE} .pic") < 600  # clips, not the player of one that nobody chose
        page.tap(f"{TILE} .pic >> nth=3")
        page.wait_for_function("document.querySelector('#side .td-player').getBoundingClientRect().top < 200")
        find(page, "seed:20", 1)
        assert 0 <= top(f"{TILE} .pic") < 600 and not page.locator("#side").is_visible()


def test_a_clip_is_trimmed_and_exported_as_gif_and_saved(shelf, chromium, tmp_path):
    with tab(chromium, shelf, viewport={"width": 1440, "height": 900}) as page:
        open_gallery(page)
        find(page, "seed:20", 1)
        page.click(f"{TILE} .pic")
        page.wait_for_selector(f"#export[data-clip='{shelf.names[20]}']")
        page.click("#export summary")
        page.fill("#export [name=end_s]", "0.5")
        page.wait_for_selector("#export output:has-text('0.00 – 0.50 s')")
        page.click("#export [data-act=export]")
        page.wait_for_selector("#note :text('has begun')")
        page.wait_for_selector("#export-list [data-state=done] a")
        page.locator("#export").scroll_into_view_if_needed()
        shot(page, "export")
        with page.expect_download() as saved:
            page.click("#export-list [data-state=done] a")
        saved.value.save_as(tmp_path / "clip.gif")
        assert Image.open(tmp_path / "clip.gif").n_frames == 8
