"""The queue and the seed archive from the shell."""

import json
import struct

import pytest

from turbodiff.studio import Studio


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Studio().submit({"prompt": "a red circle moves right on a black background", "seed": 42})


def test_a_waiting_job_is_listed_shown_moved_and_cancelled(turbodiff, job):
    assert f"{job} queued" in " ".join(turbodiff("jobs", "list")[1].out.split())
    assert turbodiff("jobs", "move", str(job), "first")[0] == 0
    assert turbodiff("jobs", "pause")[0] == turbodiff("jobs", "resume")[0] == 0
    assert "cancelled" in turbodiff("jobs", "cancel", str(job))[1].out
    assert "red circle" in turbodiff("jobs", "show", str(job))[1].out
    assert turbodiff("jobs", "retry", str(job))[0] == 0


def test_an_unknown_job_is_one_clear_error(turbodiff, job):
    code, said = turbodiff("jobs", "show", "999")
    assert code == 2 and "error: job" in said.err


def test_restart_without_an_app_says_so(turbodiff, job):
    code, said = turbodiff("restart")
    assert code == 1 and "not running" in said.err


def test_the_archive_goes_in_and_out(turbodiff, tmp_path):
    table = tmp_path / "mine.md"
    rows = "| 樱花树下的武士,风吹起和服下摆 | 42 | Wan2.1-1.3B | 480p | 动作流畅,光影绝美 | |\n"
    table.write_text(
        "| 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |\n|---|---|---|---|---|---|\n" + rows, "utf-8"
    )
    assert "1 rows" in turbodiff("seeds", "import", str(table))[1].out
    assert rows in turbodiff("seeds", "export")[1].out
    assert "武士" in turbodiff("seeds", "list", "武士")[1].out


HOSTILE = "a cat\x1b[31m red\x1b]0;title\x07\nforged 7 done\r\u202egnp.exe\u2028\x9b2J\u200b"
HIDDEN = set(HOSTILE) - set(map(chr, range(32, 127))) - {"\n"}


def test_no_command_for_people_obeys_what_stands_in_a_prompt(turbodiff, tmp_path):
    studio = Studio(None, tmp_path / "outputs")
    job = str(studio.submit({"prompt": HOSTILE, "seed": 42}))
    table = tmp_path / "mine.md"
    cell = HOSTILE.replace("\n", " ").replace("\u2028", " ")
    rows = f"| {cell} | 42 | Wan2.1-1.3B | 480p | {cell} | {cell} |\n"
    table.write_text(
        "| Prompt | Seed | Model | Resolution | Rating | Notes |\n|---|---|---|---|---|---|\n" + rows, "utf-8"
    )
    assert "1 rows" in turbodiff("seeds", "import", str(table))[1].out
    for command in (("jobs", "list"), ("jobs", "show", job), ("seeds", "list")):
        said = turbodiff(*command)[1].out
        assert "a cat\\x1b[31m red" in said.replace("\\\\", "\\"), command
        assert not HIDDEN & set(said) and "\nforged" not in said, command
    assert json.loads(turbodiff("jobs", "show", job, "--json")[1].out)["request"]["prompt"] == HOSTILE
    code, said = turbodiff("models", "verify", f"no{HOSTILE}.safetensors")
    assert code == 2 and "\\x1b[31m" in said.err and not HIDDEN & set(said.err)


def test_names_of_files_and_what_they_hold_are_escaped_too(turbodiff, tmp_path):
    header = json.dumps({f"{HOSTILE}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / f"{HOSTILE.replace('/', '')}.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    said = turbodiff("models", "verify", str(path))[1]
    assert "\\x1b[31m" in said.out + said.err and not HIDDEN & set(said.out + said.err)


def test_a_support_bundle_is_written(turbodiff, job, tmp_path):
    assert turbodiff("support-bundle", "help.zip")[0] == 0
    assert (tmp_path / "help.zip").stat().st_size > 100
