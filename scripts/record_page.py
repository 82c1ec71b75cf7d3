"""A recording of the page as an animated WebP, from the prompt to two clips under a wipe; needs Chromium, Playwright.

    python scripts/record_page.py docs/page.webp [--lang zh]

Starts the app with folders of its own and the demo model, on whatever this machine has; what a person would wait for is
shown as long as it takes, up to `STILL_S` for a picture in which nothing changes.
"""

import argparse
import io
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from screenshots import FLAGS, TAB_BUTTONS, ready, running_app

SIZE, WIDTH = (1280, 800), 800  # of the window, and of the recording
EVERY_S, STILL_S, QUALITY = 0.15, 1.5, 45
PROMPTS = {"en": "a red circle moves right on a black background", "zh": "一个红色的圆形向右移动，黑色背景"}


class Recording:
    """Pictures of a page with the seconds that each is seen."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[tuple[Image.Image, float]] = []
        self._last = b""

    def watch(self, seconds: float, until: str = "") -> None:
        """Look at the page for a while, or until an element is there."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            began_s = time.monotonic()
            seen = self.page.screenshot(type="jpeg", quality=90)
            left_s = EVERY_S - (time.monotonic() - began_s)
            if left_s > 0:
                self.page.wait_for_timeout(1000 * left_s)
            took_s = time.monotonic() - began_s
            if seen == self._last:
                frame, shown_s = self.frames[-1]
                self.frames[-1] = frame, min(STILL_S, shown_s + took_s)
            else:
                with Image.open(io.BytesIO(seen)) as picture:
                    height = picture.height * WIDTH // picture.width
                    self.frames.append((picture.convert("RGB").resize((WIDTH, height)), took_s))
                self._last = seen
            if until and self.page.query_selector(until):
                return

    def save(self, path: Path) -> None:
        """Write all of it."""
        (first, _), *others = self.frames
        shown_ms = [round(1000 * shown_s) for _, shown_s in self.frames]
        more = [frame for frame, _ in others]
        first.save(path, save_all=True, append_images=more, duration=shown_ms, loop=0, quality=QUALITY, method=4)


def record(page: Page, prompt: str) -> Recording:
    """Write a prompt, make the clip, watch it, open it in the gallery, compare it with another, look at the system."""
    recording = Recording(page)
    recording.watch(1.0)
    words = prompt.split(" ") if " " in prompt else list(prompt)
    for word in words:
        page.type("#prompt textarea", word + (" " if " " in prompt else ""))
        recording.watch(EVERY_S)
    recording.watch(1.0)
    old = page.get_attribute("#player video", "src") if page.query_selector("#player video") else ""
    page.click("#go")
    recording.watch(90.0, f'#player video:not([src="{old}"])')
    recording.watch(3.0)
    page.evaluate(f"document.querySelectorAll({TAB_BUTTONS!r})[1].click(); scrollTo(0, 0)")
    recording.watch(1.5)
    page.click("#gallery-grid .td-tile .pic >> nth=0")
    page.wait_for_selector("#side video")
    recording.watch(1.5)
    page.click("#side [data-act=compare]")
    page.wait_for_selector("#compare .td-note")
    page.click("#gallery-grid .td-tile .pic >> nth=1")
    page.wait_for_selector("#compare video >> nth=1")
    page.click("#compare [data-act=wipe]")
    page.wait_for_selector("#compare .td-wipe")
    page.click("#compare [data-do=play]")
    for edge in (30, 50, 70):
        page.fill("#compare .edge", str(edge))
        recording.watch(1.0)
    page.evaluate(f"document.querySelectorAll({TAB_BUTTONS!r})[3].click(); scrollTo(0, 0)")
    recording.watch(2.0)
    return recording


def main() -> None:
    """Record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--lang", choices=PROMPTS, default="en")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    with running_app({}) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
        page = ready(browser, url + ("/zh/" if args.lang == "zh" else "/"), SIZE, "light")
        record(page, PROMPTS[args.lang]).save(args.path)
        browser.close()


if __name__ == "__main__":
    main()
