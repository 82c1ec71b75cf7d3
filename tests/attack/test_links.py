"""A folder of ours that is a link: nothing behind it is moved, removed or shown, and nothing of ours ends up there."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from supervisor.bench import Bench

from turbodiff.archive import trash
from turbodiff.archive.clip_index import ClipIndex
from turbodiff.archive.clips import clip_path, partial_path, publish
from turbodiff.archive.disk import check_place, remove_left
from turbodiff.diagnostics.exports import Exports
from turbodiff.diagnostics.logs import LogFile
from turbodiff.gpu.probe import machine_now
from turbodiff.jobs import journal
from turbodiff.plan.planner import plan_request
from turbodiff.runtime.latents_cache import LatentsCache
from turbodiff.runtime.text import TextCache, TextRows
from turbodiff.spec.clips import Sidecar
from turbodiff.spec.request import make_request
from turbodiff.supervisor import recovery
from turbodiff.weights.locate import inventory
from webui.uploads import make_room

DAY = f"{datetime.now():%Y-%m-%d}"
BATCH = "20200101T000000-abcdef"
OURS = (
    "outputs/.partial", "outputs/.trash", f"outputs/.trash/{BATCH}", f"outputs/.trash/{BATCH}/2020-01-01",
    f"outputs/{DAY}", "state/uploads", "state/exports", "state/backups", "state/logs",
    "state/accepted", "state/accepted/waiting",
)  # fmt: skip
NAMES = (
    "diary.txt", "t2v_1_demo_20200101_000000.mp4", "t2v_1_demo_20200101_000000.mp4.json", "2.0.4194999.mp4",
    "clip.0011aabb.gif", *(f"2020010{day}_000000.db" for day in range(9)), *(f"{day}.log" for day in range(20)),
)  # fmt: skip


def published(outputs: Path) -> Path:
    check_place(outputs, outputs, 16, 16, 1)
    partial = partial_path(outputs, 1, 0)
    partial.write_bytes(b"clip")
    sidecar = Sidecar(request=make_request({"prompt": "x", "seed": 1}))
    return publish(partial, clip_path(outputs, "t2v", 1, "demo", datetime.now()), sidecar, b"poster")


@pytest.mark.parametrize("place", OURS)
def test_nothing_behind_a_link_is_moved_or_removed(place: str, tmp_path: Path) -> None:
    home, link = tmp_path / "home", tmp_path / place
    for folder in (home, home / "2020-01-01", home / BATCH / "2020-01-01"):
        folder.mkdir(parents=True)
        for name in NAMES:
            (folder / name).write_bytes(b"mine")
            os.utime(folder / name, (0, 0))
    before = {path for path in home.rglob("*") if path.is_file()}
    link.parent.mkdir(parents=True)
    link.symlink_to(home / "2020-01-01" if place.endswith("2020-01-01") else home)

    bench = Bench(tmp_path)
    state, outputs, store = bench.state, bench.outputs, bench.store
    made = published(outputs)
    bench.supervisor._slow_s = -1e9
    bench.supervisor.tick(0.0)
    assert outputs.resolve() in made.resolve().parents, made
    index, log = ClipIndex(outputs, state), LogFile(tmp_path / "a.log")
    log.say("a line")
    for step in (
        index.refresh, lambda: index.delete([made.stem]), index.refresh, lambda: index.restore([made.stem]),
        index.refresh, lambda: trash.purge(outputs, datetime.now(UTC)), lambda: make_room(state / "uploads"),
        Exports(state / "exports")._sweep, lambda: remove_left(outputs), lambda: check_place(outputs, state, 16, 16, 1),
        lambda: log.start_over(state / "logs", "a"),
        lambda: recovery.backup(store, state, 0.0), lambda: recovery.sweep(outputs),
    ):  # fmt: skip
        step()
    assert [entry.name for entry in index.find().entries] == [made.stem] and made.is_file()
    bench.supervisor.close()
    now = {path for path in home.rglob("*") if path.is_file()}
    assert sorted(before - now) == [] and all(path.read_bytes() == b"mine" for path in before)
    assert {path.suffix for path in now - before} <= {".log", ".db"}, "a clip is behind the link"


@pytest.mark.parametrize("place", ["accepted", "accepted/waiting", "latents", "embeddings"])
def test_nothing_is_read_from_or_kept_behind_a_link(place: str, tmp_path: Path) -> None:
    state, home = tmp_path / "state", tmp_path / "home"
    rows = TextRows.padded(torch.ones(2, 4), 8)
    asked = make_request({"prompt": "x", "seed": 1, "nonce": "once"})
    plan = plan_request(asked, machine_now(), inventory())
    entry = journal.Accepted(id=1, nonce="once", created_s=0.0, request=asked, plan=plan)

    def keep() -> None:
        journal.write_waiting(state, entry)
        LatentsCache(state, 1).save(torch.zeros(1, 16, 1, 2, 2), plan)
        TextCache(state / "embeddings", "an encoder", 8).save("a cat", rows)

    def kept() -> list[bool]:
        text = TextCache(state / "embeddings", "an encoder", 8).load("a cat")
        jobs, files = journal.waiting_jobs(state), list(journal.entries(state))
        return [bool(jobs), bool(files), LatentsCache(state, 1).load(plan.request) is not None, text is not None]

    keep()
    assert kept() == [True] * 4
    (state / place).rename(home)
    (state / place).symlink_to(home)
    names = sorted(home.rglob("*"))
    unseen = {"accepted": {0, 1}, "accepted/waiting": {0}, "latents": {2}, "embeddings": {3}}[place]
    assert {number for number, seen in enumerate(kept()) if not seen} == unseen
    LatentsCache(state, 1).delete()
    journal.remove_entry(state, "once")
    assert sorted(home.rglob("*")) == names
    keep()
    assert sorted(home.rglob("*")) == names and not (state / place).is_symlink() and kept() == [True] * 4


def test_a_folder_that_becomes_a_link_under_the_index_loses_nothing(tmp_path: Path) -> None:
    made, index = published(tmp_path / "outputs"), ClipIndex(tmp_path / "outputs", tmp_path / "state")
    index.refresh()
    home = tmp_path / "home"
    made.parent.rename(home)
    made.parent.symlink_to(home)
    assert index.delete([made.stem]) == "" and (home / made.name).is_file()
