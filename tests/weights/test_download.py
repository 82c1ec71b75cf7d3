"""Downloads from servers on this machine: several connections, resumed, checked, from the next server where one
fails, refused with everything a person needs to do it by hand."""

import contextlib
import errno
import hashlib
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading

import huggingface_hub
import pytest

from tests.weights.hub import MODEL, Hub, configs, published
from turbodiff.spec.environment import NETWORK
from turbodiff.spec.errors import FileError, RequestError
from turbodiff.spec.models import FoundFile, Inventory, find_model
from turbodiff.weights import download, sources, transfer
from webui.wording import catalogue

NOTHING = Inventory()
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
SPIECE, VAE = "google/umt5-xxl/spiece.model", "Wan2.1_VAE.pth"
TEXT = "models_t5_umt5-xxl-enc-bf16.pth"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub; the second server is not there."""
    server = Hub(published(tmp_path / "hub"))
    monkeypatch.setenv("TURBODIFF_CONFIGS", str(configs(tmp_path)))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", NOWHERE)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # what the variable said at its import
    monkeypatch.setattr(download.time, "sleep", lambda _seconds: None)
    yield server
    server.close()


@pytest.fixture
def modelscope(hub, monkeypatch):
    """The second server, with the same files."""
    server = Hub(hub.files)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
    yield server
    server.close()


def pull(root, **more):
    return download.pull(MODEL, root=root, found=NOTHING, **more)


def arrived(root, hub):
    """Whether four files are there, as they were sent, and nothing half done."""
    names = [name for name in hub.files if (root / name).exists()]
    left = [path for path in root.rglob(".*") if path.suffix in (".part", ".ranges")]
    return len(names) == 4 and not left and all((root / name).read_bytes() == hub.files[name] for name in names)


def test_every_component_arrives_under_its_name(hub, tmp_path):
    paths = pull(tmp_path / "models")
    assert [str(path.relative_to(tmp_path / "models")) for path in paths] == [
        "TurboWan2.1-T2V-1.3B-480P-quant.pth",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/spiece.model",
    ]
    assert all(path.read_bytes() == hub.files[str(path.relative_to(tmp_path / "models"))] for path in paths)
    assert arrived(tmp_path / "models", hub)


def test_a_broken_connection_is_continued_where_it_stopped(hub, tmp_path):
    hub.cut[SPIECE] = 3_000_000
    pull(tmp_path)
    first, second = (entry.split("@")[1] for entry in hub.ranges if "spiece" in entry)
    assert (first, second) == ("0", "3000000")


def test_a_partial_file_of_an_earlier_run_is_continued(hub, tmp_path):
    data = hub.files[VAE]
    (tmp_path / f".{VAE}.{hashlib.sha256(data).hexdigest()[:16]}.part").write_bytes(data[:100_000])
    pull(tmp_path)
    assert f"{VAE}@100000" in hub.ranges
    assert (tmp_path / "Wan2.1_VAE.pth").read_bytes() == data


def test_a_file_that_is_not_what_was_promised_is_deleted(hub, tmp_path):
    hub.lie.add(VAE)
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "download_damaged"
    assert VAE in caught.value.got
    assert not list(tmp_path.glob("*VAE*")) and not list(tmp_path.glob(".*VAE*"))


def test_an_unreachable_hub_is_named_with_all_a_person_needs(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://somebody:secret@127.0.0.1:9/mirror/")
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    error = caught.value
    assert (error.exit_code, error.code, error.field) == (2, "hub_unreachable", "127.0.0.1:9")
    url = f"{NOWHERE}/mirror/Wan-AI/Wan2.1-T2V-1.3B/resolve/main/Wan2.1_VAE.pth"
    assert f"{url} -> {tmp_path / VAE}" in error.expected
    assert error.expected.count(" -> ") == 4
    assert "secret" not in str(error)


def test_a_file_that_no_server_has_is_named_before_the_first_byte(hub, tmp_path):
    del hub.files[VAE]
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "download_absent"
    assert VAE in caught.value.got
    assert not hub.ranges


def test_offline_mode_asks_nobody(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "offline" and not hub.asked


class Socks(socketserver.StreamRequestHandler):
    """A SOCKS 5 proxy (RFC 1928): no login, CONNECT alone."""

    served = 0

    def handle(self):
        _, methods = self.rfile.read(2)
        self.rfile.read(methods)
        self.wfile.write(b"\5\0")
        *_, kind = self.rfile.read(4)
        length = self.rfile.read(1)[0] if kind == 3 else 4
        host = self.rfile.read(length)
        name = host.decode() if kind == 3 else socket.inet_ntoa(host)
        with socket.create_connection((name, int.from_bytes(self.rfile.read(2), "big"))) as far:
            Socks.served += 1
            self.wfile.write(b"\5\0\0\1" + bytes(6))
            threading.Thread(target=self.back, args=(far,), daemon=True).start()
            while data := self.connection.recv(1 << 16):
                far.sendall(data)

    def back(self, far: socket.socket):
        with contextlib.suppress(OSError):
            while data := far.recv(1 << 16):
                self.connection.sendall(data)


@pytest.mark.parametrize("scheme", ["socks5", "socks", "socks5h", "SOCKS5"])
def test_a_download_goes_through_a_socks_proxy(hub, tmp_path, monkeypatch, scheme):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Socks) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in NETWORK:
            monkeypatch.setenv(name, "")  # `pull` changes them; they come back with the test's end
            monkeypatch.delenv(name)
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:{proxy.server_address[1]}")
        huggingface_hub.close_session()
        before = Socks.served
        assert len(pull(tmp_path / "models")) >= 4
        assert Socks.served >= before + 5, "the addresses, and the bytes of each file"
        huggingface_hub.close_session()
        proxy.shutdown()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks4a://127.0.0.1:1"),
        ("https_proxy", "127.0.0.1:port"),
        ("https_proxy", "http://[::1:80"),
        ("HTTPS_PROXY", "http://user@:port"),
        ("SSL_CERT_FILE", "/nowhere/cert.pem"),
    ],
)
def test_a_setting_of_the_network_that_cannot_be_used_is_named(hub, tmp_path, monkeypatch, name, value):
    for other in NETWORK:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    with pytest.raises(FileError) as caught:
        pull(tmp_path / "models")
    assert (caught.value.code, caught.value.field, caught.value.got) == ("proxy_unusable", name, value)


def test_a_full_disk_is_told_before_the_first_byte(hub, tmp_path, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _path: usage._replace(free=2**20))
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert (caught.value.code, caught.value.got) == ("disk_full", "1 MiB free")
    assert not hub.ranges


def test_a_disk_that_fills_up_on_the_way_is_not_called_a_bad_connection(hub, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer.os, "pwrite", full)
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "disk_full"


def test_what_is_on_disk_is_not_downloaded_again():
    spec = find_model(MODEL)
    files = spec.files_of(spec.variant("480p-quant"))
    have = FoundFile(model=spec.name, component="dit", path="x", bytes=1, quant=True, sla=True)
    vae = FoundFile(model=spec.name, component="vae", path="y", bytes=1)
    rest = download.missing_files(files, spec, Inventory(files=(have, vae)))
    assert [file.component for file in rest] == ["text_encoder", "tokenizer"]
    plain = Inventory(files=(have.model_copy(update={"quant": False}),))
    assert download.missing_files(files, spec, plain)[0].component == "dit"


def test_the_demo_needs_no_download(tmp_path):
    assert download.pull("demo", root=tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EFBIG, "disk_file_size"),
        (errno.EROFS, "disk_read_only"),
        (errno.EDQUOT, "disk_quota"),
        (errno.EIO, "disk_refuses"),
    ],
)
def test_a_disk_that_refuses_is_blamed_and_not_the_hub(number, code, hub, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(transfer.os, "fdatasync", refuse)
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert (caught.value.code, caught.value.got) == (code, os.strerror(number))
    assert str(tmp_path) in caught.value.field


def test_a_file_larger_than_the_process_may_write_blames_the_disk(hub, tmp_path):
    """A real limit on the size of files, as FAT32 and `ulimit -f` have."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000));"
        "from pathlib import Path; from turbodiff.spec.models import Inventory\n"
        "from turbodiff.weights import download\n"
        f"try: download.pull({MODEL!r}, root=Path(sys.argv[1]), found=Inventory())\n"
        "except Exception as error: print(error.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env={**os.environ}, check=True
    )
    assert done.stdout.strip() == "disk_file_size", done.stderr


def test_two_downloads_of_one_file_do_not_write_into_each_other(hub, tmp_path):
    seen = []

    def second(progress):
        if progress.done_bytes and not progress.checking and not seen:
            seen.append("")
            with pytest.raises(FileError) as caught:
                pull(tmp_path)
            seen[0] = caught.value.code

    pull(tmp_path, tell=second)
    assert seen == ["download_running"]
    assert arrived(tmp_path, hub)


def test_a_folder_that_can_only_be_read_is_said_as_that(hub, tmp_path):
    folder = tmp_path / "file"
    folder.write_text("no folder can be made below this")
    with pytest.raises(FileError) as caught:
        pull(folder / "models")
    assert caught.value.code == "disk_refuses"
    error = download.disk_failure(tmp_path, 1, PermissionError(errno.EACCES, "Permission denied"))
    assert (error.code, error.field) == ("disk_read_only", str(tmp_path))


# --- progress ----------------------------------------------------------------------------------------------------


def test_progress_counts_all_files_together_with_speed_and_time_left(hub, tmp_path):
    hub.bytes_per_s = 4_000_000
    seen = []
    pull(tmp_path, tell=seen.append)
    total = sum(len(hub.files[name]) for name in {progress.file for progress in seen})
    counted = [progress for progress in seen if progress.total_bytes]
    assert {progress.total_bytes for progress in counted} == {total}
    done = [progress.done_bytes for progress in counted]
    assert done == sorted(done) and done[-1] == total
    assert counted[-1].files_done == counted[-1].files == 4
    running = [progress for progress in counted if progress.left_s and 0 < progress.done_bytes < total]
    assert running and all(progress.bytes_per_s > 0 for progress in running)
    late = running[-1]
    assert late.left_s == pytest.approx((total - late.done_bytes) / late.bytes_per_s)


def test_what_an_earlier_run_left_counts_and_is_no_speed(hub, tmp_path):
    data = hub.files[SPIECE]
    part = tmp_path / "google" / "umt5-xxl" / f".spiece.model.{hashlib.sha256(data).hexdigest()[:16]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(data[:4_000_000])
    seen = []
    pull(tmp_path, tell=seen.append)
    first = next(progress for progress in seen if progress.total_bytes)
    assert first.done_bytes == 4_000_000 and first.bytes_per_s == 0 and first.left_s is None


class Paused(Exception):
    """What a person's wish raises."""


def test_a_download_that_is_stopped_keeps_its_bytes_and_goes_on_with_them(hub, tmp_path):
    hub.bytes_per_s = 4_000_000

    def stop(progress):
        if progress.files_done == 3 and progress.done_bytes > progress.total_bytes - 4_000_000:
            raise Paused

    with pytest.raises(Paused):
        pull(tmp_path, tell=stop)
    part = next(tmp_path.rglob("*.part"))
    kept = sum(end - start for start, end in json.loads(part.with_suffix(".ranges").read_text()))
    assert 0 < kept < len(hub.files[SPIECE])
    hub.bytes_per_s, hub.ranges = 0, []
    pull(tmp_path)
    assert arrived(tmp_path, hub)
    assert not any(f"{SPIECE}@0" == entry for entry in hub.ranges)


# --- several connections -------------------------------------------------------------------------------------------


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(transfer, "SEGMENT_BYTES", 1 << 20)


def test_a_large_file_is_read_by_four_connections_and_never_more(hub, tmp_path, small_segments):
    hub.bytes_per_s = 2_000_000
    pull(tmp_path)
    assert hub.most == 4
    assert arrived(tmp_path, hub)
    assert len([entry for entry in hub.ranges if SPIECE in entry]) == 5


def test_ranges_with_holes_are_continued_hole_by_hole(hub, tmp_path, small_segments):
    data = hub.files[SPIECE]
    part = tmp_path / "google" / "umt5-xxl" / f".spiece.model.{hashlib.sha256(data).hexdigest()[:16]}.part"
    part.parent.mkdir(parents=True)
    holes = bytearray(data)
    holes[100:200] = holes[3_000_000:3_000_500] = b""
    whole = bytearray(len(data))
    whole[:] = data
    whole[100:200] = bytes(100)
    whole[3_000_000:3_000_500] = bytes(500)
    part.write_bytes(whole)
    part.with_suffix(".ranges").write_text(json.dumps([[0, 100], [200, 3_000_000], [3_000_500, len(data)]]))
    pull(tmp_path)
    assert sorted(entry for entry in hub.ranges if SPIECE in entry) == [f"{SPIECE}@100", f"{SPIECE}@3000000"]
    assert arrived(tmp_path, hub)


@pytest.mark.parametrize("text", ["", "no list", "[[0]]", "[[-5, 99999999]]", '{"a": 1}', "[[0, 1e400]]", "[" * 9999])
def test_a_list_of_ranges_that_cannot_be_believed_costs_bytes_and_never_the_file(text, hub, tmp_path):
    data = hub.files[SPIECE]
    part = tmp_path / "google" / "umt5-xxl" / f".spiece.model.{hashlib.sha256(data).hexdigest()[:16]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(data[:1000])
    part.with_suffix(".ranges").write_text(text)
    pull(tmp_path)
    assert arrived(tmp_path, hub)


def test_a_server_that_ignores_ranges_starts_a_file_over_and_that_is_said(hub, tmp_path):
    hub.ignores_ranges = True
    hub.cut[SPIECE] = 3_000_000
    seen = []
    pull(tmp_path, tell=seen.append)
    assert arrived(tmp_path, hub)
    assert [entry for entry in hub.ranges if SPIECE in entry][-1] == f"{SPIECE}@0"
    assert seen[-1].starts_over


def test_a_range_that_is_answered_with_status_200_is_a_range(hub, tmp_path, small_segments):
    hub.answers_200 = True
    seen = []
    pull(tmp_path, tell=seen.append)
    assert arrived(tmp_path, hub)
    assert not seen[-1].starts_over
    assert len([entry for entry in hub.ranges if SPIECE in entry]) == 5


# --- what servers do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "download_gated"),
        (403, "download_gated"),
        (404, "download_absent"),
        (429, "download_busy"),
        (500, "download_server_error"),
        (503, "download_server_error"),
    ],
)
def test_every_refusal_of_a_server_has_a_code_of_its_own(status, code, hub, tmp_path):
    hub.status[VAE] = (status, {}, 1000)
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == code
    assert caught.value.expected.count(" -> ") == 4


def test_a_busy_server_is_waited_for_as_long_as_it_asks(hub, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    hub.status[SPIECE] = (429, {"Retry-After": "7"}, 1)
    pull(tmp_path)
    assert sum(slept) == pytest.approx(7)
    assert arrived(tmp_path, hub)


def test_a_server_that_fails_while_bytes_come_is_asked_again(hub, tmp_path):
    hub.status[SPIECE] = (503, {"only bytes": True}, 3)
    pull(tmp_path)
    assert arrived(tmp_path, hub)


def test_failures_of_the_network_are_told_apart(hub, tmp_path, monkeypatch):
    expected = {
        "http://no-such-name.invalid": "download_dns",
        hub.url.replace("http:", "https:"): "download_tls",
        NOWHERE: "hub_unreachable",
    }
    for endpoint, code in expected.items():
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(FileError) as caught:
            pull(tmp_path)
        assert caught.value.code == code, caught.value
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", NOWHERE)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    huggingface_hub.close_session()
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "download_proxy", caught.value
    huggingface_hub.close_session()


def test_every_failure_has_a_sentence_in_both_languages():
    disk = {code for code, _, _ in download.DISK_ERRORS.values()}
    for code in (*sources.FAILURES, *disk, "disk_refuses", "disk_full", "offline", "proxy_unusable"):
        assert len(set(catalogue()[f"error.{code}"])) == 2
    for code in sources.FAILURES:
        assert f"download.why_{code.removeprefix('download_')}" in catalogue()


def test_the_token_of_a_person_goes_to_their_hub_and_to_nobody_else(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    evil = Hub(hub.files)
    try:
        pull(tmp_path / "a", mirror=evil.url)
        assert set(evil.tokens) == {""}
        assert all("hf_" not in str(source) for source in sources.sources(evil.url))
        assert sources.sources(evil.url)[0].trusted is False
        assert sources.sources("")[0].trusted is True
    finally:
        evil.close()


# --- the second server ----------------------------------------------------------------------------------------------


def test_modelscope_goes_on_where_the_hub_cannot_be_reached(hub, modelscope, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    seen = []
    pull(tmp_path, tell=seen.append)
    assert arrived(tmp_path, hub)
    assert (seen[-1].left_host, seen[-1].left_code) == ("127.0.0.1:9", "hub_unreachable")
    assert seen[-1].host == modelscope.url.removeprefix("http://")
    assert f"/models/Wan-AI/Wan2.1-T2V-1.3B/resolve/master/{VAE}" in modelscope.asked


def test_a_file_that_the_hub_began_is_continued_from_modelscope(hub, modelscope, tmp_path):
    hub.cut[SPIECE] = 3_000_000
    hub.status[SPIECE] = (503, {"only bytes": True}, 0)

    def fail_then(progress):
        if progress.file == SPIECE and SPIECE not in hub.cut and any(SPIECE in entry for entry in hub.ranges):
            hub.status[SPIECE] = (503, {}, 1000)

    pull(tmp_path, tell=fail_then)
    assert arrived(tmp_path, hub)
    assert f"{SPIECE}@3000000" in modelscope.ranges


def test_modelscope_is_held_to_the_checksum_of_the_hub(hub, modelscope, tmp_path):
    hub.cut[SPIECE] = 3_000_000
    hub.status[SPIECE] = (503, {"only bytes": True}, 1000)
    modelscope.lie.add(SPIECE)
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert "instead of" in caught.value.got
    assert not modelscope.ranges


def test_a_mirror_is_held_to_the_checksum_of_the_publisher(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("TURBODIFF_CONFIGS")  # the real checksums: what is served here is made up
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "download_differs"
    assert not hub.ranges


def test_a_damaged_file_is_fetched_from_the_next_server(hub, modelscope, tmp_path):
    hub.lie.add(SPIECE)
    modelscope.lie.add("nothing")
    with pytest.raises(FileError) as caught:  # the two do not promise the same
        pull(tmp_path)
    assert caught.value.code == "download_damaged"


def test_modelscope_can_be_the_mirror(hub, modelscope, tmp_path):
    pull(tmp_path, mirror=modelscope.url)
    assert arrived(tmp_path, hub)
    assert not hub.asked


@pytest.mark.parametrize(
    "address",
    ["ftp://host", "host", "https://", "https://a:b@host", "http://host:port", "https://ho st", "file:///etc"],
)
def test_a_mirror_is_an_http_address_without_credentials(address):
    with pytest.raises(RequestError) as caught:
        sources.check_mirror(address)
    assert caught.value.code == "mirror_bad"
    assert ":b@" not in str(caught.value)


def test_a_mirror_is_kept_without_its_slash():
    assert sources.check_mirror(" https://hf-mirror.com/ ") == "https://hf-mirror.com"
    assert sources.check_mirror("") == ""
