"""A story of room on a disk: a model is moved to another folder, refused where that cannot be, and deleted."""

import re

import hollow
import pytest
import torch
from stories import tab

from turbodiff.spec.models import find_model

pytestmark = pytest.mark.browser

SYSTEM = 3  # place of the tab
SPEC = find_model("wan2.1-1.3b")
CARD = f"#system [data-model='{SPEC.display_name}']"
HAN = re.compile("[\u4e00-\u9fff]")
NAMES = ("Wan2.1_VAE.safetensors", "small.pth")
SAID = {  # path of the page -> what is said of: one's own room, the folder inside, where it was moved, the deletion
    "/": ("0.3 GB of its own", "lies inside the folder of the weights", "moved: ", "Delete 0.3 GB", "Deleted: 2"),
    "/zh/": ("独占 0.3 GB", "在权重文件夹内部", "已移至：", "删除 Wan2.1-1.3B 的 0.3 GB", "已删除 2"),
}


@pytest.fixture(scope="module")
def keeper(start_app, tmp_path_factory):
    """An app whose folder of downloads is its own."""
    folder = tmp_path_factory.mktemp("keeper")
    (folder / "models").mkdir()
    made = start_app(folder, TURBODIFF_MODELS=str(folder / "models"), HF_HUB_CACHE=str(folder / "cache"))
    made.models = folder / "models"
    yield made
    made.stop()


def write_model(folder):
    """The network, of which every value is one byte, and the VAE in its size."""
    value = torch.zeros(1, dtype=torch.bfloat16)
    shapes = hollow.shapes_of(SPEC, "dit")
    torch.save({name: value.expand(shape) for name, shape in shapes.items()}, folder / NAMES[1])
    hollow.save(hollow.shapes_of(SPEC, "vae"), folder / NAMES[0])


def shot(page, request, name):
    if shots := request.config.getoption("--basetemp"):
        page.locator(CARD).screenshot(path=f"{shots}-{name}.png")


@pytest.mark.parametrize("path", ["/", "/zh/"])
def test_a_model_is_moved_and_deleted_after_a_question_and_its_room_is_told(path, keeper, chromium, tmp_path, request):
    far, asked = tmp_path / "disk2" / "weights", []
    room, inside, moved, question, deleted = SAID[path]
    write_model(keeper.models)

    def answer(dialog):
        asked.append(dialog.message)
        (dialog.accept if len(asked) > 1 else dialog.dismiss)()

    with tab(chromium, keeper, path) as page:
        page.on("dialog", answer)
        page.click(f"#tabs [role=tab] >> nth={SYSTEM}")
        page.click("#system [data-act=rescan]")
        page.wait_for_selector(f"{CARD} :text('{room}')")
        page.fill("#move-folder", str(keeper.models / "sub"))
        page.click(f"{CARD} [data-act=move]")
        page.wait_for_selector(f"{CARD} [role=alert]:has-text('{inside}')")
        shot(page, request, f"refused{path.replace('/', '')}")
        page.fill("#move-folder", str(far))
        page.click(f"{CARD} [data-act=move]:enabled")
        page.wait_for_selector(f"{CARD} :text('{moved}{far}')")
        page.wait_for_selector(f"{CARD} [role=alert]", state="detached")
        assert sorted(file.name for file in far.iterdir()) == sorted(NAMES)
        assert all((keeper.models / name).resolve() == far / name for name in NAMES)
        assert room in page.inner_text(CARD), "it takes the same room there"
        shot(page, request, f"moved{path.replace('/', '')}")
        page.click(f"{CARD} [data-act=delete_model]:enabled")  # and no, thank you
        page.wait_for_timeout(500)
        assert all((far / name).exists() for name in NAMES) and len(asked) == 1
        page.click(f"{CARD} [data-act=delete_model]")
        page.wait_for_selector(f"#note:has-text('{deleted}')")
        page.wait_for_selector(f"{CARD} [data-act=delete_model]", state="detached")
        shot(page, request, f"deleted{path.replace('/', '')}")
        assert not list(far.iterdir()) and not list(keeper.models.iterdir())
        assert room not in page.inner_text(CARD)
    assert all(question in sentence and str(far / NAMES[1]) in sentence for sentence in asked)
    assert bool(HAN.search(asked[0])) is (path == "/zh/")
