"""An export of the page is a process of its own; its file is whole or not there; the same question is asked once."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.media.clips import shapes, write
from turbodiff.diagnostics.exports import MAX_AT_ONCE, Exports
from turbodiff.spec.errors import RequestError
from turbodiff.spec.exports import make_export


def wait(exports: Exports, name: str):
    end_s = time.monotonic() + 120
    while (found := exports.of(name)) is None or found.state == "running":
        assert time.monotonic() < end_s
        time.sleep(0.1)
    return found


def test_an_export_runs_beside_the_page_and_is_asked_for_once(tmp_path: Path):
    clip, exports = write(tmp_path / "t2v_1.mp4", shapes(9)).path, Exports(tmp_path / "exports")
    name = exports.start(clip, make_export({"format": "gif"}))
    found = wait(exports, name)
    assert (found.state, found.media_type) == ("done", "image/gif") and found.size_bytes
    assert exports.file(name).read_bytes()[:3] == b"GIF" and exports.newest() == [found]
    changed = exports.file(name).stat().st_mtime_ns
    assert exports.start(clip, make_export({"format": "gif"})) == name
    assert exports.file(name).stat().st_mtime_ns == changed
    assert exports.start(clip, make_export({"format": "gif", "end_s": 0.3})) != name


def test_one_that_fails_says_why_and_leaves_no_file(tmp_path: Path):
    (tmp_path / "bad.mp4").write_bytes(b"no clip")
    exports = Exports(tmp_path / "exports")
    found = wait(exports, exports.start(tmp_path / "bad.mp4", make_export({})))
    assert found.state == "failed" and found.error["code"] == "clip_unread"
    assert exports.file(found.name) is None


@pytest.mark.parametrize("name", ["../turbodiff.db", "", "a/b", "x" * 400, "nobody.asked.gif", ".."])
def test_no_other_file_is_ever_handed_out(tmp_path: Path, name: str):
    (tmp_path / "turbodiff.db").write_text("secret")
    (tmp_path / "exports").mkdir()
    assert Exports(tmp_path / "exports").file(name) is None


def test_four_at_once_are_enough(tmp_path: Path, monkeypatch):
    clip, exports = write(tmp_path / "t2v_1.mp4", shapes(9)).path, Exports(tmp_path / "exports")
    monkeypatch.setattr("turbodiff.diagnostics.exports.EXPORT", ("/bin/sh", "-c", "sleep 60", "sh"))
    try:
        for quality in range(1, MAX_AT_ONCE + 1):
            exports.start(clip, make_export({"quality": quality}))
        with pytest.raises(RequestError):
            exports.start(clip, make_export({"quality": 50}))
    finally:
        for path in (tmp_path / "exports").glob("*.pid"):
            os.kill(int(path.read_text().split()[0]), signal.SIGKILL)
