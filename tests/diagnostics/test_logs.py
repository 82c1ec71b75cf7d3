import subprocess
import time
from pathlib import Path

from supervisor.bench import Bench, scripted

from turbodiff.diagnostics.logs import LogFile, clean, log_folder, log_line, tail


def test_a_line_has_utc_level_process_job_and_text() -> None:
    line = log_line("Loading Wan2.1-14B model... 13.5/27.0 GiB 6.1 s", "worker", 12, at_s=0.5)
    assert line == "1970-01-01T00:00:00.500Z [INFO] worker j12 Loading Wan2.1-14B model... 13.5/27.0 GiB 6.1 s\n"


def test_a_level_in_front_of_a_text_becomes_the_level_of_the_line() -> None:
    assert " [WARNING] web slow\n" in log_line("[WARNING] slow", "web")
    assert " [INFO] web Uvicorn running\n" in log_line("INFO:     Uvicorn running", "web")


def test_memory_failures_say_oom() -> None:
    line = log_line("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "worker", 3)
    assert "[ERROR] worker j3 OOM torch" in line


def test_no_prompt_can_forge_a_line_or_hide_text() -> None:
    for text in ("a\n2026 [INFO] fake", "a\r\x1b[2Kb", "a\u2028b", "a\u202eb", "nul \x00", "\x9b31m"):
        assert clean(text).isprintable()
    assert len(clean("x" * 10_000_000)) == 4000


def test_secrets_do_not_reach_the_log() -> None:
    for text in (
        "HF_TOKEN=hf_abcdefghijklmnop",
        "Authorization: Bearer abcdefghijklmnop",
        "https://me:abcdefghijklmnop@mirror.example/x",
        "password: abcdefghijklmnop",
        '{"api_key": "abcdefghijklmnop"}',
        "--auth=abcdefghijklmnop",
    ):
        assert "abcdefghijklmnop" not in clean(text)


def test_ordinary_words_are_not_taken_for_secrets() -> None:
    text = "41 tokens: prompt 'the author tokenizes a secret garden' seed=42"
    assert clean(text) == text


def test_a_tail_follows_from_run_to_run(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    log.say("first run")
    inode = log.path.stat().st_ino
    follower = subprocess.Popen(
        ["tail", "-f", "-n", "+1", str(log.path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert follower.stdout is not None
    try:
        assert b"first run" in follower.stdout.readline()
        log.start_over(tmp_path / "logs", "run1")
        time.sleep(1.2)  # tail looks once a second where it has no inotify
        log.say("second run")
        assert b"second run" in follower.stdout.readline()
    finally:
        follower.kill()
        follower.wait()
        follower.stdout.close()
    assert log.path.stat().st_ino == inode
    assert "first run" in (tmp_path / "logs" / "run1.log").read_text()
    assert "first run" not in log.path.read_text()


def test_fault_77_a_deleted_log_is_made_again(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    log.say("one")
    log.path.unlink()
    log._checked_s = -10.0
    log.say("two")
    assert "two" in log.path.read_text()


def test_fault_77_a_log_that_cannot_be_written_keeps_its_last_lines_in_memory(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "folder-that-is-missing" / "a.log")
    for i in range(3000):
        log.say(f"line {i}")
    assert log.lost_lines == 3000
    assert len(log.ring) == 2000 and "line 2999" in log.ring[-1]


def test_fault_77_a_job_runs_on_when_the_log_cannot_be_written(bench: Bench) -> None:
    bench.supervisor.log.path.unlink()
    bench.supervisor.log.path.mkdir()
    bench.supervisor.log.close()
    assert bench.run(scripted({})).state == "done"
    assert any("done:" in line for line in bench.supervisor.log.ring)


def test_a_symbolic_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "a.log").symlink_to(tmp_path / "target")
    LogFile(tmp_path / "a.log").say("x")
    assert (tmp_path / "target").read_text() == "precious"


def test_the_size_is_capped_and_old_copies_go(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    for i in range(15):
        log.say("x")
        log.start_over(tmp_path / "logs", f"run{i:02}")
    assert len(list((tmp_path / "logs").iterdir())) == 10


def test_logs_go_to_the_state_folder_when_the_working_folder_takes_none(tmp_path: Path) -> None:
    assert log_folder(tmp_path, tmp_path / "state") == tmp_path
    assert log_folder(tmp_path / "missing", tmp_path / "state") == tmp_path / "state"


def test_tail_returns_the_last_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    assert tail(path, 3) == ["line 997", "line 998", "line 999"]
    assert tail(tmp_path / "missing") == []


def test_what_a_worker_prints_is_in_the_log_as_whole_lines_with_its_job(bench: Bench) -> None:
    job = bench.run(scripted({"print": "[INFO] Loading Wan2.1-14B model... 13.5/27.0 GiB 6.1 s\ntoken=abcdef"}))
    text = bench.log_text()
    assert f"Z [INFO] worker j{job.id} Loading Wan2.1-14B model... 13.5/27.0 GiB 6.1 s\n" in text
    assert "abcdef" not in text


def test_the_run_log_tells_the_story_of_a_job(bench: Bench) -> None:
    bench.run(scripted({"steps": 2}, seed=42))
    bench.run(scripted({"error": {"code": "key_missing", "what": "a key is missing", "try_instead": "another file"}}))
    text = bench.run_log_text()
    for words in ("seed 42", "step 2/2", "denoise done in 0.1 s, peak 2.0 GiB", "verdict: done", "try: another file"):
        assert words in text
