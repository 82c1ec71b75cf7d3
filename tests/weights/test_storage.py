"""Weights by model: counted once, deleted without touching what is not ours, moved without a moment without a file."""

import pytest

from turbodiff.spec.errors import FileError
from turbodiff.spec.models import FoundFile, Inventory, find_model
from turbodiff.weights import storage
from turbodiff.weights.storage import Storage, stored_files

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
    assert not list(far.rglob(".*")) and not list(disk.root.rglob(".*"))
    assert move_all(disk, SMALL, far) == [], "moved already"
    disk.storage.delete(SMALL)
    assert (far / "wan2.1-1.3b.pth").exists(), "never through a link"


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


def test_a_copy_that_differs_leaves_the_original(disk, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    (far / "vae.pth").write_bytes(b"somebody else's")
    (far / ".wan2.1-1.3b.pth.move").write_bytes(b"x" * 100)  # not the start of the file
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, far)
    assert caught.value.code == "move_differs"
    assert (far / "vae.pth").read_bytes() == b"somebody else's"
    assert not any(path.is_symlink() for path in disk.root.iterdir())


def test_a_move_into_the_folder_of_the_weights_or_to_a_full_disk_is_refused(disk, tmp_path, monkeypatch):
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, disk.root / "sub")
    assert caught.value.code == "move_inside"
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, disk.root / "vae.pth" / "x")
    assert caught.value.code == "disk_refuses"
    usage = storage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(FileError) as caught:
        move_all(disk, SMALL, tmp_path / "far")
    assert caught.value.code == "disk_full"
