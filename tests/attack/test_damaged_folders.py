"""What else stands where our folders and files should: the queue goes on, or the job says what is in its way."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from supervisor.bench import Bench, request, scripted

from tests.attack.other_users import another_users
from turbodiff.archive.disk import check_output
from turbodiff.diagnostics.logs import RUN_LOG, STARTUP_LOG, LogFile, tail
from turbodiff.gpu.probe import machine_now
from turbodiff.jobs.journal import JOURNAL
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.latents_cache import LatentsCache
from turbodiff.runtime.text import TextCache, TextRows
from turbodiff.spec.errors import OutputError
from turbodiff.supervisor import recovery
from turbodiff.weights.locate import inventory

pytestmark = pytest.mark.usefixtures("ordinary_user")

BY: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_text("mine"),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nowhere": lambda path: path.symlink_to("/nowhere/else"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/full"),
    "another user's file": another_users(lambda path: path.write_text("theirs")),
    "another user's folder": another_users(Path.mkdir),
}
PLACES = (
    "outputs/.partial",
    "outputs/seeds.md",
    "state/backups",
    "state/logs",
    "state/worker0.json",
    STARTUP_LOG,
    RUN_LOG,
)


@pytest.mark.parametrize("by", BY)
def test_the_queue_goes_on_whatever_stands_in_its_way(by: str, tmp_path: Path) -> None:
    for place in PLACES:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        BY[by](tmp_path / place)
    bench = Bench(tmp_path)
    try:
        assert bench.run(scripted({}, seed=1)).state == "done"
        for _ in range(3):
            bench.supervisor._slow_s = -1e9
            bench.supervisor.tick(0.0)
        assert bench.run(scripted({}, seed=2)).state == "done"
    finally:
        bench.supervisor.close()


def test_a_folder_that_a_person_named_is_never_put_aside(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    BY["another user's folder"](theirs)
    with pytest.raises(OutputError):
        check_output(theirs / "out.mp4", 128, 128, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("by", BY)
def test_a_job_is_accepted_whatever_stands_where_the_journal_should(by: str, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    BY[by](tmp_path / "state" / JOURNAL)
    bench = Bench(tmp_path)
    try:
        assert bench.run(scripted({}, seed=1)).state == "done"
    finally:
        bench.supervisor.close()


@pytest.mark.parametrize("by", [name for name in BY if name not in ("a file", "a device")])
def test_a_backup_that_is_none_is_passed_over(by: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    job = bench.run(scripted({}, seed=1))
    bench.supervisor.close()
    BY[by](tmp_path / "state" / recovery.BACKUPS / "99990101_000000.db")
    (tmp_path / "state" / "turbodiff.db").write_bytes(b"text" * 1000)
    store, report = recovery.recover(tmp_path / "state", tmp_path / "outputs")
    assert report.damage and [found.nonce for found in store.jobs()] == [job.nonce]
    store.close()


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "the file"])
def test_latents_that_cannot_be_read_or_kept_are_made_again(whole: bool, by: str, tmp_path: Path) -> None:
    asked = request().seeded()
    plan, cache = plan_request(asked, machine_now(), inventory()), LatentsCache(tmp_path, 1)
    place = tmp_path / "latents"
    if not whole:
        place.mkdir()
        place = place / "1.safetensors"
    BY[by](place)
    assert cache.load(plan.request) is None and cache.load_plan(asked) is None
    cache.save(torch.zeros(1, 16, 1, 2, 2), plan)
    cache.load(plan.request)
    cache.delete()


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "the file"])
def test_text_rows_that_cannot_be_read_or_kept_are_read_again(whole: bool, by: str, tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "embeddings", "an encoder", 8)
    place = tmp_path / "embeddings"
    if not whole:
        place.mkdir()
        place = cache.path("a cat")
    BY[by](place)
    assert cache.load("a cat") is None
    cache.save("a cat", TextRows.padded(torch.ones(2, 4), 8))


@pytest.mark.parametrize("by", BY)
def test_a_log_that_cannot_be_written_waits_for_nobody(by: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    BY[by](path)
    log = LogFile(path)
    log.start_over(tmp_path / "archive", "before")
    log.say("a line")
    assert len(log.ring) == 1 and len(tail(path)) <= 1
    log.close()
