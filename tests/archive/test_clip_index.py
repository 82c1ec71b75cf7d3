"""The index finds what sidecars say, follows every change of the files, and is made anew from them when it is lost."""

import json
import os
import sqlite3
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from turbodiff.archive import trash
from turbodiff.archive.clip_index import INDEX, ONLY, ORDERS, SHOWN, ClipIndex, tags_of
from turbodiff.archive.clips import clip_path, partial_path, poster_path, publish, read_sidecar, sidecar_path, sweep
from turbodiff.spec.clips import MAX_CLIP_NAME_BYTES, Sidecar, clip_id, clip_stem
from turbodiff.spec.errors import OutputError, RequestError
from turbodiff.spec.request import make_request

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
PROMPTS = ("a cat runs", "一只猫在跑", "A Dog sleeps", "100% of a_cat")


def add(outputs: Path, seed: int, prompt: str = "a cat runs", **said: object) -> Path:
    partial = partial_path(outputs, seed, 0)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(b"clip" * (seed + 1))
    request = make_request({"seed": seed, "prompt": prompt})
    made = NOON + timedelta(days=seed)
    final = clip_path(outputs, "t2v", seed, "Wan2.1-1.3B", made)
    return publish(partial, final, Sidecar.model_validate({"created": made, "request": request, **said}), b"poster")


@pytest.fixture(scope="module")
def audit() -> list[str]:
    """The clips and sidecars that are opened, from here on; an audit hook cannot be taken back."""
    seen: list[str] = []
    ends = (".mp4", ".json")
    sys.addaudithook(
        lambda event, args: seen.append(str(args[0])) if event == "open" and str(args[0]).endswith(ends) else None
    )
    return seen


@pytest.fixture
def opened(audit):
    """Which of them were opened since it was last asked."""

    def since() -> list[str]:
        found, audit[:] = list(audit), []
        return found

    return since


@pytest.fixture
def library(tmp_path: Path) -> ClipIndex:
    for seed, prompt in enumerate(PROMPTS):
        add(tmp_path / "outputs", seed, prompt, rating="★" * seed, note="keep it" if seed == 2 else "")
    made = ClipIndex(tmp_path / "outputs", tmp_path / "state")
    made.refresh()
    return made


def seeds(library: ClipIndex, *args: str) -> list[int | None]:
    return [entry.seed for entry in library.find(*args).entries]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cat", [3, 0]), ("猫", [1]), ("DOG", [2]), ("cat runs", [0]), ('"cat runs"', [0]), ("runs cat", [0]),
        ("100%", [3]), ("a_cat", [3]), ("seed:2", [2]), ("rating:2", [3, 2]), ("rating:★★", [3, 2]), ("keep", [2]),
        ("note:keep", [2]), ("wan2.1", [3, 2, 1, 0]), ("model:14b", []), ("demo", [3, 2, 1, 0]), ("no such word", []),
        ("seed:x", []),
        ("种子：2", [2]), ("Seed:2", [2]), ("评分:2", [3, 2]), ("“cat runs”", [0]), ("备注：keep", [2]),
        ("'; DROP TABLE clip; --", []), ("%", [3]), ("_", [3, 2, 1, 0]), ("128x128", [3, 2, 1, 0]),
    ],
)  # fmt: skip
def test_every_word_of_a_search_must_occur_somewhere_in_the_sidecar(library, text, found):
    assert seeds(library, text) == found


@pytest.mark.parametrize("count", [300, 3000])
def test_a_page_opens_no_clip_and_no_sidecar_however_many_there_are(tmp_path, count, opened):
    first = add(tmp_path / "outputs", 0)
    for number in range(1, count):
        clip = clip_path(tmp_path / "outputs", "t2v", number, "demo", NOON + timedelta(days=number % 7, seconds=number))
        clip.parent.mkdir(exist_ok=True)
        clip.hardlink_to(first)
        sidecar_path(clip).hardlink_to(sidecar_path(first))
    ClipIndex(tmp_path / "outputs", tmp_path / "state").refresh()
    assert len(opened()) >= count  # each was read once
    library = ClipIndex(tmp_path / "outputs", tmp_path / "state")  # as the next start of the app
    opened()
    for asked in ({}, {"order": "oldest"}, {"only": "t2v"}, {"text": "cat"}, {"offset": count - 60}):
        found = library.find(**asked)
        assert (len(found.entries), found.total, found.clips) == (60, count, count)
    library.refresh()  # and a look for changes, where there are none
    assert opened() == []
    for order in ("newest", "oldest"):
        assert plan_of(library, order) == "SEARCH clip USING INDEX clip_order (batch=?)"  # 60 rows, and none sorted


def plan_of(library, order):
    """How SQLite finds the first page; a B-tree of its own would hold every clip to sort them."""
    asked = f"EXPLAIN QUERY PLAN SELECT {SHOWN} FROM clip WHERE {ONLY['all']} ORDER BY {ORDERS[order]} LIMIT 60"
    return " ".join(row["detail"] for row in library._opened().execute(asked))


def test_filters_and_orders_are_those_that_the_page_offers(library):
    library.edit([library.find("seed:1").entries[0].name], starred=True, tags=tags_of("cat, 夜 cat"))
    assert seeds(library, "", "starred") == [1] == seeds(library, "tag:夜") == seeds(library, "tag:CAT")
    assert seeds(library, "", "unrated") == [0] and seeds(library, "", "i2v") == []
    by_order = {order: seeds(library, "", "all", order) for order in ORDERS}
    assert by_order["oldest"] == by_order["seed"] == [0, 1, 2, 3]
    assert by_order["newest"] == by_order["rating"] == [3, 2, 1, 0]
    assert [library.find(limit=1, offset=at).entries[0].seed for at in range(4)] == [3, 2, 1, 0]
    assert library.find(limit=1).total == library.find().clips == 4


def test_what_a_person_says_stands_in_the_sidecar_and_leaves_the_rest_of_it_alone(library):
    clip = library.find("seed:0").entries[0]
    path = sidecar_path(clip.path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_newer_version": [1]}))
    assert library.edit([clip.name], note="sharp", starred=True, tags=("a", "b"), rating="★★★★★") == 1
    written = json.loads(path.read_text())
    assert written["of_a_newer_version"] == [1] and written["tags"] == ["a", "b"] and written["starred"] is True
    assert library.find("sharp").entries[0].tags == ("a", "b") == read_sidecar(clip.path).tags
    with pytest.raises(RequestError):
        library.edit([clip.name], note="x" * 501)


def test_deleted_clips_go_to_the_trash_whole_and_come_back_as_they_were(library):
    before = {path: path.read_bytes() for path in library.outputs.glob("2*/*")}
    names = [entry.name for entry in library.find("cat").entries]
    batch = library.delete(names)
    assert seeds(library) == [2, 1] and seeds(library, "", "trash") == [3, 0]
    assert library.find().trashed == 2 and library.find().trash_bytes > 0
    assert not sweep(library.outputs), "a start of the app removes nothing of it"
    assert library.delete(names) == "", "there is nothing left to delete"
    assert library.restore(batch=batch) == 2
    assert {path: path.read_bytes() for path in library.outputs.glob("2*/*")} == before
    assert seeds(library, "", "trash") == [] and not list((library.outputs / trash.TRASH).iterdir())


def test_a_clip_comes_back_beside_one_that_took_its_name(library):
    clip = library.find("seed:2").entries[0]
    library.delete([clip.name])
    add(library.outputs, 2, "another")
    assert library.restore([clip.name]) == 1
    assert sorted(entry.prompt for entry in library.find("seed:2").entries) == ["A Dog sleeps", "another"]


def test_a_move_that_was_cut_off_anywhere_leaves_each_clip_somewhere(library, monkeypatch):
    clip = library.find("seed:1").entries[0]
    monkeypatch.setattr(trash, "sync", lambda folder: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(Exception, match="cannot be written"):
        library.delete([clip.name])
    monkeypatch.undo()
    assert clip.path.exists() and seeds(library, "", "trash") == [1]
    assert library.restore([clip.name]) == 1 and seeds(library, "", "trash") == [] and seeds(library, "seed:1") == [1]
    assert read_sidecar(clip.path).request.prompt == "一只猫在跑"


def test_the_trash_is_emptied_after_30_days_and_by_hand(library):
    old, new = (library.find(f"seed:{seed}").entries[0] for seed in (0, 1))
    now = datetime.now(UTC)
    trash.move_to_trash(library.outputs, [old.path], now - timedelta(days=trash.TRASH_DAYS, hours=1))
    trash.move_to_trash(library.outputs, [new.path], now - timedelta(days=trash.TRASH_DAYS - 1))
    trash.purge(library.outputs, now)
    library.refresh()
    assert seeds(library, "", "trash") == [1] and seeds(library) == [3, 2]
    assert library.erase([new.name]) == 1
    assert not [path for path in (library.outputs / trash.TRASH).rglob("*") if path.is_file()]


def test_links_and_strange_names_in_the_trash_are_left_alone(library, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "2026-01-01").mkdir()
    kept = tmp_path / "home" / "2026-01-01" / "x.mp4"
    kept.write_bytes(b"mine")
    (library.outputs / trash.TRASH).mkdir()
    (library.outputs / trash.TRASH / "20200101T000000-abcdef").symlink_to(tmp_path / "home")
    (library.outputs / trash.TRASH / "not a batch").mkdir()
    trash.purge(library.outputs, datetime.now(UTC))
    assert kept.exists() and not trash.trash_folders(library.outputs)


def test_the_index_follows_files_that_come_go_and_change(library):
    add(library.outputs, 9, "a bird")
    gone = library.find("seed:0").entries[0]
    gone.path.unlink()
    library.refresh()
    assert seeds(library) == [9, 3, 2, 1]
    sidecar = sidecar_path(library.find("seed:3").entries[0].path)
    text = sidecar.read_text()
    sidecar.write_text(text.replace("a_cat", "a fox"))  # in place: the folder has the same names as before
    library._whole_s = float("-inf")
    library.refresh()
    assert seeds(library, "fox") == [3]


@pytest.mark.parametrize("damage", ["garbage", "gone", "empty", "folder", "other tables", "other folder", "cut"])
def test_a_damaged_index_is_made_anew(library, tmp_path, damage):
    path = tmp_path / "state" / INDEX
    whole, library._db = path.read_bytes(), library._db.close()
    match damage:
        case "garbage":
            path.write_bytes(os.urandom(8192))
        case "gone" | "folder":
            path.unlink()
            path.mkdir() if damage == "folder" else None
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "other tables":
            with sqlite3.connect(path) as db:
                db.execute("DROP TABLE clip")
            db.close()
        case "other folder":
            ClipIndex(tmp_path / "elsewhere", tmp_path / "state").refresh()
    again = ClipIndex(library.outputs, tmp_path / "state")
    again.find()
    again.refresh()
    again.refresh()
    assert seeds(again) == [3, 2, 1, 0]


def test_hostile_sidecars_harm_no_other_clip(library):
    clips = [add(library.outputs, 20 + number) for number in range(6)]
    hostile = (
        b"\x00\xff", b"[" * 100_000, json.dumps({"request": {"prompt": "\ud800\0x" * 9000, "seed": 10**30}}).encode(),
        json.dumps({"request": {"prompt": "x", "seed": 1}, "tags": {"a": 1}, "rating": 7, "starred": "?"}).encode(),
        json.dumps({"request": {"prompt": "deep"}, "tags": ["t " * 500] * 5000, "note": "n" * 9**6}).encode(),
        b"null",
    )  # fmt: skip
    for clip, data in zip(clips, hostile, strict=True):
        sidecar_path(clip).write_bytes(data)
    clips[0].with_name("no stamp 猫.mp4").write_bytes(b"")
    clips[0].with_name("plain.mp4").write_bytes(b"")
    clips[0].with_name("t2v_1_x_00010101_000000.mp4").write_bytes(b"")
    library.refresh()
    found = library.find().entries
    assert len(found) == 4 + 6 + 3
    assert max(len(entry.note) for entry in found) <= 500 and max(len(entry.tags) for entry in found) <= 20
    assert seeds(library, "runs cat") == [0]


def test_clips_that_differ_in_the_seed_alone_are_found(library):
    others = [add(library.outputs, seed) for seed in (11, 12)]
    add(library.outputs, 11)
    library.refresh()
    own = library.find("seed:0").entries[0]
    assert [entry.seed for entry in library.same_but_seed(own.name)] == [0, 12, 11]
    assert library.same_but_seed("no such clip") == []
    assert {entry.path for entry in library.same_but_seed(own.name)} & set(others)


def test_a_state_folder_that_takes_no_file_has_its_index_in_memory(library, tmp_path):
    (tmp_path / "state2").write_text("a file")
    other = ClipIndex(library.outputs, tmp_path / "state2")
    other.refresh()
    assert seeds(other) == [3, 2, 1, 0]
    assert replace(other.find(), entries=()) == replace(library.find(), entries=())


def test_an_undo_takes_no_name_that_something_else_has(library, tmp_path):
    """A link to nowhere, a foreign sidecar and a folder are nobody's clip, and still not free."""
    clips = [library.find("seed:1").entries[0].path, library.find("seed:2").entries[0].path]
    batch = library.delete([clip.stem for clip in clips])
    clips[0].symlink_to("/nonexistent")
    sidecar_path(clips[1]).write_text("{}")
    assert library.restore(batch=batch) == 2 and library.find("", "trash").total == 0
    assert clips[0].is_symlink() and sidecar_path(clips[1]).read_text() == "{}"
    for seed, clip in enumerate(clips, 1):
        home = clip.with_name(f"{clip.stem}_2.mp4")
        assert home.read_bytes() == b"clip" * (seed + 1) and read_sidecar(home).rating == "★" * seed


def test_an_undo_stays_inside_the_library_and_two_at_once_are_one(library, tmp_path):
    clip = library.find("seed:1").entries[0].path
    batch = library.delete([clip.stem])
    (tmp_path / "elsewhere").mkdir()
    clip.parent.rmdir()
    clip.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError):
        library.restore(batch=batch)
    assert not list((tmp_path / "elsewhere").iterdir()) and library.find("", "trash").total == 1
    clip.parent.unlink()
    paths = [entry.path for entry in library.find("", "trash").entries]
    assert trash.restore(library.outputs, paths) == [clip] and trash.restore(library.outputs, paths) == []


def test_a_folder_beside_a_clip_keeps_none_from_the_trash(library):
    clips = [library.find(f"seed:{seed}").entries[0].path for seed in (1, 2)]
    sidecar_path(clips[0]).unlink()
    sidecar_path(clips[0]).mkdir()
    library.delete([clip.stem for clip in clips])
    assert not any(clip.exists() for clip in clips) and library.find("", "trash").total == 2


@pytest.mark.parametrize(
    "name",
    [
        "x" * 160,
        "x" * MAX_CLIP_NAME_BYTES,
        "猫" * (MAX_CLIP_NAME_BYTES // 3),
        "红.圆-1",
        "[%] " * (MAX_CLIP_NAME_BYTES // 4),
    ],
)
def test_a_clip_of_any_name_is_rated_deleted_and_comes_back_beside_another(library, name):
    """255 bytes are what a name may have: the sidecar's takes all of them, and an undo adds `_2`."""
    first = library.find("seed:1").entries[0].path
    clip = first.with_name(f"{name}.mp4")
    for place in (Path, sidecar_path, poster_path):
        place(first).rename(place(clip))
    library.refresh()
    told = clip_id(name)
    assert library.edit([told], note="kept") == 1 and library.entry(told).note == "kept"
    batch = library.delete([told])
    clip.write_bytes(b"another")
    assert library.restore(batch=batch) == 1
    (back,) = library.find("note:kept").entries
    assert back.path.parent == clip.parent and back.name.endswith("_2") and library.edit([back.name], starred=True) == 1
    assert clip.read_bytes() == b"another" and clip_stem(back.name) == back.path.stem
