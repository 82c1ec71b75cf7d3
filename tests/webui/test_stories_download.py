"""A story of a download: begun, paused, resumed, given up, failed and said why, and its model deleted."""

import pytest
from stories import tab

from tests.weights.hub import Hub, configs, published

pytestmark = pytest.mark.browser

SYSTEM = 3  # place of the tab
CARD = "#system [data-model='Wan2.1-1.3B']"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = Hub(published(tmp_path_factory.mktemp("hub")))
    yield server
    server.close()


@pytest.fixture(scope="module")
def downloader(start_app, hub, tmp_path_factory):
    """An app without weights, on a card of 24 GiB, whose hub is on this machine."""
    folder = tmp_path_factory.mktemp("downloads")
    made = start_app(
        folder,
        TURBODIFF_PRETEND_VRAM="24",
        TURBODIFF_MODELS=str(folder / "models"),
        TURBODIFF_CONFIGS=str(configs(folder)),
        HF_ENDPOINT=hub.url,
        MODELSCOPE_DOMAIN="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
        HF_HUB_CACHE=str(folder / "cache"),
        NO_PROXY="127.0.0.1,localhost",
    )
    made.models = folder / "models"
    yield made
    made.stop()


def state(name):
    return f"{CARD} .td-download[data-state={name}]"


def test_a_download_is_paused_resumed_given_up_and_its_reason_is_said(downloader, hub, chromium, request):
    hub.bytes_per_s = 600_000
    with tab(chromium, downloader) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        page.click(f"#tabs [role=tab] >> nth={SYSTEM}")
        page.click(f"{CARD} [data-act=download] >> nth=0")
        page.wait_for_selector(f"{state('running')} :text('MB/s')")
        page.click(f"{state('running')} [data-act=pause_download]")
        page.wait_for_selector(state("paused"))
        assert "paused" in page.inner_text(state("paused"))
        assert list(downloader.models.rglob(".*.part"))
        page.reload()
        page.click(f"#tabs [role=tab] >> nth={SYSTEM}")
        page.click(f"{state('paused')} [data-act=download]")
        page.wait_for_selector(state("running"))
        if shots := request.config.getoption("--basetemp"):
            page.screenshot(path=f"{shots}-download.png", full_page=True)
        page.click(f"{state('running')} [data-act=cancel_download]")
        page.wait_for_selector(f"{CARD} .td-download", state="detached")
        downloader.wait(lambda: not list(downloader.models.rglob(".*.part")))
        hub.status["Wan2.1_VAE.pth"] = (404, {}, 10_000)
        page.click(f"{CARD} [data-act=download] >> nth=0")
        page.wait_for_selector(f"{state('failed')} [role=alert]:has-text('does not have this file')")
    with tab(chromium, downloader, "/zh/") as page:
        page.click(f"#tabs [role=tab] >> nth={SYSTEM}")
        page.wait_for_selector(f"{state('failed')} [role=alert]:has-text('没有这个文件')")


def test_a_mirror_is_kept_and_what_is_none_is_said(downloader, chromium):
    with tab(chromium, downloader) as page:
        page.click(f"#tabs [role=tab] >> nth={SYSTEM}")
        page.fill("#source #mirror", "https://me:secret@hf-mirror.com")
        page.click("#source [data-act=mirror]")
        page.wait_for_selector("#note :text('not the address of a mirror')")
        assert "secret" not in page.inner_text("#note")
        page.fill("#source #mirror", "https://hf-mirror.com")
        page.click("#source [data-act=mirror]")
        page.wait_for_selector("#note :text('saved'), #note :text('Saved')")
        page.reload()
        page.click(f"#tabs [role=tab] >> nth={SYSTEM}")
        page.wait_for_selector("#source #mirror")
        assert page.input_value("#source #mirror") == "https://hf-mirror.com"
        page.fill("#source #mirror", "")
        page.click("#source [data-act=mirror]")
