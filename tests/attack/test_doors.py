"""Fourteen thousand hostile inputs at every door: none raises what is not meant for a person, none takes long or much,
none writes elsewhere or asks anybody."""

import asyncio
import contextlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.responses import PlainTextResponse

from tests.attack import hostile, hostile_http
from tests.attack.examiner import through, told
from tests.weights import tiny
from turbodiff.archive import seeds
from turbodiff.archive.clips import clips, read_sidecar
from turbodiff.archive.seed_table import decode_table, read_table
from turbodiff.jobs.store import Store
from turbodiff.media import decode_picture, pictures
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import read_event
from turbodiff.spec.request import make_request
from turbodiff.supervisor import recovery
from turbodiff.weights import folders, locate
from turbodiff.weights.lora_facts import lora_facts
from webui import form
from webui.panels import compare, gallery, stage, tabs
from webui.proxies import ProxyMiddleware
from webui.request_guard import RequestGuard
from webui.security import SecurityMiddleware
from webui.sessions import Sessions
from webui.snapshot import Snapshot, clip_view
from webui.wording import Words

CORPUS = Path(__file__).with_name("corpus")
FACTOR = int(os.environ.get("TURBODIFF_ATTACKS", "60" if os.environ.get("TURBODIFF_SOAK") else "1"))
WORDS = (Words("en"), Words("zh"))


@pytest.fixture
def day(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs" / "2026-11-23"
    folder.mkdir(parents=True)
    return folder


Attack = Callable[..., None]


@pytest.fixture
def attack(record_property: Callable[[str, object], None], tmp_path: Path) -> Attack:
    """Sends so many inputs through a door, many more in a soak, and has the counts printed."""

    def send(door: str, count: int, make: Callable[[], object], enter: Callable[[Any], object], mib: int = 200) -> None:
        inputs = (make() for _ in range(count * FACTOR))
        record_property("attack", told(through(door, inputs, enter, tmp_path, mib << 10)))

    return send


LEAKS: dict[str, Callable[[object], object]] = {
    "a file elsewhere": lambda _: Path("/tmp/turbodiff-leak").write_text("x"),
    "a file removed": lambda _: Path("/tmp/turbodiff-leak").unlink(missing_ok=True),
    "a way out of the folder": lambda path: Path(path, "..", "x").write_text("x"),  # type: ignore[arg-type]
    "a connection": lambda _: socket.create_connection(("127.0.0.1", 9), 1),
    "a name looked up": lambda _: socket.getaddrinfo("example.org", 80),
    "a program": lambda _: subprocess.run(["true"]),
    "a pickle": lambda _: pickle.loads(pickle.dumps(Counter())),
    "an error": lambda _: int("x"),
    "a write whose error is swallowed": lambda _: _swallow(),
    "two seconds": lambda _: _burn(2.2),
    "memory": lambda _: bytes(b"x" * (260 << 20)),
    "an exit": lambda _: os._exit(0),
}  # fmt: skip


def _swallow() -> None:
    with contextlib.suppress(Exception):
        Path("/tmp/turbodiff-leak").touch()


def _burn(seconds: float) -> None:
    end_s = time.process_time() + seconds
    while time.process_time() < end_s:
        pass


@pytest.mark.parametrize("leak", LEAKS)
def test_a_door_that_leaks_is_found(leak: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a leak"):
        through("a leak", [tmp_path], LEAKS[leak], tmp_path)


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

    attack("sidecars", 600, lambda: hostile.sidecar_text(rng), enter)


def test_tags_of_an_mp4_never_blank_the_page(day: Path, attack: Attack) -> None:
    clip, rng = day / "t2v_1_demo_20261123_003107.mp4", random.Random(2)

    def enter(data: object) -> None:
        clip.write_bytes(data)  # type: ignore[arg-type]
        drawn(day.parent)
        read_sidecar(clip)

    attack("tags of an mp4", 500, lambda: hostile.mp4(rng), enter)


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

    attack("a start", 8, lambda: [hostile.sidecar_text(rng) for _ in range(40)], enter)
    store.close()


def test_requests_are_taken_or_refused_in_words(attack: Attack) -> None:
    rng = random.Random(4)
    attack("requests", 3500, lambda: hostile.request_fields(rng), make_request)


def test_form_values_have_their_types(attack: Attack) -> None:
    rng = random.Random(5)

    def enter(values: object) -> None:
        form.request_fields(form.sanitize(values))  # type: ignore[arg-type]

    attack("form values", 1500, lambda: hostile.request_fields(rng), enter)


def test_seed_tables_are_read_or_refused_in_words(attack: Attack) -> None:
    rng = random.Random(6)

    def enter(data: object) -> None:
        read_table(decode_table(data, "seeds.md")[0])  # type: ignore[arg-type]

    attack("seed tables", 1500, lambda: hostile.seed_table(rng), enter)


def test_lines_of_a_worker_are_events_or_a_value_error(attack: Attack) -> None:
    rng = random.Random(7)

    def enter(line: object) -> None:
        try:
            read_event(line)  # type: ignore[arg-type]
        except ValueError:  # what supervisor/worker_process.py expects
            return

    attack("event lines", 1500, lambda: hostile.event_line(rng), enter)


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

    attack("torch files", 1000, lambda: hostile.torch_zip(rng, pickle), enter)
    shutil.rmtree(tmp_path, ignore_errors=True)


def sound_files(folder: Path) -> dict[str, bytes]:
    """Small weights of each container, as people have them."""
    state = {"blocks.0.ffn.0.weight": torch.zeros(4, 32), "patch_embedding.weight": torch.zeros(4, 4, 1, 2, 2)}
    tiny.save_safetensors(state, folder / "a.safetensors")
    tiny.save_gguf(state, folder / "a.gguf")
    return {name: (folder / name).read_bytes() for name in ("a.safetensors", "a.gguf")}


@pytest.mark.parametrize(
    ("name", "make"), [("a.safetensors", hostile.safetensors), ("a.gguf", hostile.gguf), ("a.pth", hostile.odd_zip)]
)
def test_weights_of_each_container_are_passed_over_with_a_reason(
    name: str, make: Callable[[random.Random, bytes], bytes], tmp_path: Path, attack: Attack
) -> None:
    rng, path, sound = random.Random(9), tmp_path / name, sound_files(tmp_path).get(name, b"")

    def enter(data: bytes) -> None:
        path.write_bytes(data)
        files, error, _ = locate._match(folders.Entry(path))
        assert not files and error is not None and len(str(error)) < 3000
        lora_facts(path)

    attack(f"{path.suffix} files", 700, lambda: make(rng, sound), enter)


def test_pictures_are_decoded_or_refused_in_words(tmp_path: Path, attack: Attack) -> None:
    """In the child as in the decoder's own process, whose limit is 2 GiB: real pixels may take more."""
    rng = random.Random(10)
    wanted: list[decode_picture.Wanted] = [
        {"want": "fit", "width": 64, "height": 48, "fit": fit, "background": "white"}
        for fit in ("crop", "pad", "stretch")
    ]

    def enter(data: bytes) -> None:
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                decode_picture.decode(data, rng.choice(wanted))
        except SystemExit:
            line = json.loads(said.getvalue())
            raise pictures._refused(line["code"], Path("a.png"), line["got"]) from None
        except Exception as error:  # noqa: BLE001  main() says "damaged" of whatever a decoder raises
            raise pictures._refused("picture_broken", Path("a.png"), f"{error}"[:200]) from None

    attack("pictures", 500, lambda: hostile.picture(rng), enter)


def test_pictures_go_by_their_own_process_and_it_leaves_nothing(tmp_path: Path) -> None:
    rng, path, before = random.Random(11), tmp_path / "a.png", set(tmp_path.iterdir())
    for _ in range(20):
        path.write_bytes(hostile.picture(rng))
        with contextlib.suppress(TurbodiffError):
            pictures.fit_picture(path, 64, 48, "crop")
    assert set(tmp_path.iterdir()) - before == {path}


def test_requests_before_the_login_are_answered(attack: Attack) -> None:
    rng = random.Random(12)

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("inside")(scope, receive, send)

    locked = SecurityMiddleware(
        RequestGuard(inside), "0.0.0.0", password="open sesame", sessions=Sessions("open sesame")
    )
    app = ProxyMiddleware(locked, proxies=["10.0.0.0/8"], root_path="/x")

    def enter(given: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
        scope, messages = given
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        assert sent and sent[0]["type"] == "http.response.start" and sent[0]["status"] < 500
        body = b"".join(message.get("body", b"") for message in sent)
        assert b"inside" not in body or scope["path"].removeprefix("/x") in ("/healthz", "/favicon.ico")

    attack("requests before the login", 1500, lambda: hostile_http.http_request(rng), enter)


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_a_file_of_the_corpus_is_refused_or_taken(path: Path, tmp_path: Path) -> None:
    """Files that once were too much, and those that a soak finds."""

    def enter(_: object) -> None:
        data, copy = path.read_bytes(), tmp_path / path.name
        copy.write_bytes(data)
        match path.suffix:
            case ".json":
                clip = tmp_path / path.stem
                clip.write_bytes(hostile.mp4_with_tag(data))
                read_sidecar(clip)
            case ".md":
                read_table(decode_table(data, path.name)[0])
            case _:
                assert locate._match(folders.Entry(copy))[1] is not None

    through(path.name, [None], enter, tmp_path)
