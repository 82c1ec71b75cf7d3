"""The supervisor's side of the cluster against a bridge without Ray: the rules are those of this machine's workers."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from supervisor.bench import scripted

from cluster.conftest import FarBench
from tests.plan.machines import disk
from turbodiff.archive.clips import read_sidecar
from turbodiff.archive.grid_sheets import note_cell
from turbodiff.cli.cluster import cluster_join
from turbodiff.cluster import remote
from turbodiff.jobs.nodes import cluster_facts
from turbodiff.media.contact_sheet import LABEL_PX, SPACE_PX
from turbodiff.media.joining import read_frames
from turbodiff.media.video import ClipWriter
from turbodiff.spec import page_flags
from turbodiff.spec.errors import RequestError, TurbodiffError
from turbodiff.spec.grids import grid_requests
from turbodiff.spec.request import make_request
from turbodiff.supervisor.context import machine_of, worker_pids

Far = Callable[..., FarBench]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--no-local-gpus"], "no_cards_left"),
        (["--cluster-gpus", "2"], "cluster_unnamed"),
        (["--cluster-downloads"], "cluster_unnamed"),
        (["--cluster", "10.0.0.1"], "bad_cluster"),
        (["--cluster", "10.0.0.1:99999"], "bad_cluster"),
        (["--cluster", "auto", "--cluster-gpus", "0"], "bad_cluster_gpus"),
    ],
)
def test_flags_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch, flags: list[str], code: str) -> None:
    monkeypatch.setattr(page_flags, "find_spec", lambda name: name)
    with pytest.raises(RequestError) as caught:
        page_flags.check_flags(page_flags.page_parser().parse_args(flags))
    assert caught.value.code == code


def test_a_cluster_without_the_extra_is_refused_and_nothing_but_the_bridge_imports_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_flags, "find_spec", lambda name: None)
    with pytest.raises(RequestError) as caught:
        page_flags.check_flags(page_flags.page_parser().parse_args(["--cluster", "auto"]))
    assert caught.value.code == "cluster_missing"
    code = "import sys, turbodiff.cli, turbodiff.cluster.remote; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_to_join_where_nobody_answers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended minutes later with a traceback of Ray."""
    monkeypatch.setattr("turbodiff.cli.cluster.find_spec", lambda name: name)
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(TurbodiffError) as caught:
            cluster_join(f"127.0.0.1:{taken.getsockname()[1]}")
    assert caught.value.code == "head_silent" and "refused" in str(caught.value)


def test_a_clip_of_a_node_is_published_here_and_what_its_worker_says_twice_changes_nothing(
    far: Far,
) -> None:
    bench = far()
    job = bench.run(scripted({"steps": 3}))
    assert job.state == "done" and job.attempt == 1, bench.log_text()
    assert job.result is not None
    clip = Path(job.result.path)
    assert clip.is_relative_to(bench.outputs) and clip.is_file()
    assert json.loads(clip.with_name(f"{clip.name}.json").read_text())["sha256"] == job.result.sha256
    assert not list((bench.outputs / ".partial").iterdir())
    assert len([event for _, event in bench.store.events(job.id) if event.type == "phase"]) == 4
    assert not worker_pids(bench.store) and machine_of(bench.store) is None  # its pid is another machine's


def test_a_worker_of_a_node_that_is_killed_costs_an_attempt(far: Far) -> None:
    bench = far()
    job = bench.run(scripted({"die": "SIGKILL"}, {"steps": 1}))
    assert (job.state, job.attempt, job.strikes) == ("done", 2, {"killed": 1}), bench.log_text()


def test_a_clip_that_changed_on_its_way_is_refused(far: Far) -> None:
    bench = far(DAMAGE="x")
    job = bench.run(scripted({"steps": 1}))
    assert job.state == "failed" and job.error is not None and job.error.code == "clip_changed", bench.log_text()
    assert not list(bench.outputs.glob("*/*.mp4")) and not list((bench.outputs / ".partial").iterdir())


def test_cells_of_a_grid_that_nodes_and_this_machine_made_become_one_sheet_here(far: Far, tmp_path: Path) -> None:
    bench = far()
    cells = [
        request.grid for request in map(make_request, grid_requests({"prompt": "x"}, ("seed", "1"), ("steps", "1,2,3")))
    ]
    made = []
    for number, level in enumerate((60, 120, 180)):
        with ClipWriter(tmp_path / f"{number}.mp4", 128, 128, 16, {}) as writer:
            writer.write(np.full((5, 128, 128, 3), level, np.uint8))
        made.append(tmp_path / f"{number}.mp4")
    assert cells[0] and note_cell(bench.state, cells[0], made[0]) is None  # as a worker of this machine does
    for cell, clip in zip(cells[1:], made[1:], strict=True):
        assert not list(bench.outputs.rglob("grid_*.mp4"))
        done = bench.run(scripted({"steps": 1, "clip": str(clip)}, num_frames=5, grid=cell))
        assert done.state == "done", bench.log_text()
    bench.turn_until(lambda: list(bench.outputs.rglob("grid_*.mp4")))
    sheet = next(bench.outputs.rglob("grid_*.mp4"))
    frames = np.concatenate(list(read_frames(sheet))).astype(int)
    middles = [frames[-1, LABEL_PX + 64, LABEL_PX + 64 + column * (128 + SPACE_PX)].mean() for column in range(3)]
    assert len(frames) == 5 and np.abs(np.array(middles) - (60, 120, 180)).max() < 4
    assert read_sidecar(sheet).tags == ("grid",) and not list((bench.state / "grids").iterdir())


def test_a_node_with_another_version_gets_no_job(far: Far) -> None:
    """Two checkouts have one version and, it may be, other fields: that was an error in the log, and it seemed to be
    a node without weights."""
    bench = far()
    bench.list_nodes(
        {"node": "n1", "program": "0.0.1, protocol 1", "host_ooms": None},
        {"node": "n2", "inventory": '{"files": [], "novel": 1}'},
    )
    job = bench.store.submit(scripted({"steps": 1}))
    bench.turn_until(lambda: "other_version; it runs 0.0.1" in bench.log_text())
    bench.turn_until(lambda: "another build" in bench.log_text())
    for _ in range(20):
        bench.supervisor.tick(0.01)
    assert bench.store.job(job).state == "queued" and not bench.supervisor.slots
    assert "ERROR" not in bench.log_text()
    bench.turn_until(lambda: (told := cluster_facts(bench.store)) and told.nodes)
    told = cluster_facts(bench.store)
    assert told is not None and (told.nodes[0].state, told.nodes[0].program) == ("other_version", "0.0.1, protocol 1")


def test_a_machine_that_joined_twice_works_once_and_goes_on_where_the_first_join_ends(far: Far) -> None:
    """Two workers were planned for one card, each for all of it."""
    bench = far()
    gpus = [{"index": 0, "name": "RTX 4090", "uuid": "GPU-a", "total_bytes": 24 << 30, "free_bytes": 23 << 30,
             "used_bytes": 1 << 30, "capability": [8, 9]}]  # fmt: skip
    first, again, third = (
        {"node": f"n{n}", "machine": {"gpus": [{**gpus[0], "uuid": f"GPU-{uuid}"}]}}
        for n, uuid in enumerate(("a", "a", "b"))
    )
    bench.list_nodes(first, again, third)
    jobs = [bench.store.submit(scripted({"steps": 1})) for _ in range(6)]
    bench.turn_until(lambda: "node far: same_cards" in bench.log_text())
    bench.turn_until(lambda: all(bench.store.job(job).over for job in jobs))
    assert {slot.context.node for slot in bench.supervisor.slots} == {"n0", "n2"}
    bench.list_nodes(again, third)
    bench.turn_until(lambda: (told := cluster_facts(bench.store)) and [one.state for one in told.nodes] == ["ok"] * 2)


def test_a_node_without_the_weights_gets_no_job_and_no_card_of_it_is_asked_for(far: Far) -> None:
    bench = far()
    bench.list_nodes({"node": "n1", "weights": False}, {"node": "n2", "host": "other"})
    first, second = (bench.store.submit(scripted({"steps": 1})) for _ in range(2))
    bench.turn_until(lambda: bench.store.job(second).over)
    assert bench.store.job(first).state == "done"
    assert {slot.context.node for slot in bench.supervisor.slots} == {"n2"}
    assert "downloads" not in bench.log_text()  # nobody let it


def test_beside_this_machines_own_card_a_job_goes_to_the_node_that_has_its_weights_or_waits_for_it(far: Far) -> None:
    """This machine's card took it, and it failed for want of files."""
    bench = far({"devices": ("",)})
    bench.list_nodes({"node": "n1", "inventory": disk("wan2.1-14b").model_dump_json()})
    bench.turn_until(lambda: bench.supervisor.slots[0].free)
    asked = scripted({"steps": 1}, model="wan2.1-14b", num_frames=81), scripted({"steps": 1})
    jobs = [bench.store.submit(one) for one in asked]
    bench.turn_until(lambda: all(bench.store.job(job).over for job in jobs))
    assert [(bench.store.job(job).state, bench.store.job(job).slot) for job in jobs] == [("done", 1000), ("done", 0)]
    bench.list_nodes()
    bench.turn_until(lambda: "node far: lost" in bench.log_text())
    jobs = [bench.store.submit(one) for one in asked]
    bench.turn_until(lambda: bench.store.job(jobs[1]).over)
    assert [bench.store.job(job).state for job in jobs] == ["queued", "done"]


def test_a_node_downloads_weights_only_where_a_person_let_it_and_works_once_it_has_them(far: Far) -> None:
    cluster = partial(remote.Cluster, address="far:6379", most_cards=1, downloads=True)
    bench = far({"cluster": cluster})
    bench.list_nodes({"node": "n1", "weights": False, "fetches": 12})
    job = bench.store.submit(scripted({"steps": 1}))
    bench.turn_until(lambda: (told := cluster_facts(bench.store)) and told.nodes and told.nodes[0].downloads)
    assert bench.store.job(job).state == "queued"
    bench.turn_until(lambda: bench.store.job(job).over)
    assert bench.store.job(job).state == "done" and bench.log_text().count("downloads demo") == 1


def test_a_node_that_does_not_answer_keeps_what_it_does_and_is_given_nothing_more(far: Far) -> None:
    bench = far()
    bench.run(scripted({"steps": 1}))
    bench.list_nodes({"node": "n1", "state": "unreachable"})
    bench.turn_until(lambda: "node far: unreachable" in bench.log_text())
    job = bench.store.submit(scripted({"steps": 30, "dt_s": 0.1}))
    chosen_s = bench.supervisor._placement._chosen_s
    bench.turn_until(lambda: bench.supervisor._placement._chosen_s > chosen_s)
    for _ in range(10):
        bench.supervisor.tick(0.02)
    assert bench.store.job(job).state == "queued" and bench.slot.free
    bench.list_nodes({"node": "n1"})
    bench.turn_until(lambda: bench.store.job(job).state == "running")
    bench.list_nodes({"node": "n1", "state": "unreachable"})  # comes back in time: nothing was lost
    bench.turn_until(lambda: bench.log_text().count("node far: unreachable") == 2)
    bench.list_nodes({"node": "n1"})
    bench.turn_until(lambda: bench.store.job(job).over)
    assert (bench.store.job(job).state, bench.store.job(job).attempt) == ("done", 1)


def test_what_a_bridge_that_was_killed_had_not_brought_home_is_removed_and_nothing_else(
    far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", (0.05,))
    bench = far()
    cluster = bench.supervisor.cluster
    assert isinstance(cluster, remote.Cluster)
    bench.turn_until(lambda: cluster.joined)
    child = cluster._child
    assert child is not None
    folder = bench.outputs / ".partial"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (f"7.1.{child.pid}.abc.mp4", f"7.1.{child.pid}.abc.mp4.json", "7.1.1.abc.mp4", "8.1.nonce.mp4"):
        (folder / name).write_bytes(b"half a clip")
    child.kill()
    bench.turn_until(lambda: cluster._child not in (None, child) and cluster.joined)
    assert sorted(part.name for part in folder.iterdir()) == ["7.1.1.abc.mp4", "8.1.nonce.mp4"]


def test_a_node_whose_model_is_far_back_in_the_queue_is_asked_for_its_card(far: Far) -> None:
    """What its jobs wait for was unknown while 64 jobs for a model that no node has stood before them."""
    bench = far()
    bench.store.submit_all([(scripted({"steps": 1}, model="Wan2.1-14B", num_frames=81), None) for _ in range(100)])
    job = bench.store.submit(scripted({"steps": 1}))
    bench.turn_until(lambda: bench.store.job(job).state == "done")


def test_a_cluster_that_asks_for_another_token_is_told_as_such_and_jobs_wait(
    far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray says of it: tests/cluster/test_tokens.py."""
    said = {"op": "refused", "why": "token", "text": "Authentication token is missing or incorrect."}
    code = "import os, sys; fd = int(sys.argv[sys.argv.index('--events-fd') + 1]); "
    code += f"os.write(fd, {json.dumps(said).encode() + bytes([10])!r}); sys.exit(1)"
    bench = far()
    monkeypatch.setattr(remote, "BRIDGE", (sys.executable, "-c", code))
    job = bench.store.submit(scripted({"steps": 1}))
    bench.turn_until(lambda: (told := cluster_facts(bench.store)) and told.state == "refused")
    assert bench.store.job(job).state == "queued" and "token is missing or incorrect" in bench.log_text()
