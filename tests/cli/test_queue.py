"""The queue and the seed archive from the shell."""

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


def test_a_support_bundle_is_written(turbodiff, job, tmp_path):
    assert turbodiff("support-bundle", "help.zip")[0] == 0
    assert (tmp_path / "help.zip").stat().st_size > 100
