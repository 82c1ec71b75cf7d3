"""An export of the page is a process of its own; its file is whole or not there; the same question is asked once."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
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


def test_many_who_ask_at_once_begin_four(tmp_path: Path):
    clip, exports = write(tmp_path / "t2v_1.mp4", shapes(33)).path, Exports(tmp_path / "exports")
    asked = [make_export({"format": "gif", "fps": 60, "end_s": 1 + number / 10}) for number in range(12)]

    def start(one) -> str:
        try:
            return exports.start(clip, one)
        except RequestError as error:
            assert error.code == "export_busy"
            return ""

    with ThreadPoolExecutor(12) as pool:
        begun = [name for name in pool.map(start, asked) if name]
    for name in begun:
        wait(exports, name)
    assert len(begun) == MAX_AT_ONCE


def test_what_stands_where_a_process_id_should_be_holds_nobody_up(tmp_path: Path):
    (tmp_path / "big.gif.pid").write_text(f"{10**30} 5")
    (tmp_path / "bytes.gif.pid").write_bytes(b"\xff")
    (tmp_path / "folder.gif.pid").mkdir()
    os.mkfifo(tmp_path / "pipe.gif.pid")
    assert all(one.state == "failed" for one in Exports(tmp_path).newest())


def test_the_oldest_files_go_where_all_take_too_much(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("turbodiff.diagnostics.exports.MAX_BYTES", 250)
    for age_s, name in enumerate(("new.gif", "older.gif", "oldest.gif")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (time.time() - 60 * age_s,) * 2)
    (tmp_path / "clip").mkdir()
    clip = write(tmp_path / "clip" / "t2v_1.mp4", shapes(5)).path
    exports = Exports(tmp_path)
    wait(exports, exports.start(clip, make_export({"format": "first"})))
    assert {path.name for path in tmp_path.glob("*.gif")} == {"new.gif", "older.gif"}
