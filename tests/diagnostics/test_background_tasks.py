"""Background tasks: one process each, told apart by their names; downloads among them."""

import sys
import time

import pytest

from tests.plan.machines import card
from turbodiff.diagnostics import background_tasks
from turbodiff.diagnostics.background_tasks import background_task, download_offers, start_task
from turbodiff.plan.tiers import downloaded, fits_of
from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import FoundFile, Inventory, find_model
from turbodiff.studio import Studio

SPEAKER = (sys.executable, "-c", "import time; print('selftest plan: ok, 1 MiB', flush=True); time.sleep(1.5)")
SLEEPER = (
    sys.executable,
    "-c",
    "import sys, time; sys.stderr.write('\\rfile 12 %'); sys.stderr.flush(); time.sleep(3)",
)


def test_a_task_runs_once_and_what_it_printed_stays(tmp_path):
    assert background_task(tmp_path, "selftest") == (False, ())
    start_task(tmp_path, "selftest", SPEAKER)
    pid = (tmp_path / "selftest.pid").read_text()
    start_task(tmp_path, "selftest", SPEAKER)
    assert (tmp_path / "selftest.pid").read_text() == pid
    end_s = time.monotonic() + 30
    while background_task(tmp_path, "selftest").running and time.monotonic() < end_s:
        time.sleep(0.05)
    assert background_task(tmp_path, "selftest") == (False, ("selftest plan: ok, 1 MiB",))


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


def test_a_variant_that_nobody_published_is_not_asked_for(tmp_path):
    with pytest.raises(RequestError, match="480p-quant"):
        Studio(tmp_path).start_download("Wan2.1-1.3B", "720p-quant")
    assert not (tmp_path / "downloads").exists()


def test_a_download_runs_beside_us_tells_how_far_it_is_and_is_started_once(tmp_path, monkeypatch):
    monkeypatch.setattr(background_tasks, "PULL", SLEEPER)
    ours = Studio(tmp_path)
    assert not ours.download("wan2.1-1.3b").running
    ours.start_download("Wan2.1-1.3B")
    pid = (tmp_path / "downloads" / "wan2.1-1.3b.pid").read_text()
    ours.start_download("Wan2.1-1.3B")
    assert (tmp_path / "downloads" / "wan2.1-1.3b.pid").read_text() == pid
    end_s = time.monotonic() + 20
    while ours.download("wan2.1-1.3b").words != "file 12 %" and time.monotonic() < end_s:
        time.sleep(0.05)
    assert ours.download("wan2.1-1.3b").words == "file 12 %"
    while ours.download("wan2.1-1.3b").running and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not ours.download("wan2.1-1.3b").running
