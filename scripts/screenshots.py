"""Screenshots of every tab in both languages and themes, and of a phone; needs Chromium and Playwright.

    python scripts/screenshots.py FOLDER [--pretend-vram 24] [--models FOLDER]

Starts the app with folders of its own, makes a few demo clips on whatever this machine has, and takes pictures.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
TABS = ("create", "gallery", "seeds", "system", "log", "settings")
PROMPTS = (
    "a red circle moves right on a black background",
    "a blue square moves down on a gray background",
    "a green triangle moves up on a brown background",
)
TAB_BUTTONS = "#tabs [role=tab], #tabs .overflow-dropdown button"  # a phone has the last ones behind a menu
DESKTOP, PHONE = (1440, 900), (390, 844)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_app(more: Mapping[str, str]) -> Iterator[str]:
    """The address of an app with folders and a port of its own and a few demo clips; `more`: of its environment."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [sys.executable, str(ROOT / "webui" / "app.py"), "--no-browser", "--port", str(port)]
        places = ["--state-dir", str(folder / "state"), "--outputs", str(folder / "outputs")]
        environment = {**os.environ, **more}
        app = subprocess.Popen([*command, *places], cwd=folder, env=environment, stderr=subprocess.DEVNULL)
        try:
            wait_for(url)
            make_clips(url)
            yield url
        finally:
            app.send_signal(signal.SIGTERM)
            app.wait(30)


def wait_for(url: str, patience_s: float = 300.0) -> None:
    """Wait until the page answers."""
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the page does not answer")


def call(url: str, name: str, argument: object) -> dict[str, object]:
    """A named endpoint of the API."""
    body = json.dumps({"data": [argument]}).encode()
    ask = urllib.request.Request(f"{url}/gradio_api/run/{name}", body, {"content-type": "application/json"})
    answer: dict[str, object] = json.load(urllib.request.urlopen(ask, timeout=60))["data"][0]
    return answer


def make_clips(url: str, patience_s: float = 600.0) -> None:
    """Demo clips for gallery and archive."""
    jobs = [call(url, "submit", {"prompt": prompt, "model": "demo", "seed": 42})["job"] for prompt in PROMPTS]
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s:
        if all(call(url, "status", job)["state"] not in ("queued", "running", "verifying") for job in jobs):
            return
        time.sleep(1)


def ready(browser: Browser, url: str, size: tuple[int, int], scheme: str) -> Page:
    """A page that has drawn itself."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)  # type: ignore
    context.set_default_timeout(180_000)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#meter .td-meter")
    page.wait_for_timeout(1500)
    return page


def shoot(browser: Browser, url: str, folder: Path) -> None:
    """Every tab in both languages, both themes, both widths."""
    for path, lang in (("/", "en"), ("/zh/", "zh")):
        for scheme in ("light", "dark"):
            for size, width in ((DESKTOP, "desktop"), (PHONE, "phone")):
                page = ready(browser, url + path, size, scheme)
                for number, name in enumerate(TABS):
                    page.evaluate(f"document.querySelectorAll({TAB_BUTTONS!r})[{number}].click(); scrollTo(0, 0)")
                    page.wait_for_timeout(1500)
                    page.screenshot(path=folder / f"{name}-{lang}-{scheme}-{width}.png", full_page=width == "phone")
                page.context.close()


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pretend-vram", metavar="GIB", help="show a card of this size")
    parser.add_argument("--models", type=Path, help="a folder with weights")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    more = {"TURBODIFF_PRETEND_VRAM": args.pretend_vram or "", "TURBODIFF_MODELS": str(args.models or "")}
    kept = {name: value for name, value in more.items() if value}
    with running_app(kept) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
        shoot(browser, url, args.folder)
        browser.close()


if __name__ == "__main__":
    main()
