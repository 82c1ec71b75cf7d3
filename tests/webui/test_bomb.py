"""Files that unpack to far more than they weigh: another process pays for them, not the one that serves the page."""

import io
import json
import struct
import threading
import time
import zlib

import hollow
import httpx
import psutil
import pytest
from PIL import Image
from private import Wires


def png(width, height, pixels=b"", kind=6):
    """A PNG of that size with these compressed pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(nbytes):
    """So many zeros, a thousandth of their size."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(nbytes >> 20)) + packer.flush()


def many_frames():
    """A GIF of 60 frames."""
    data = io.BytesIO()
    frames = [Image.new("P", (500, 500), number % 256) for number in range(60)]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], optimize=False)
    return data.getvalue()


def text_bomb():
    """A small PNG with a text chunk that unpacks to 400 MB."""
    good = io.BytesIO()
    Image.new("RGB", (64, 64)).save(good, "PNG")
    body = b"note\0\0" + zeros(400 << 20)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return good.getvalue()[:33] + chunk + good.getvalue()[33:]


LAUGHS = b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "' + b"ha" * 5000 + b'">' + b"".join(
    b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9)
) + b']><svg xmlns="http://www.w3.org/2000/svg"><text>&j;</text></svg>'  # fmt: skip

BOMBS = {
    "a picture of 3,600 megapixels": ("x.png", lambda: png(60_000, 60_000, zeros(8 << 20))),
    "64 megapixels in 250 kB": ("x.png", lambda: png(8000, 8000, zeros(8000 * 32_001 + (1 << 20)))),
    "text of 400 MB in a small picture": ("x.png", text_bomb),
    "many frames": ("x.gif", many_frames),
    "an SVG that laughs": ("x.svg", lambda: LAUGHS),
    "an SVG called PNG": ("x.png", lambda: LAUGHS),
}


@pytest.fixture(scope="module")
def reader(start_app, tmp_path_factory):
    """An app that can plan I2V."""
    folder = tmp_path_factory.mktemp("bomb")
    weights = hollow.models(folder / "models", "wan2.2-a14b")
    made = start_app(folder, TURBODIFF_PRETEND_VRAM="24", TURBODIFF_MODELS=str(weights))
    made.wires = Wires(made.url)
    use(made, "ok.png", png(64, 64, zlib.compress(bytes(64 * 257))))  # whatever is done only once is done now
    before_s = web_seconds(made)
    time.sleep(3)
    made.idle = (web_seconds(made) - before_s) / 3
    yield made
    made.stop()


def use(app, name, data):
    """Upload a picture, estimate with it, look at it, and press Generate, as the page does."""
    wires = app.wires
    picture = wires.upload(name, data)
    form = {
        "image": picture,
        "kind": "i2v",
        "model": "wan2.2-a14b",
        "resolution": "480p",
        "prompt": json.dumps({"steps": 1}),
    }
    handlers = [found for found in wires.handlers if [wires.ids["image"], "change"] in map(list, found["targets"])]
    return [wires.call(handler, wires.values(handler, **form)) for handler in (*handlers, wires.of("go", "click"))]


def web_seconds(app):
    """CPU seconds of the process that serves the page, its children not counted."""
    children = psutil.Process(app.process.pid).children(recursive=True)
    times = next(child for child in children if "webui.server" in child.cmdline()).cpu_times()
    return times.user + times.system


def cost(app, name, data):
    """CPU seconds of the web process for a picture, less those that it spends on nothing meanwhile; the answers."""
    before_s, start_s = web_seconds(app), time.monotonic()
    answers = use(app, name, data)
    spent_s, took_s = web_seconds(app) - before_s, time.monotonic() - start_s
    return spent_s - app.idle * took_s, answers


class Pulse(threading.Thread):
    """Asks /healthz all the time and keeps the longest answer, seconds."""

    def __init__(self, app):
        super().__init__(daemon=True)
        self.app, self.longest_s, self.over = app, 0.0, threading.Event()

    def run(self):
        with httpx.Client(base_url=self.app.url, timeout=60) as session:
            while not self.over.wait(0.02):
                start_s = time.monotonic()
                session.get("/healthz")
                self.longest_s = max(self.longest_s, time.monotonic() - start_s)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_the_web_process_no_more_than_a_picture(reader, name):
    file, make = BOMBS[name]
    unseen = png(64, 64 + list(BOMBS).index(name), zlib.compress(bytes(80 * 257)))
    usual_s, _ = cost(reader, "ok.png", unseen)
    bomb_s, answers = cost(reader, file, make())
    assert {answer.status_code for answer in answers} <= {200, 422}
    assert bomb_s - usual_s < 0.5  # the goal is 0.2 s on a quiet machine; decoding it here would cost seconds


def test_the_page_answers_while_a_bomb_goes_off(reader):
    data = BOMBS["64 megapixels in 250 kB"][1]()
    pulse = Pulse(reader)
    pulse.start()
    use(reader, "x.png", data)
    pulse.over.set()
    pulse.join(60)
    assert pulse.longest_s < 2.0  # the goal is 0.2 s on a quiet machine; a busy one gets ten times that
