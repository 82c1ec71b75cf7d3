"""Stories of files: the seed archive in and out, settings out of a video, a picture into a clip."""

import io
from pathlib import Path

import hollow
import numpy as np
import pytest
from PIL import Image
from stories import submit, tab, write_prompt

from turbodiff.media.video import ClipWriter
from turbodiff.spec.request import make_request

pytestmark = pytest.mark.browser

GUIDE = """\
| 提示词 | 种子值 | 模型 | 分辨率 | 效果评价 | 备注 |
|---|---|---|---|---|---|
| 樱花树下的武士,风吹起和服下摆 | 42 | Wan2.1-1.3B | 480p | 动作流畅,光影绝美 | |
| 赛博朋克雨夜,霓虹灯在湿漉漉的街道上倒影 | 1337 | Wan2.1-14B | 720p | ☆ | 倒影稍糊,建议SLA TopK=0.15 |
"""
CREATE, GALLERY, SEEDS = 0, 1, 2  # places of the tabs


@pytest.fixture(scope="module")
def reader(start_app, tmp_path_factory):
    """An app of its own: an empty archive, Wan's weights as headers, a card of 24 GiB."""
    folder = tmp_path_factory.mktemp("files")
    weights = hollow.models(folder / "models", "wan2.1-1.3b", "wan2.2-a14b")
    made = start_app(folder, TURBODIFF_PRETEND_VRAM="24", TURBODIFF_MODELS=str(weights))
    yield made
    made.stop()


def open_tab(page, number):
    page.click(f"#tabs [role=tab] >> nth={number}")


def choose_file(page, button, file):
    """Press an upload button and choose a file."""
    with page.expect_file_chooser() as chooser:
        page.click(button)
    chooser.value.set_files(file)


def prompt_of(page):
    return page.input_value("#prompt textarea")


def test_the_guides_rows_come_in_and_go_out_byte_for_byte(reader, chromium, tmp_path):
    (tmp_path / "guide.md").write_text(GUIDE, "utf-8")
    with tab(chromium, reader, "/zh/") as page:
        open_tab(page, SEEDS)
        choose_file(page, "#import-seeds", tmp_path / "guide.md")
        page.wait_for_selector("#seed-table [data-rows='2']")
        with page.expect_download() as saved:
            page.click("a[href='/seeds.md']")
        assert Path(saved.value.path()).read_bytes() == GUIDE.encode()
        page.fill("#seed-search textarea, #seed-search input", "武士")
        page.wait_for_selector("#seed-table [data-rows='1']")
        page.click("#seed-table [data-form=use_seed]")
        page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('樱花树下的武士')")
        assert page.input_value("#seed textarea, #seed input") == "42"
        assert page.input_value("#model input") == "Wan2.1-1.3B"


def video(path, settings):
    """A second of black with these settings in its tags, written by what writes every clip."""
    with ClipWriter(path, 64, 64, 4, settings) as clip:
        clip.write(np.zeros((4, 64, 64, 3), np.uint8))
    return path


def test_the_settings_of_a_video_of_ours_fill_the_form(reader, chromium, tmp_path):
    wish = {
        "prompt": "a samurai turns, petals fall",
        "seed": 1337,
        "model": "wan2.1-1.3b",
        "num_frames": 49,
        "steps": 3,
    }
    request = make_request(wish).model_dump(mode="json")
    ours = video(tmp_path / "ours.mp4", {"v": 1, "request": request})
    with tab(chromium, reader) as page:
        open_tab(page, GALLERY)
        choose_file(page, "#load-video", ours)
        page.wait_for_function(f"document.querySelector('#prompt textarea').value === '{wish['prompt']}'")
        assert page.input_value("#seed textarea, #seed input") == "1337"
        assert page.input_value("#model input") == "Wan2.1-1.3B"
        assert page.is_checked("#frames input[value='49']")
        open_tab(page, CREATE)
        page.click("#advanced > button")
        assert page.input_value("#steps input[type=number]") == "3"


def test_a_foreign_video_changes_nothing_and_is_told_apart(reader, chromium, tmp_path):
    foreign = video(tmp_path / "foreign.mp4", {})
    playlist = tmp_path / "list.mp4"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n")
    with tab(chromium, reader) as page:
        write_prompt(page, "stays as it is while it walks")
        for file in (foreign, playlist):
            open_tab(page, GALLERY)
            choose_file(page, "#load-video", file)
            page.wait_for_selector("#note .td-note.warn")
            assert prompt_of(page) == "stays as it is while it walks"


def test_a_picture_becomes_the_first_frame_of_a_clip(reader, chromium, tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (1200, 900), "teal").save(data, "PNG")
    with tab(chromium, reader) as page:
        page.click("#kind label >> nth=1")
        page.wait_for_selector("#image", state="visible")
        page.set_input_files(
            "#image input[type=file]", {"name": "x.png", "mimeType": "image/png", "buffer": data.getvalue()}
        )
        write_prompt(page, "the camera moves slowly to the right while leaves fall")
        page.wait_for_selector("#image img")
        job = submit(page, reader)
        width, height = job.request.width, job.request.height
        assert job.request.kind == "i2v" and abs(width / height - 4 / 3) < 0.05  # Adaptive Resolution
        assert Path(job.request.image).read_bytes() == data.getvalue()
        assert reader.state in Path(job.request.image).parents
