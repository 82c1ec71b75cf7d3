"""Background tasks: one process each, told apart by their names; downloads among them."""

import sys
import time

from turbodiff.diagnostics import background_tasks
from turbodiff.diagnostics.background_tasks import background_task, download_offer, start_task
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


def test_the_offer_is_of_int8_files_or_plain_ones_and_never_forgets_the_encoder():
    spec = find_model("wan2.1-14b")
    small, large = (download_offer(spec, quant, Inventory()) for quant in (True, False))
    assert any("quant" in name for name, _, _ in small.files)
    assert not any("quant" in name for name, _, _ in large.files)
    assert small.nbytes < large.nbytes
    assert any(nbytes > 11e9 for _, _, nbytes in small.files)  # UMT5 is never forgotten


def test_what_is_here_is_not_offered_again():
    spec = find_model("wan2.1-1.3b")
    vae = FoundFile(model=spec.name, component="vae", path="x", bytes=1)
    names = [name for name, _, _ in download_offer(spec, True, Inventory(files=(vae,))).files]
    assert not any("VAE" in name for name in names)
    assert download_offer(find_model("demo"), True, Inventory()) is None  # bundled: nothing to fetch


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
