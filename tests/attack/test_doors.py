"""Ten thousand hostile inputs at every door: none raises what is not meant for a person, none takes long or much."""

import itertools
import json
import os
import random
import resource
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.attack import hostile
from turbodiff.archive import seeds
from turbodiff.archive.clips import clips, read_sidecar
from turbodiff.archive.seed_table import decode_table, read_table
from turbodiff.jobs.store import Store
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import read_event
from turbodiff.spec.request import make_request
from turbodiff.supervisor import recovery
from turbodiff.weights import folders, locate
from webui import form
from webui.panels import compare, gallery, stage, tabs
from webui.snapshot import Snapshot, clip_view
from webui.wording import Words

FACTOR = int(os.environ.get("TURBODIFF_ATTACKS", "300" if os.environ.get("TURBODIFF_SOAK") else "1"))
CPU_S, MEMORY_KIB = 2.0, 200 << 10
WORDS = (Words("en"), Words("zh"))


@pytest.fixture
def day(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs" / "2026-11-23"
    folder.mkdir(parents=True)
    return folder


Attack = Callable[[str, int, Iterator[object], Callable[[object], object]], None]


@pytest.fixture
def attack(record_property: Callable[[str, object], None]) -> Attack:
    def tell(door: str, count: int, inputs: Iterator[object], enter: Callable[[object], object]) -> None:
        record_property("attack", through(door, count, inputs, enter))

    return tell


def through(door: str, count: int, inputs: Iterator[object], enter: Callable[[object], object]) -> str:
    """Send the inputs through a door; only its own errors may come back, each within the limits. Returns the counts."""
    outcomes, slowest_s = Counter[str](), 0.0
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, given in enumerate(itertools.islice(inputs, count * FACTOR)):
        start = time.process_time()
        try:
            enter(given)
            outcomes["taken"] += 1
        except TurbodiffError as error:
            assert error.code and len(str(error)) < 20_000, error.code
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{door}, input {number}: {error!r:.500}") from error
        slowest_s = max(slowest_s, time.process_time() - start)
        assert slowest_s < CPU_S, f"{door}, input {number}"
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < MEMORY_KIB
    counts = f"{outcomes.total()} inputs: {outcomes['taken']} taken, {outcomes['refused']} refused, 0 uncaught"
    return f"{door}: {counts}; slowest {slowest_s:.3f} s, {grown_kib >> 10} MiB more"


def drawn(outputs: Path) -> None:
    """Everything that the page makes of the library's clips."""
    for clip in clips(outputs):
        view = clip_view(clip)
        snapshot = Snapshot(clips=(view,))
        for words in WORDS:
            card = stage.card(view, words, snapshot.clips)
            for html in (
                stage.draw_card(card, words),
                stage.draw_strip(snapshot, 10, "", words),
                gallery.draw_side(card, None, False, 1, words),
                compare.draw([card, card], False, words),
                stage.draw_player(card, None, words),
            ):
                str(html).encode()
        values = form.from_request(view.request.model_dump(mode="json"))
        assert form.sanitize(values) == values
        json.dumps(view.sidecar.model_dump(mode="json"))


def test_sidecars_never_blank_the_page(day: Path, attack: Attack) -> None:
    clip, rng = day / "t2v_1_demo_20261123_003107.mp4", random.Random(1)
    clip.write_bytes(hostile.mp4_with_tag(b"{}"))

    def enter(data: object) -> None:
        Path(f"{clip}.json").write_bytes(data)  # type: ignore[arg-type]
        drawn(day.parent)

    attack("sidecars", 600, iter(lambda: hostile.sidecar_text(rng), None), enter)


def test_tags_of_an_mp4_never_blank_the_page(day: Path, attack: Attack) -> None:
    clip, rng = day / "t2v_1_demo_20261123_003107.mp4", random.Random(2)

    def enter(data: object) -> None:
        clip.write_bytes(data)  # type: ignore[arg-type]
        drawn(day.parent)
        read_sidecar(clip)

    attack("tags of an mp4", 500, iter(lambda: hostile.mp4(rng), None), enter)


def test_foreign_sidecars_never_stop_a_start(day: Path, tmp_path: Path, attack: Attack) -> None:
    rng, store = random.Random(3), Store(tmp_path / "state")

    def enter(data: object) -> None:
        for number, text in enumerate(data):  # type: ignore[arg-type, var-annotated]
            clip = day / f"t2v_{number}_demo_20261123_003107.mp4"
            clip.write_bytes(hostile.mp4_with_tag(b"{}"))
            Path(f"{clip}.json").write_bytes(text)
        recovery.rebuild(store, day.parent, recovery.Report())
        for words in WORDS:
            str(tabs.draw_seeds(seeds.list_seeds(store), set(), False, words)).encode()
        store.jobs()
        with store.write() as db:
            for table in ("artifact", "seed", "job"):
                db.execute(f"DELETE FROM {table}")

    attack("a start", 8, iter(lambda: [hostile.sidecar_text(rng) for _ in range(40)], None), enter)
    store.close()


def test_requests_are_taken_or_refused_in_words(attack: Attack) -> None:
    rng = random.Random(4)
    attack("requests", 3500, iter(lambda: hostile.request_fields(rng), None), make_request)  # type: ignore[arg-type]


def test_form_values_have_their_types(attack: Attack) -> None:
    rng = random.Random(5)

    def enter(values: object) -> None:
        form.request_fields(form.sanitize(values))  # type: ignore[arg-type]

    attack("form values", 1500, iter(lambda: hostile.request_fields(rng), None), enter)


def test_seed_tables_are_read_or_refused_in_words(attack: Attack) -> None:
    rng = random.Random(6)

    def enter(data: object) -> None:
        read_table(decode_table(data, "seeds.md")[0])  # type: ignore[arg-type]

    attack("seed tables", 1500, iter(lambda: hostile.seed_table(rng), None), enter)


def test_lines_of_a_worker_are_events_or_a_value_error(attack: Attack) -> None:
    rng = random.Random(7)

    def enter(line: object) -> None:
        try:
            read_event(line)  # type: ignore[arg-type]
        except ValueError:  # what supervisor/worker_process.py expects
            return

    attack("event lines", 1500, iter(lambda: hostile.event_line(rng), None), enter)


def test_weight_files_are_passed_over_with_a_reason(tmp_path: Path, attack: Attack) -> None:
    rng = random.Random(8)
    torch.save({"model": {"blocks.0.ffn.0.weight": torch.zeros(4, 32)}}, tmp_path / "sound.pth")
    archive = zipfile.ZipFile(tmp_path / "sound.pth")
    pickle = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    archive.close()
    path = tmp_path / "a.pth"

    def enter(data: object) -> None:
        path.write_bytes(data)  # type: ignore[arg-type]
        files, error, _ = locate._match(folders.Entry(path))
        assert not files and error is not None and len(str(error)) < 3000

    attack("torch files", 1000, iter(lambda: hostile.torch_zip(rng, pickle), None), enter)
    shutil.rmtree(tmp_path, ignore_errors=True)
