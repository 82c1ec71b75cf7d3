"""The clip on the disk: what was sent to the encoder, whole, with its settings, or an error and nothing at all."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests.media.clips import SETTINGS, grain, shapes, write
from turbodiff.archive.clips import clips, read_sidecar
from turbodiff.archive.disk import check_output, check_place
from turbodiff.media import ffmpeg
from turbodiff.media.tags import read_settings_tag, read_tags
from turbodiff.media.verify import verify_clip
from turbodiff.media.video import QUEUED_CHUNKS, ClipWriter, Written
from turbodiff.spec.errors import FileError, OutputError, RequestError


def verified(written: Written) -> Written:
    verify_clip(written)
    return written


def test_a_clip_verifies_whatever_the_size_of_the_chunks(tmp_path: Path) -> None:
    frames = shapes(17)
    hashes = {
        verified(write(tmp_path / f"{chunk}.mp4", frames, chunk=chunk)).sha256[:16]: chunk for chunk in (1, 4, 17)
    }
    assert len(hashes) == 1, "the bytes do not depend on how the decoder cut the frames"


@pytest.mark.parametrize("size", [(16, 16), (128, 128), (208, 112)])
def test_noise_stays_above_the_floor_so_that_no_honest_clip_is_rejected(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (5, height, width, 3), dtype=np.uint8)
    assert verified(write(tmp_path / "noise.mp4", noise)).frames == 5


def test_grain_at_480p_stays_above_the_floor(tmp_path: Path) -> None:
    assert verified(write(tmp_path / "grain.mp4", grain(4, 832, 480))).frames == 4


def test_settings_survive_every_awkward_character(tmp_path: Path) -> None:
    clip = tmp_path / "a.mp4"
    settings = {"request": {"prompt": "a=b;#c\\d\n 猫 '\"" + "长" * 7970, "negative_prompt": "x" * 8000}}
    verify_clip(write(clip, shapes(1), settings=settings))
    assert read_settings_tag(clip) == settings
    assert read_sidecar(clip).request.prompt == settings["request"]["prompt"], "also where there is no sidecar"
    assert read_tags(clip)["comment"] == read_tags(clip)["turbodiff"]


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 64, b"\0\0\0\x18ftypmp42" + b"\0" * 12, b"\xff" * 4096])
def test_a_foreign_file_has_no_settings_and_says_so(tmp_path: Path, content: bytes) -> None:
    foreign = tmp_path / "foreign.mp4"
    foreign.write_bytes(content)
    with pytest.raises(FileError):
        read_sidecar(foreign)


def test_a_clip_plays_in_browsers(tmp_path: Path) -> None:
    clip = write(tmp_path / "a.mp4", shapes(5)).path
    data = clip.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "faststart: the index comes first"
    assert b"avc1" in data


def test_the_poster_is_the_middle_frame(tmp_path: Path) -> None:
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    frames[2] = 200
    written = write(tmp_path / "a.mp4", frames)
    (tmp_path / "poster.jpg").write_bytes(written.poster)
    with Image.open(tmp_path / "poster.jpg") as poster:
        assert poster.size == (64, 64) and abs(np.asarray(poster).mean() - 200) < 3


def test_fault_35_black_and_frozen_clips_are_kept_with_a_warning(tmp_path: Path) -> None:
    assert verify_clip(write(tmp_path / "a.mp4", np.zeros((5, 64, 64, 3), np.uint8))) == ("black", "frozen")
    assert verify_clip(write(tmp_path / "b.mp4", shapes(1).repeat(5, axis=0))) == ("frozen",)
    assert verify_clip(write(tmp_path / "c.mp4", shapes(1))) == (), "one frame cannot be frozen"
    assert verify_clip(write(tmp_path / "d.mp4", shapes(9))) == ()


def test_an_interrupted_clip_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ClipWriter(tmp_path / "a.mp4", 128, 128, 16, SETTINGS) as writer:
        writer.write(shapes(3))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_size_the_network_cannot_make_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        ClipWriter(tmp_path / "a.mp4", 833, 480, 16, SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_folder_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as caught:
        ClipWriter(tmp_path / "file" / "a.mp4", 128, 128, 16, SETTINGS)
    assert caught.value.field == "output" and caught.value.code == "output_unwritable"


def test_fault_78_an_encoder_that_dies_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    writer = ClipWriter(tmp_path / "a.mp4", 832, 480, 16, SETTINGS)
    writer._ffmpeg._process.kill()
    with pytest.raises(OutputError) as caught:
        for _ in range(20):
            writer.write(grain(1, 832, 480))
        writer.close()
    assert caught.value.field == "output"
    assert list(tmp_path.iterdir()) == []


def test_frames_are_taken_while_the_encoder_is_busy(tmp_path: Path) -> None:
    """One chunk is on its way to an encoder that does nothing, the others wait; all of them come in order."""
    frames = grain(QUEUED_CHUNKS + 1, 832, 480)
    writer = ClipWriter(tmp_path / "a.mp4", 832, 480, 16, SETTINGS, len(frames))
    with writer:
        writer._ffmpeg._process.send_signal(signal.SIGSTOP)
        for frame in frames:
            writer.write(frame[None])
        writer._ffmpeg._process.send_signal(signal.SIGCONT)
    assert writer.written is not None
    assert writer.written.sha256 == write(tmp_path / "b.mp4", frames, chunk=1).sha256


def test_leaving_a_clip_whose_encoder_hangs_ends_its_thread(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ClipWriter(tmp_path / "a.mp4", 832, 480, 16, SETTINGS) as writer:
        writer._ffmpeg._process.send_signal(signal.SIGSTOP)
        for frame in grain(QUEUED_CHUNKS + 1, 832, 480):
            writer.write(frame[None])
        raise KeyboardInterrupt
    assert not writer._thread.is_alive() and list(tmp_path.iterdir()) == []


@pytest.fixture
def another_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program that stands where ffmpeg should."""
    program = tmp_path / "ffmpeg"
    monkeypatch.setattr(ffmpeg, "ffmpeg_path", lambda: str(program))
    ffmpeg.h264_encoder.cache_clear()
    yield program
    ffmpeg.h264_encoder.cache_clear()


def test_fault_78_a_missing_ffmpeg_is_known_before_the_work(another_ffmpeg: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        check_place(tmp_path, tmp_path, 128, 128, 17)
    assert caught.value.code == "ffmpeg_missing" and caught.value.try_instead


def without(program: Path, *encoders: str) -> None:
    """An ffmpeg that was built without some encoders: the real one, but for these."""
    real = imageio_ffmpeg.get_ffmpeg_exe()
    lacks = "".join(f" *{name}*) echo \"Unknown encoder '{name}'\" >&2; exit 1;;" for name in encoders)
    program.write_text(f'#!/bin/sh\ncase "$*" in{lacks} esac\nexec {real} "$@"\n')
    program.chmod(0o755)


def test_fault_79_an_ffmpeg_that_encodes_no_h264_is_known_before_the_work(another_ffmpeg: Path, tmp_path: Path) -> None:
    without(another_ffmpeg, *ffmpeg.ENCODERS)
    for check in (
        lambda: check_place(tmp_path, tmp_path, 128, 128, 17),
        lambda: check_output(tmp_path / "a.mp4", 1, 1, 1),
    ):
        with pytest.raises(FileError, match="Unknown encoder 'libx264'; expected an ffmpeg with libx264, libopenh264"):
            check()
    without(another_ffmpeg)
    check_place(tmp_path, tmp_path, 128, 128, 17)


def test_fault_79_a_program_that_says_nothing_is_named_with_its_status(another_ffmpeg: Path, tmp_path: Path) -> None:
    another_ffmpeg.write_text("#!/bin/sh\nexit 3\n")
    another_ffmpeg.chmod(0o755)
    with pytest.raises(FileError, match="exit status 3"):
        check_place(tmp_path, tmp_path, 128, 128, 17)


@pytest.mark.parametrize("kind", ["shapes", "grain", "noise"])
def test_fault_79_without_x264_another_encoder_makes_a_clip_that_verifies(
    another_ffmpeg: Path, tmp_path: Path, kind: str
) -> None:
    without(another_ffmpeg, "libx264")
    noise = np.random.default_rng(0).integers(0, 256, (9, 256, 256, 3), dtype=np.uint8)
    frames = {"shapes": shapes(9), "grain": grain(9, 416, 240), "noise": noise}[kind]
    written = verified(write(tmp_path / "a.mp4", frames))
    assert written.encoder == "libopenh264"


def test_nvenc_is_a_wish_that_is_granted_where_it_encodes_a_frame(
    another_ffmpeg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that is none: the program encodes with libx264 where it is asked for NVENC."""
    real = imageio_ffmpeg.get_ffmpeg_exe()
    nvenc = r"s/-c:v h264_nvenc -preset p5 -rc constqp -qp 14/-c:v libx264 -crf 14 -preset veryfast -qmax 17/"
    another_ffmpeg.write_text(f'#!/bin/sh\nset -- $(echo "$@" | sed "{nvenc}")\nexec {real} "$@"\n')
    another_ffmpeg.chmod(0o755)
    try:
        for devices, encoder in (((), "libx264"), (("/dev/null",), ffmpeg.NVENC)):
            ffmpeg.nvenc_fault.cache_clear()
            monkeypatch.setattr(ffmpeg, "NVIDIA_DEVICES", devices)
            with ClipWriter(tmp_path / "a.mp4", 128, 128, 16, {}, 9, wish="nvenc") as writer:
                writer.write(shapes(9, 128, 128))
            assert writer.written is not None and verified(writer.written).encoder == encoder
        without(another_ffmpeg, ffmpeg.NVENC)
        ffmpeg.nvenc_fault.cache_clear()
        assert ffmpeg.nvenc_fault() == "Unknown encoder 'h264_nvenc'" and ffmpeg.encoder_for("nvenc") == "libx264"
    finally:
        ffmpeg.nvenc_fault.cache_clear()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root; the file size limit below covers the same path")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_fault_40_a_full_disk_is_named_and_left_as_it_was(small_disk: Path) -> None:
    with pytest.raises(OutputError) as caught:
        write(small_disk / ".partial" / "a.mp4", grain(17, 416, 240))
    assert (caught.value.code, caught.value.field) == ("disk_full", "output")
    assert not any(path.is_file() for path in small_disk.rglob("*"))
    assert clips(small_disk) == []


def test_a_file_size_limit_ends_in_one_error_and_no_file(tmp_path: Path) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "from pathlib import Path; from tests.media.clips import grain, write\n"
        "from turbodiff.spec.errors import OutputError\n"
        f"try: write(Path({str(tmp_path)!r}) / 'a.mp4', grain(17, 416, 240))\n"
        "except OutputError as error: print(error.field)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.stdout.strip(), ran.returncode) == ("output", 0), ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_writing_keeps_memory_flat(tmp_path: Path) -> None:
    code = (
        "import resource; from pathlib import Path; from tests.media.clips import SETTINGS, grain\n"
        "from turbodiff.media.video import ClipWriter\n"
        "frame = grain(1, 832, 480)\n"
        f"with ClipWriter(Path({str(tmp_path)!r}) / 'a.mp4', 832, 480, 16, SETTINGS) as writer:\n"
        "    peaks = []\n"
        "    for i in range(40):\n"
        "        writer.write(frame)\n"
        "        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "print((peaks[-1] - peaks[4]) // 1024)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(ran.stdout) < 20, "40 frames are 48 MB; their fingerprints are 1 MB"
