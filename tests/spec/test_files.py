"""atomic_write: a reader sees the old content or the new, never a half."""

import pytest

from turbodiff.spec import files
from turbodiff.spec.files import atomic_write


def test_the_file_appears_whole_and_nothing_else_stays(tmp_path):
    target = tmp_path / "new folder" / "file.json"
    with atomic_write(target) as part:
        part.write_text("new")
        assert part.parent == target.parent and not target.exists()
    assert target.read_text() == "new" and [*target.parent.iterdir()] == [target]


def test_an_error_leaves_the_old_content(tmp_path):
    target = tmp_path / "file.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and [*tmp_path.iterdir()] == [target]


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    target, synced = tmp_path / "file.json", []
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path.read_text(), target.exists())))
    with atomic_write(target, durable=True) as part:
        part.write_text("new")
    assert synced == [("new", False)]
