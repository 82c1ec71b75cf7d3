import sys
import time

from turbodiff.diagnostics.downloads import download, offer, start
from turbodiff.spec.inventory import FoundFile, Inventory
from turbodiff.spec.models import find_model
from turbodiff.spec.numbers import GIB

SLEEPER = (
    sys.executable,
    "-c",
    "import sys, time; sys.stderr.write('\\rfile 12 %'); sys.stderr.flush(); time.sleep(3)",
)


def test_a_small_card_is_offered_the_quantised_files_and_a_large_one_the_plain_ones():
    spec = find_model("wan2.1-14b")
    small, large = offer(spec, 24 * GIB, Inventory()), offer(spec, 80 * GIB, Inventory())
    assert any("quant" in name for name, _, _ in small.files)
    assert not any("quant" in name for name, _, _ in large.files)
    assert small.nbytes < large.nbytes
    assert any(nbytes > 11e9 for _, _, nbytes in small.files)  # UMT5 is never forgotten


def test_what_is_here_is_not_offered_again():
    spec = find_model("wan2.1-1.3b")
    vae = FoundFile(model=spec.name, component="vae", path="x", bytes=1)
    names = [name for name, _, _ in offer(spec, None, Inventory(files=(vae,))).files]
    assert not any("VAE" in name for name in names)
    assert offer(find_model("demo"), None, Inventory()) is None  # bundled: nothing to fetch


def test_a_download_runs_beside_us_tells_how_far_it_is_and_is_started_once(tmp_path):
    assert not download(tmp_path, "wan2.1-1.3b").running
    start(tmp_path, "Wan2.1-1.3B", SLEEPER)
    pid = (tmp_path / "downloads" / "wan2.1-1.3b.pid").read_text()
    start(tmp_path, "Wan2.1-1.3B", SLEEPER)
    assert (tmp_path / "downloads" / "wan2.1-1.3b.pid").read_text() == pid
    end_s = time.monotonic() + 20
    while download(tmp_path, "wan2.1-1.3b").words != "file 12 %" and time.monotonic() < end_s:
        time.sleep(0.05)
    assert download(tmp_path, "wan2.1-1.3b").words == "file 12 %"
    while download(tmp_path, "wan2.1-1.3b").running and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not download(tmp_path, "wan2.1-1.3b").running
