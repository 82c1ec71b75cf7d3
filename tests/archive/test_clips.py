"""The library: nothing incomplete ever carries a final name, nothing is overwritten, damage is survived."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.media.clips import shapes, write
from turbodiff.archive.clips import (
    clip_path,
    clips,
    partial_path,
    poster_path,
    publish,
    read_sidecar,
    sidecar_path,
    sweep,
)
from turbodiff.archive.disk import check_output, check_place
from turbodiff.gpu.process_identity import process_mark
from turbodiff.spec.clips import Sidecar
from turbodiff.spec.errors import FileError, OutputError
from turbodiff.spec.request import make_request

NIGHT = datetime(2026, 11, 23, 0, 31, 7, tzinfo=UTC)
CLIP = b"a whole clip" * 1000


def sidecar(seed: int = 42) -> Sidecar:
    request = make_request({"seed": seed, "prompt": "猫"})
    return Sidecar(created=NIGHT, request=request, sha256="0" * 64, frames=17, width=128, height=128, fps=16)


def published(outputs: Path, seed: int = 42, created: datetime = NIGHT) -> Path:
    partial = partial_path(outputs, seed, 0)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(CLIP)
    return publish(partial, clip_path(outputs, "t2v", seed, "Wan2.1-1.3B", created), sidecar(seed), b"poster")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_clip_gets_the_name_that_people_look_for(tmp_path: Path) -> None:
    clip = published(tmp_path)
    name = "2026-11-23/t2v_42_wan2.1-1.3b_20261123_003107.mp4"
    assert clip == tmp_path / name
    assert files(tmp_path) == [name, f"{name}.jpg", f"{name}.json"], "no temporary file is left"
    written = json.loads(sidecar_path(clip).read_text())["request"]
    assert (written["seed"], written["prompt"]) == (42, "猫")


def test_a_taken_name_is_never_overwritten(tmp_path: Path) -> None:
    first, second, third = (published(tmp_path) for _ in range(3))
    assert [path.stem[-9:] for path in (first, second, third)] == ["23_003107", "_003107_2", "_003107_3"]
    assert all(sidecar_path(path).exists() and poster_path(path).exists() for path in (first, second, third))


def test_a_name_is_taken_also_where_only_its_sidecar_is_left(tmp_path: Path) -> None:
    published(tmp_path).unlink()
    assert published(tmp_path).stem.endswith("_2")


def test_a_name_that_a_person_typed_is_replaced_in_one_step(tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    output.write_bytes(b"older")
    partial = partial_path(tmp_path, 1, 0, output)
    partial.write_bytes(CLIP)
    assert publish(partial, output, sidecar(), replace=True) == output
    assert output.read_bytes() == CLIP
    assert files(tmp_path) == ["out.mp4", "out.mp4.json"]


def test_a_folder_without_hard_links_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        if Path(target).exists():
            raise FileExistsError(target)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert [published(tmp_path).stem[-8:] for _ in range(2)] == ["3_003107", "003107_2"]
    assert len(files(tmp_path)) == 6


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.archive.test_clips import published
outputs, steps = Path(sys.argv[1]), 0
while True:
    folder = outputs / str(steps)
    folder.mkdir()
    child = os.fork()
    if not child:
        left = steps
        def hook(event, args):
            global left
            if event in {"open", "os.link", "os.remove", "os.mkdir", "os.rename"}:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        published(folder)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    steps += 1
print(steps)
"""


def test_fault_38_killed_at_any_step_it_leaves_a_complete_clip_or_none(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    steps = int(ran.stdout)
    assert steps > 8, "the kills must meet every step"
    complete = 0
    for step in range(steps + 1):
        for clip in clips(tmp_path / str(step)):
            complete += 1
            assert clip.path.read_bytes() == CLIP and clip.sidecar and clip.sidecar.request.seed == 42 and clip.poster
        sweep(tmp_path / str(step))
        left = files(tmp_path / str(step))
        assert left == [] or len(left) == 3, left
    assert 1 < complete < steps, "some kills came before the commit, some after"


def test_the_newest_clips_come_first(tmp_path: Path) -> None:
    times = [datetime(2026, 11, day, hour, tzinfo=UTC) for day in (21, 23, 22) for hour in (3, 1)]
    made = {published(tmp_path, seed, created): created for seed, created in enumerate(times)}
    newest = sorted(made, key=lambda path: made[path], reverse=True)
    assert [clip.path for clip in clips(tmp_path)] == newest
    assert [clip.path for clip in clips(tmp_path, limit=3)] == newest[:3]
    assert clips(tmp_path)[0].created is not None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, None])
def test_a_damaged_sidecar_costs_its_settings_and_nothing_else(tmp_path: Path, damage: bytes | None) -> None:
    broken, good = published(tmp_path, 1), published(tmp_path, 2)
    if damage is None:
        sidecar_path(broken).unlink()
    else:
        sidecar_path(broken).write_bytes(damage)
    found = {clip.path: clip.sidecar for clip in clips(tmp_path)}
    intact = found[good]
    assert found[broken] is None and intact is not None and intact.request.seed == 2
    with pytest.raises(FileError):
        read_sidecar(broken)


def test_fault_65_a_link_to_somewhere_else_is_no_clip(tmp_path: Path) -> None:
    clip, elsewhere = published(tmp_path / "outputs"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("secret.mp4", "secret.jpg"):
        (elsewhere / name).write_bytes(b"x")
    (clip.parent / "linked.mp4").symlink_to(elsewhere / "secret.mp4")
    poster_path(clip).unlink(missing_ok=True)
    poster_path(clip).symlink_to(elsewhere / "secret.jpg")
    (tmp_path / "outputs" / "2026-11-22").symlink_to(elsewhere)
    found = clips(tmp_path / "outputs")
    assert [one.path for one in found] == [clip] and found[0].poster is None


def test_foreign_files_and_a_missing_folder_do_no_harm(tmp_path: Path) -> None:
    clip = published(tmp_path)
    (clip.parent / "holiday.mp4").write_bytes(b"x")
    (clip.parent / "notes.txt").write_text("x")
    (clip.parent / "notes.json").write_text("{}")
    (tmp_path / "seeds.md").write_text("x")
    (tmp_path / "2026-11-24").write_text("a file where a folder is expected")
    assert [found.path.name for found in clips(tmp_path)] == [clip.name, "holiday.mp4"]
    assert clips(tmp_path / "nowhere") == []
    assert sweep(tmp_path) == []


def test_the_sweep_spares_what_a_living_process_writes(tmp_path: Path) -> None:
    folder = tmp_path / ".partial"
    folder.mkdir()
    mine = partial_path(tmp_path, 3, 1)
    dead = folder / "2.0.4194999.mp4"
    for path in (mine, dead):
        path.write_bytes(b"x")
    assert sweep(tmp_path) == [dead]
    assert mine.exists() and not dead.exists()


def test_what_a_killed_process_left_is_removed_before_its_parent_has_asked_for_it(tmp_path: Path) -> None:
    """A zombie has a number and a start, and writes nothing more."""
    child = subprocess.Popen(["sleep", "600"])
    named, own = tmp_path / f".x.{process_mark(child.pid)}.partial.mp4", tmp_path / ".partial" / f"2.0.{child.pid}.mp4"
    own.parent.mkdir()
    for path in (named, own):
        path.write_bytes(b"x")

    def left() -> list[Path]:
        check_output(tmp_path / "out.mp4", 16, 16, 1)
        sweep(tmp_path)
        return [path for path in (named, own) if path.exists()]

    assert left() == [named, own]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert left() == []
    child.wait()


def test_fault_41_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_place(tmp_path / "new" / "outputs", tmp_path / "state", 16, 16, 1)
    check_output(tmp_path / "out.mp4", 16, 16, 1)
    assert files(tmp_path) == ["file"], "a check leaves no file"
    for output in (tmp_path, tmp_path / "out.gif", tmp_path / "missing" / "out.mp4", tmp_path / "file" / "out.mp4"):
        with pytest.raises(OutputError) as caught:
            check_output(output, 16, 16, 1)
        assert caught.value.field == "output" and caught.value.try_instead
    with pytest.raises(OutputError) as caught:
        check_place(tmp_path / "file" / "outputs", tmp_path / "state", 16, 16, 1)
    assert caught.value.field == "output"
    with pytest.raises(OutputError):
        check_output(Path("/proc/out.mp4"), 16, 16, 1)


@pytest.mark.parametrize("letter", ["a", "ä", "猫"])
def test_an_output_of_any_length_works_or_is_refused_before_the_work(tmp_path: Path, letter: str) -> None:
    """224 to 255 bytes were refused only after denoising: the temporary file and the sidecar have longer names."""
    made = 0
    for nbytes in (*range(200, 262), 5000):
        output = tmp_path / (letter * ((nbytes - 4) // len(letter.encode())) + ".mp4")
        try:
            check_output(output, 16, 16, 1)
        except OutputError as error:
            assert len(output.name.encode()) > 250 and error.field == "output" and error.try_instead
            continue
        partial = partial_path(tmp_path, 2**31, 9, output)
        partial.write_bytes(CLIP)
        publish(partial, output, sidecar(), b"poster", replace=True)
        made += 1
    assert made >= 48


@pytest.mark.parametrize("name", ["\udcff.mp4", "new\nline.mp4", "-o.mp4", "a%03d.mp4", "a:b?c*.mp4", ".mp4.mp4"])
def test_odd_names_work_or_are_refused_before_the_work(tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    if name.startswith("\udcff"):
        with pytest.raises(OutputError, match="UTF-8"):
            check_output(output, 16, 16, 1)
    else:
        check_output(output, 16, 16, 1)
        write(partial_path(tmp_path, 2**31, 9, output), shapes(1))


@pytest.mark.parametrize("kind", ["a link to itself", "a pipe"])
def test_an_output_that_is_no_file_is_refused_before_the_work(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out.mp4"
    if kind == "a pipe":
        os.mkfifo(output)
    else:
        output.symlink_to(output)
    with pytest.raises(OutputError, match="cannot be used"):
        check_output(output, 16, 16, 1)


def test_a_failed_publish_keeps_the_clip_and_leaves_nothing_else(tmp_path: Path) -> None:
    partial = partial_path(tmp_path, 1, 0)
    partial.parent.mkdir()
    partial.write_bytes(CLIP)
    (tmp_path / "2026-11-23").write_text("a file where the folder should be")
    with pytest.raises(OutputError):
        publish(partial, clip_path(tmp_path, "t2v", 1, "demo", NIGHT), sidecar(), b"poster")
    assert files(tmp_path) == [".partial/" + partial.name, "2026-11-23"]


def test_the_library_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, turbodiff.archive.clips; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
