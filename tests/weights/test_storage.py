"""Weights by model: counted once, deleted without touching what is not ours, moved without a moment without a file."""

import errno
import os
import re

import pytest

from turbodiff.spec.errors import FileError
from turbodiff.spec.models import FoundFile, Inventory, find_model
from turbodiff.weights import storage
from turbodiff.weights.storage import Storage, stored_files
from webui.wording import Words

SMALL, LARGE = find_model("wan2.1-1.3b"), find_model("wan2.1-14b")
NBYTES = 3000


class Disk:
    """Two models in a folder that share their VAE, one file of another root, and a tokenizer of the cache."""

    def __init__(self, folder):
        self.root, self.other = folder / "models", folder / "comfy"
        self.jobs = set()
        rows = []
        for spec in (SMALL, LARGE):
            rows += [(spec, "dit", self.root / f"{spec.name}.pth"), (spec, "vae", self.root / "vae.pth")]
            rows += [(spec, "text_encoder", self.other / "text.safetensors")]
        for place, (_, _, path) in enumerate(rows):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes([place]) * NBYTES)
        self.rows = rows
        self.storage = Storage(lambda: self.jobs, self.root, self.look)

    def look(self):
        here = [row for row in self.rows if row[2].exists()]
        return Inventory(files=tuple(FoundFile(model=m.name, component=c, path=str(p), bytes=1) for m, c, p in here))

    def files(self, spec):
        return {file.path.name: file for file in stored_files(spec, self.look(), self.root)}


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


def move_all(disk, spec, folder):
    return list(disk.storage.move(spec, folder))


def test_shared_files_are_named_and_files_elsewhere_are_told_apart(disk):
    files = disk.files(SMALL)
    assert files["vae.pth"].shared_with == (LARGE.name,) and files["vae.pth"].keep == "shared"
    assert files["text.safetensors"].keep == "outside"
    assert files["wan2.1-1.3b.pth"].keep == "" and files["wan2.1-1.3b.pth"].nbytes == NBYTES


def test_deleting_a_model_keeps_what_another_needs_and_the_last_one_takes_all(disk):
    assert [path.name for path in disk.storage.delete(SMALL)] == ["wan2.1-1.3b.pth"]
    assert (disk.root / "vae.pth").exists() and (disk.other / "text.safetensors").exists()
    assert [path.name for path in disk.storage.delete(LARGE)] == ["vae.pth", "wan2.1-14b.pth"]
    assert (disk.other / "text.safetensors").exists(), "another root is never touched"


def test_a_file_behind_a_link_or_a_linked_folder_is_never_deleted(disk, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "x.pth").write_bytes(b"theirs")
    (theirs / "y.pth").write_bytes(b"theirs")
    (disk.root / "link.pth").symlink_to(theirs / "x.pth")
    (disk.root / "folder").symlink_to(theirs)
    disk.rows += [(SMALL, "dit", disk.root / "link.pth"), (SMALL, "dit", disk.root / "folder" / "y.pth")]
    disk.rows += [(SMALL, "dit", disk.root / ".." / "theirs" / "y.pth")]
    disk.storage.delete(SMALL)
    assert (theirs / "x.pth").exists() and (theirs / "y.pth").exists()
    assert not (disk.root / "link.pth").is_symlink(), "the link itself was ours"


def test_what_was_told_of_a_file_goes_with_it(disk):
    (disk.root / "wan2.1-1.3b.pth.toml").write_text('expert = "single"')
    disk.storage.delete(SMALL)
    assert not list(disk.root.glob("*1.3b*"))


@pytest.mark.parametrize("job", [SMALL.name, LARGE.name])
def test_files_of_a_model_that_a_job_needs_stay(job, disk, tmp_path):
    disk.jobs = {job}
    before = sorted(path.name for path in disk.root.iterdir())
    busy = SMALL if job == SMALL.name else LARGE
    with pytest.raises(FileError) as caught:
        disk.storage.delete(busy)
    assert caught.value.code == "model_busy"
    with pytest.raises(FileError):
        move_all(disk, SMALL, tmp_path / "far")  # the VAE is needed by either
    assert sorted(path.name for path in disk.root.iterdir()) == before


def test_a_move_copies_compares_and_leaves_links_that_work(disk, tmp_path):
    far = tmp_path / "far"
    content = (disk.root / "wan2.1-1.3b.pth").read_bytes()
    seen = move_all(disk, SMALL, far)
    assert seen[-1][1:] == (2 * NBYTES, 2 * NBYTES)
    for name in ("wan2.1-1.3b.pth", "vae.pth"):
        assert (disk.root / name).is_symlink() and (disk.root / name).resolve() == far / name
        assert not (far / name).is_symlink()
    assert (disk.root / "wan2.1-1.3b.pth").read_bytes() == content
    assert not list(far.rglob(".*")) and [path.name for path in disk.root.rglob(".*")] == [storage.MOVED]
    assert move_all(disk, SMALL, far) == [], "moved already"


def test_deleting_a_model_takes_what_was_moved_and_what_it_leaves_empty(disk, tmp_path):
    far = tmp_path / "disk2" / "weights"
    (disk.root / "google" / "umt5").mkdir(parents=True)
    (disk.root / "google" / "umt5" / "spiece.model").write_bytes(b"t" * NBYTES)
    disk.rows += [(SMALL, "tokenizer", disk.root / "google" / "umt5" / "spiece.model")]
    move_all(disk, SMALL, far)
    told = disk.files(SMALL)["wan2.1-1.3b.pth"]
    assert told.moved and told.link_to == far / "wan2.1-1.3b.pth"
    disk.storage.delete(SMALL)
    assert [path.name for path in far.iterdir()] == ["vae.pth"], "which the other model needs"
    assert not (disk.root / "google").exists() and not list(disk.root.glob("*1.3b*"))
    disk.storage.delete(LARGE)
    assert far.is_dir() and not list(far.iterdir()), "the folder that the person named stays"
    assert not list(disk.root.iterdir()), "nor is a list of moves left"


def test_a_copy_that_a_person_had_there_already_is_used_and_stays(disk, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    (far / "wan2.1-1.3b.pth").write_bytes((disk.root / "wan2.1-1.3b.pth").read_bytes())
    move_all(disk, SMALL, far)
    assert not disk.files(SMALL)["wan2.1-1.3b.pth"].moved and disk.files(SMALL)["vae.pth"].moved
    disk.storage.delete(SMALL)
    assert (far / "wan2.1-1.3b.pth").exists()


def test_a_link_of_somebody_else_to_where_moves_went_is_a_link_alone(disk, tmp_path):
    far = tmp_path / "far"
    move_all(disk, SMALL, far)
    (far / "theirs.pth").write_bytes(b"theirs")
    link = disk.root / "wan2.1-1.3b.pth"
    link.unlink()
    link.symlink_to(far / "theirs.pth")
    disk.storage.delete(SMALL)
    assert (far / "theirs.pth").exists() and not link.is_symlink()


def test_what_was_moved_is_moved_on_and_leaves_nothing_behind(disk, tmp_path):
    near, far = tmp_path / "near", tmp_path / "far"
    move_all(disk, SMALL, near)
    content = (disk.root / "vae.pth").read_bytes()
    assert move_all(disk, SMALL, far)[-1][1:] == (2 * NBYTES, 2 * NBYTES)
    assert not list(near.iterdir()) and (disk.root / "vae.pth").resolve() == far / "vae.pth"
    assert (disk.root / "vae.pth").read_bytes() == content
    disk.storage.delete(LARGE)
    disk.storage.delete(SMALL)
    assert not list(far.iterdir())


@pytest.mark.parametrize("made", [False, True])
def test_a_move_of_nothing_says_so_and_makes_no_folder(made, disk, tmp_path):
    far = tmp_path / "disk2" / "weights"
    if made:  # only what is somebody else's
        disk.rows = [row for row in disk.rows if row[2].name == "text.safetensors"]
        (disk.root / "theirs.pth").symlink_to(disk.other / "text.safetensors")
        disk.rows += [(SMALL, "dit", disk.root / "theirs.pth")]
    else:
        disk.rows = []
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, far)
    assert caught.value.code == "move_nothing" and SMALL.display_name in str(caught.value)
    assert not (tmp_path / "disk2").exists()


def test_a_move_that_was_killed_at_any_moment_is_continued(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "COPY_BYTES", 1000)
    far = tmp_path / "far"
    content = {name: (disk.root / name).read_bytes() for name in ("wan2.1-1.3b.pth", "vae.pth")}
    for kept in range(12):
        moving = disk.storage.move(SMALL, far)
        for _ in range(kept):
            next(moving, None)
        moving.close()
        assert all((disk.root / name).read_bytes() == data for name, data in content.items())
    move_all(disk, SMALL, far)
    assert all((disk.root / name).is_symlink() for name in content)
    assert all((far / name).read_bytes() == data for name, data in content.items())


def test_a_copy_is_continued_and_not_begun_again(disk, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    (far / ".vae.pth.move").write_bytes((disk.root / "vae.pth").read_bytes()[:1000])
    inode = (far / ".vae.pth.move").stat().st_ino
    move_all(disk, SMALL, far)
    assert (far / "vae.pth").stat().st_ino == inode


def as_it_was(disk, far, content):
    assert all((disk.root / name).read_bytes() == data for name, data in content.items())
    assert not any(path.is_symlink() for path in disk.root.iterdir())
    assert not list(disk.root.glob(".*"))


@pytest.mark.parametrize("theirs", [b"somebody else's", b"y" * NBYTES])
def test_a_name_that_is_taken_leaves_both_files(theirs, disk, tmp_path):
    far, content = tmp_path / "far", {"vae.pth": (disk.root / "vae.pth").read_bytes()}
    far.mkdir()
    (far / "vae.pth").write_bytes(theirs)
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, far)
    assert caught.value.code == "move_taken" and caught.value.field == str(far / "vae.pth")
    assert (far / "vae.pth").read_bytes() == theirs and list(far.iterdir()) == [far / "vae.pth"]
    as_it_was(disk, far, content)


def test_a_disk_that_gives_back_other_bytes_leaves_the_original(disk, tmp_path):
    far, content = tmp_path / "far", {"vae.pth": (disk.root / "vae.pth").read_bytes()}
    far.mkdir()
    (far / ".vae.pth.move").write_bytes(b"x" * 100)  # not the start of the file
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, far)
    assert caught.value.code == "move_differs" and not list(far.iterdir())
    as_it_was(disk, far, content)


def make_place(kind, disk, tmp_path):
    """A place that nothing can be moved to."""
    place = tmp_path / kind
    match kind:
        case "inside":
            return disk.root / "sub"
        case "link inside":
            place.symlink_to(disk.root)
        case "link in a circle":
            place.symlink_to(place)
        case "link to nothing":
            place.symlink_to(tmp_path / "nothing")
        case "file":
            place.write_bytes(b"x")
        case "below a file":
            place.write_bytes(b"x")
            return place / "deep"
    return place


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("inside", "move_inside"),
        ("link inside", "move_inside"),
        ("link in a circle", "move_not_folder"),
        ("file", "move_not_folder"),
        ("below a file", "move_not_folder"),
    ],
)
def test_a_place_that_is_no_folder_for_a_move_is_refused_before_anything_is_copied(kind, code, disk, tmp_path):
    content = {"vae.pth": (disk.root / "vae.pth").read_bytes()}
    place = make_place(kind, disk, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, place)
    assert caught.value.code == code and str(place) in caught.value.field
    assert sorted(tmp_path.rglob("*")) == before
    as_it_was(disk, place, content)


def test_a_link_to_a_folder_that_is_not_there_yet_is_followed(disk, tmp_path):
    move_all(disk, SMALL, make_place("link to nothing", disk, tmp_path))
    assert (tmp_path / "nothing" / "vae.pth").exists()


def test_a_disk_without_room_is_refused_and_the_same_disk_is_named_so(disk, tmp_path, monkeypatch):
    usage = storage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, tmp_path / "far")
    assert caught.value.code == "move_same_disk" and not (tmp_path / "far").exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "move_full"),
        (errno.EDQUOT, "move_full"),
        (errno.EFBIG, "move_file_size"),
        (errno.EACCES, "move_denied"),
        (errno.EROFS, "move_denied"),
        (errno.EIO, "move_refused"),
    ],
)
def test_a_disk_that_refuses_midway_leaves_each_file_whole_in_one_place(number, code, disk, tmp_path, monkeypatch):
    far, content = tmp_path / "far", {name: (disk.root / name).read_bytes() for name in ("vae.pth", "wan2.1-1.3b.pth")}
    synced = storage.sync

    def sync(path):
        if path.name == ".wan2.1-1.3b.pth.move":  # the second one
            raise OSError(number, os.strerror(number), str(path))
        synced(path)

    monkeypatch.setattr(storage, "sync", sync)
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, far)
    error = caught.value
    assert error.code == code and error.got and error.try_instead and str(far) in error.field
    assert (disk.root / "vae.pth").is_symlink() and not (disk.root / "wan2.1-1.3b.pth").is_symlink()
    assert all((disk.root / name).read_bytes() == data for name, data in content.items())
    assert (far / ".wan2.1-1.3b.pth.move").exists() is (number not in storage.FULL)
    monkeypatch.setattr(storage, "sync", synced)
    move_all(disk, SMALL, far)
    assert (far / "wan2.1-1.3b.pth").read_bytes() == content["wan2.1-1.3b.pth"]


def test_a_file_that_cannot_be_deleted_is_said(disk, monkeypatch):
    def unlink(path, missing_ok=False):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(storage.Path, "unlink", unlink)
    with pytest.raises(FileError) as caught:
        disk.storage.delete(SMALL)
    assert caught.value.code == "delete_refused" and "1.3b" in caught.value.field


CODES = (
    "move_inside",
    "move_not_folder",
    "move_same_disk",
    "move_taken",
    "move_differs",
    "move_nothing",
    "move_stopped",
)


def test_every_failure_is_said_in_both_languages():
    refused = {code for code, _, _ in storage.MOVE_ERRORS.values()}
    for code in (*CODES, *refused, "move_refused", "delete_refused"):
        english, chinese = (Words(lang)(f"error.{code}", field="/f", got="g", expected="e") for lang in ("en", "zh"))
        assert not re.search("[\u4e00-\u9fff]", english) and re.search("[\u4e00-\u9fff]", chinese)
        assert "{" not in english + chinese and english.endswith(".") and chinese.endswith("。")
