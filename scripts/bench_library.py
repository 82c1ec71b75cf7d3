"""The library with many clips, as `scripts/bench_app.py --library 10000` measures it.

Opening is what the gallery's first page takes: the question to the index and the markup of the answer. Cold is the
first one of a process that was not there before, over an index of an earlier one; warm is another question of the same
process, which none asked before.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_load import call, library, look_call, running

ROOT = Path(__file__).resolve().parent.parent
COLD, WARM = 5, 20
OPEN = """
import sys, time
from pathlib import Path
from turbodiff.archive.clip_index import ClipIndex
from webui.panels import gallery
from webui.wording import Words
words = Words("en")
start_s = time.perf_counter()
found = ClipIndex(Path(sys.argv[1]), Path(sys.argv[2])).find()
drawn = gallery.draw(gallery.gallery(found, 0, (), "", False, time.time(), words), words)
assert found.total == int(sys.argv[3]) and drawn.count("td-tile") >= gallery.PER_PAGE
print(time.perf_counter() - start_s)
"""


def measure(clips: int) -> dict[str, float]:
    """All figures for a library of so many clips in a temporary folder; milliseconds are medians."""
    from turbodiff.archive.clip_index import ClipIndex
    from webui.panels import gallery
    from webui.wording import Words

    with tempfile.TemporaryDirectory() as folder:
        outputs, state, words = Path(folder) / "outputs", Path(folder) / "state", Words("en")
        library(outputs, clips)
        index = ClipIndex(outputs, state)
        start_s = time.perf_counter()
        index.refresh()
        figures = {"clips": float(clips), "index_built_s": time.perf_counter() - start_s}

        def shown(text: str = "", only: str = "all", order: str = "newest", offset: int = 0) -> None:
            found = index.find(text, only, order, gallery.PER_PAGE, offset)
            page, searched = offset // gallery.PER_PAGE, bool(text) or only != "all"
            gallery.draw(gallery.gallery(found, page, (), "", searched, time.time(), words), words)

        figures["opened_cold_ms"] = 1000 * statistics.median(cold(outputs, state, clips) for _ in range(COLD))
        asked: dict[str, Callable[[int], None]] = {
            "opened_warm_ms": lambda step: shown(offset=step),  # no page boundary: no answer is there already
            "oldest_page_ms": lambda step: shown(offset=clips - gallery.PER_PAGE - step),
            "search_ms": lambda step: shown(f"clip {clips - step - 1}"),
            "filter_ms": lambda step: shown(only="t2v", offset=step),
            "sort_by_prompt_ms": lambda step: shown(order="prompt", offset=step),
            "sort_by_rating_ms": lambda step: shown(order="rating", offset=step),
            "no_change_seen_ms": lambda _: index.refresh(),
        }
        for name, ask in asked.items():
            figures[name] = 1000 * statistics.median(took_s(ask, step) for step in range(1, WARM + 1))
        return {**figures, **over_http(Path(folder), state, outputs, clips)}


def took_s(ask: Callable[[int], None], step: int) -> float:
    start_s = time.perf_counter()
    ask(step)
    return time.perf_counter() - start_s


def cold(outputs: Path, state: Path, clips: int) -> float:
    """Seconds of the first page in a process of its own, its imports not counted."""
    argv = [sys.executable, "-c", OPEN, str(outputs), str(state), str(clips)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return float(subprocess.run(argv, check=True, capture_output=True, text=True, env=environment).stdout)


def over_http(folder: Path, state: Path, outputs: Path, clips: int) -> dict[str, float]:
    """Seconds of the whole page's answer to a tab, every panel of it: the first after a start, and the next ones."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app, _ = running(port, folder, state, outputs)
    try:
        body, times = look_call(port), []
        for number in range(1 + WARM):
            start_s = time.perf_counter()
            status, answer = call(port, "/gradio_api/run/predict", {**body, "session_hash": f"tab{number}"})
            times.append(time.perf_counter() - start_s)
            assert status == 200 and f'data-total=\\"{clips}\\"'.encode() in answer, json.loads(answer)
        return {"page_first_answer_s": times[0], "page_answer_ms": 1000 * statistics.median(times[1:])}
    finally:
        app.terminate()
        app.wait(30)
