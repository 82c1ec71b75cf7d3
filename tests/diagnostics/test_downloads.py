"""Downloads as records in the state folder: paused, resumed, given up by another process, and after a kill."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.plan.machines import card
from tests.weights.hub import MODEL, Hub, configs, published
from turbodiff.diagnostics.downloads import Download, Downloads, download_offers
from turbodiff.plan.tiers import downloaded, fits_of
from turbodiff.spec.errors import CancelledByUser, FileError, RequestError
from turbodiff.spec.models import FoundFile, Inventory, find_model

SPEC = find_model(MODEL)
PULL = (sys.executable, "-m", "turbodiff.cli", "models", "pull", MODEL, "--variant", "480p-plain")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub(published(tmp_path / "hub"))
    monkeypatch.setenv("TURBODIFF_CONFIGS", str(configs(tmp_path)))
    monkeypatch.setenv("TURBODIFF_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    yield server
    server.close()


@pytest.fixture
def downloads(tmp_path):
    return Downloads(tmp_path / "state" / "downloads")


def until(downloads, holds, limit_s=60):
    """The download of the model when it is as it should be."""
    end_s = time.monotonic() + limit_s
    while not holds(found := downloads.of(SPEC.name)):
        assert time.monotonic() < end_s, found
        time.sleep(0.05)
    return found


def left_over(tmp_path):
    return [path.name for path in (tmp_path / "models").rglob(".*") if path.suffix in (".part", ".ranges")]


def test_a_download_of_the_page_pauses_resumes_and_ends_with_the_same_files(hub, downloads, tmp_path):
    hub.bytes_per_s = 1_000_000
    downloads.start(SPEC)
    running = until(downloads, lambda found: found.state == "running" and found.progress.done_bytes > 1_000_000)
    assert running.progress.total_bytes > running.progress.done_bytes and running.progress.bytes_per_s > 0
    downloads.stop(SPEC, "pause")
    paused = until(downloads, lambda found: found.state == "paused")
    assert paused.progress.done_bytes >= running.progress.done_bytes
    assert left_over(tmp_path)
    again = Downloads(downloads.folder)  # the app was started again
    assert again.of(SPEC.name).state == "paused"
    hub.bytes_per_s, hub.ranges = 0, []
    again.start(SPEC)
    until(downloads, lambda found: found.state == "done")
    assert not left_over(tmp_path)
    assert any(not entry.endswith("@0") for entry in hub.ranges), "the half file was continued"


def test_cancel_removes_what_is_half_done_and_keeps_what_is_complete(hub, downloads, tmp_path):
    hub.bytes_per_s = 2_000_000
    downloads.start(SPEC)
    until(downloads, lambda found: found.progress.files_done >= 1 and left_over(tmp_path))
    downloads.stop(SPEC, "cancel")
    until(downloads, lambda found: found.state == "absent")
    assert not left_over(tmp_path)
    assert [path for path in (tmp_path / "models").iterdir() if path.suffix == ".pth"]
    assert not list(downloads.folder.glob(f"{SPEC.name}.*"))


def test_a_paused_download_can_be_given_up_without_its_process(hub, downloads, tmp_path):
    hub.bytes_per_s = 1_000_000
    downloads.start(SPEC)
    until(downloads, lambda found: left_over(tmp_path))
    downloads.stop(SPEC, "pause")
    until(downloads, lambda found: found.state == "paused")
    downloads.stop(SPEC, "cancel")
    assert downloads.of(SPEC.name).state == "absent"
    assert not left_over(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_download_whose_process_is_gone_is_paused_and_goes_on_with_its_own_choice(number, hub, downloads, tmp_path):
    hub.bytes_per_s = 1_000_000
    argv = (*PULL, "--state-dir", str(downloads.folder.parent))
    with subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    ) as shell:  # fmt: skip
        until(downloads, lambda found: found.progress.done_bytes > 1_000_000 and left_over(tmp_path))
        shell.send_signal(number)
    found = downloads.of(SPEC.name)
    assert (found.state, found.variant) == ("paused", "480p-plain")
    hub.bytes_per_s = 0
    downloads.start(SPEC)
    until(downloads, lambda found: found.state == "done")
    assert (tmp_path / "models" / "TurboWan2.1-T2V-1.3B-480P.pth").exists()
    assert not left_over(tmp_path)


def test_a_failure_is_kept_with_its_fields_for_whoever_looks(hub, downloads):
    hub.status["Wan2.1_VAE.pth"] = (404, {}, 1000)
    downloads.start(SPEC)
    found = until(downloads, lambda found: found.state == "failed")
    assert found.error["code"] == "download_absent"
    assert "Wan2.1_VAE.pth ->" in found.error["expected"]


def test_a_second_download_of_a_model_is_refused_and_leaves_the_first_alone(hub, downloads):
    hub.bytes_per_s = 1_000_000
    downloads.start(SPEC)
    until(downloads, lambda found: found.pid != 0)
    with pytest.raises(FileError) as caught:
        downloads.run(SPEC, variant=SPEC.variants[0], tell=lambda _: None)
    assert caught.value.code == "download_running"
    downloads.stop(SPEC, "cancel")
    until(downloads, lambda found: found.state == "absent")


def test_records_are_written_once_per_second_and_never_by_a_full_disk(hub, downloads, monkeypatch):
    told = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.bytes_per_s = 4_000_000
    begin_s = time.monotonic()
    downloads.run(SPEC, variant=SPEC.variants[0], tell=told.append)
    assert 1 <= len(told) <= time.monotonic() - begin_s + 1
    assert downloads.of(SPEC.name).state == "done"


def test_a_wish_is_heeded_while_a_server_is_waited_for(hub, downloads, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.status["Wan2.1_VAE.pth"] = (429, {"Retry-After": "200"}, 1000)
    began_s = time.monotonic()

    def stop(progress):
        (downloads.folder / f"{SPEC.name}.stop").write_text("pause")

    with pytest.raises(CancelledByUser):
        downloads.run(SPEC, variant=SPEC.variants[0], tell=stop)
    assert time.monotonic() - began_s < 100
    assert downloads.of(SPEC.name).state == "paused"


def test_a_record_of_nonsense_is_no_download(downloads):
    downloads.folder.mkdir(parents=True)
    for text in ("", "[]", '{"state": "flying"}', "\x00", "[" * 10_000):
        (downloads.folder / f"{SPEC.name}.json").write_text(text)
        assert downloads.of(SPEC.name).state == "absent"
    record = Download(state="running", model=SPEC.name, pid=os.getpid(), ticks=1)  # another process had this number
    (downloads.folder / f"{SPEC.name}.json").write_text(record.model_dump_json())
    assert downloads.of(SPEC.name).state == "paused"


def test_the_mirror_is_kept_in_the_state_folder_and_offered(downloads):
    assert downloads.mirror == ""
    downloads.set_mirror("https://hf-mirror.com/")
    assert Downloads(downloads.folder).mirror == "https://hf-mirror.com"
    offers = download_offers(SPEC, Inventory(), fits_of(SPEC, card(23.5)), downloads.mirror)
    assert {offer.host for offer in offers} == {"hf-mirror.com"}
    (downloads.folder / "mirror.txt").write_text("https://me:secret@host")  # by hand
    assert downloads.mirror == ""


def offers_of(model, found):
    spec, where = find_model(model), card(23.5)
    return download_offers(spec, found, fits_of(spec, where))


def test_each_variant_is_offered_with_its_own_networks_and_the_encoder_of_all():
    offers = {offer.variant.name: offer for offer in offers_of("wan2.1-14b", Inventory())}
    assert [name for name, offer in offers.items() if offer.fit.suited] == ["480p-quant"]
    for name, offer in offers.items():
        networks = [file for file, _, _ in offer.files if "TurboWan" in file]
        assert len(networks) == 1 and name.split("-")[0].upper() in networks[0]
        assert ("quant" in name) == ("quant" in networks[0])
        assert any(nbytes > 11e9 for _, _, nbytes in offer.files)  # UMT5 is never forgotten
        assert offer.nbytes == sum(nbytes for _, _, nbytes in offer.files) > offer.network_bytes
    assert offers["480p-quant"].network_bytes < offers["480p-plain"].network_bytes


def test_what_is_here_is_not_offered_again():
    spec = find_model("wan2.1-1.3b")
    vae = FoundFile(model=spec.name, component="vae", path="x", bytes=1)
    offer = offers_of(spec.name, Inventory(files=(vae,)))[0]
    assert not any("VAE" in name for name, _, _ in offer.files)
    everything = offers_of(spec.name, downloaded(spec, spec.variants))
    assert [(offer.files, offer.nbytes) for offer in everything] == [((), 0), ((), 0)]
    assert offers_of("demo", Inventory()) == ()  # bundled: nothing to fetch


def test_a_variant_that_nobody_published_is_not_asked_for(downloads):
    with pytest.raises(RequestError, match="480p-quant"):
        downloads.start(SPEC, "720p-quant")
    assert not downloads.folder.exists()


def test_pull_without_a_variant_goes_on_with_the_one_that_was_begun_and_another_is_obeyed(hub, downloads, tmp_path):
    """Otherwise a Ctrl-C and the same command begin a second network of gigabytes."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # ends each run once it is known what would be fetched
    pull, state = PULL[:-2], ("--state-dir", str(downloads.folder.parent))

    def said(*args):
        return subprocess.run((*pull, *state, *args), env=offline, capture_output=True, text=True, check=False).stderr

    plain, int8 = "TurboWan2.1-T2V-1.3B-480P.pth", "TurboWan2.1-T2V-1.3B-480P-quant.pth"
    assert f"{int8} " in said(), "nothing was begun: what suits a machine without a card"
    assert f"{plain} " in said("--variant", "480p-plain", "--root", str(tmp_path / "begun"))
    again = said()
    assert f"{plain} " in again and f"{int8} " not in again
    assert f"Going on with 480p-plain in {tmp_path / 'begun'}" in again
    other = said("--variant", "480p-quant")
    assert f"{int8} " in other and "Going on" not in other and str(tmp_path / "begun") not in other
    (downloads.folder / f"{SPEC.name}.json").write_text(Download(state="done", variant="480p-plain").model_dump_json())
    assert "Going on" not in said()
