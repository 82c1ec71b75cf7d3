"""Downloads from a hub on this machine: resumed, checked, refused with everything a person needs to do it by hand."""

import contextlib
import errno
import hashlib
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from tests.weights import tiny
from turbodiff.spec.environment import NETWORK
from turbodiff.spec.errors import FileError
from turbodiff.spec.models import FoundFile, Inventory, find_model
from turbodiff.weights import download

NOTHING = Inventory()
MODEL = "Wan2.1-1.3B"


class Hub(BaseHTTPRequestHandler):
    """Answers HEAD and ranged GET like the hub; a file may be cut, lie about its checksum or be missing."""

    files: dict[str, bytes]
    cut: dict[str, int]
    lie: set[str]
    ranges: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.split("/resolve/main/")[1]
        data = self.files.get(name)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if body:
            self.ranges.append(f"{name}@{first}")
        digest = hashlib.sha256(b"other" if name in self.lie else data).hexdigest()
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if body:
            stop = self.cut.pop(name, len(data))
            self.wfile.write(data[first:stop])
            if stop < len(data):
                self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    source = tmp_path / "hub"
    source.mkdir()
    data = tiny.write("turbowan.pth", source).read_bytes()
    spec = find_model(MODEL)
    Hub.files = {name: data if name.endswith(".pth") else b"\n" * 5_000_000 for f in spec.files for name in f.names[:1]}
    Hub.cut, Hub.lie, Hub.ranges = {}, set(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # what the variable said at its import
    monkeypatch.setattr(download.time, "sleep", lambda _seconds: None)
    yield Hub
    server.shutdown()
    server.server_close()


def pull(root: Path, **more: object) -> list[Path]:
    return download.pull(MODEL, root=root, found=NOTHING, **more)


def test_every_component_arrives_under_its_name(hub: type[Hub], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    paths = pull(tmp_path / "models", progress=lambda *numbers: seen.append(numbers))
    assert [str(path.relative_to(tmp_path / "models")) for path in paths] == [
        "TurboWan2.1-T2V-1.3B-480P-quant.pth",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/spiece.model",
    ]
    assert all(path.read_bytes() == hub.files[str(path.relative_to(tmp_path / "models"))] for path in paths)
    assert seen[-1] == ("google/umt5-xxl/spiece.model", 5_000_000, 5_000_000)
    assert not list((tmp_path / "models").rglob("*.part"))


def test_a_broken_connection_is_continued_where_it_stopped(hub: type[Hub], tmp_path: Path) -> None:
    hub.cut["google/umt5-xxl/spiece.model"] = 3_000_000
    pull(tmp_path)
    first, second = (entry.split("@")[1] for entry in hub.ranges if "spiece" in entry)
    assert first == "0" and int(second) > 0


def test_a_partial_file_of_an_earlier_run_is_continued(hub: type[Hub], tmp_path: Path) -> None:
    data = hub.files["Wan2.1_VAE.pth"]
    part = tmp_path / f".Wan2.1_VAE.pth.{hashlib.sha256(data).hexdigest()[:16]}.part"
    part.write_bytes(data[:100_000])
    pull(tmp_path)
    assert "Wan2.1_VAE.pth@100000" in hub.ranges
    assert (tmp_path / "Wan2.1_VAE.pth").read_bytes() == data


def test_a_file_that_is_not_what_was_promised_is_deleted(hub: type[Hub], tmp_path: Path) -> None:
    hub.lie.add("Wan2.1_VAE.pth")
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "download_damaged"
    assert "Wan2.1_VAE.pth" in caught.value.field
    assert not list(tmp_path.glob("*VAE*")) and not list(tmp_path.glob(".*VAE*"))


def test_an_unreachable_hub_is_named_with_all_a_person_needs(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/mirror/")
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    error = caught.value
    assert (error.exit_code, error.code, error.field) == (2, "hub_unreachable", "HF_ENDPOINT")
    assert "http://127.0.0.1:9/mirror" in error.what
    url = "http://127.0.0.1:9/mirror/Wan-AI/Wan2.1-T2V-1.3B/resolve/main/Wan2.1_VAE.pth"
    assert f"{url} -> {tmp_path / 'Wan2.1_VAE.pth'}" in error.expected
    assert error.expected.count(" -> ") == 4


def test_a_file_that_the_hub_does_not_have_is_named(hub: type[Hub], tmp_path: Path) -> None:
    del hub.files["Wan2.1_VAE.pth"]
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert "Wan2.1_VAE.pth" in caught.value.got
    assert not hub.ranges, "asked for everything before the first byte"


def test_offline_mode_asks_nobody(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "offline"


class Socks(socketserver.StreamRequestHandler):
    """A SOCKS 5 proxy (RFC 1928): no login, CONNECT alone."""

    served = 0

    def handle(self) -> None:
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

    def back(self, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(1 << 16):
                self.connection.sendall(data)


@pytest.mark.parametrize("scheme", ["socks5", "socks", "socks5h", "SOCKS5"])
def test_a_download_goes_through_a_socks_proxy(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
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
        assert Socks.served >= before + 8, "address and bytes of each file"
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
def test_a_setting_of_the_network_that_cannot_be_used_is_named(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for other in NETWORK:
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    with pytest.raises(FileError) as caught:
        pull(tmp_path / "models")
    assert (caught.value.code, caught.value.field, caught.value.got) == ("proxy_unusable", name, value)


def test_a_full_disk_is_told_before_the_first_byte(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _path: usage._replace(free=2**20))
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert (caught.value.code, caught.value.got) == ("disk_full", "1 MiB free")
    assert not hub.ranges


def test_a_disk_that_fills_up_on_the_way_is_not_called_a_bad_connection(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert caught.value.code == "disk_full"


def test_what_is_on_disk_is_not_downloaded_again() -> None:
    spec = find_model(MODEL)
    files = spec.files_of(spec.variant("480p-quant"))
    have = FoundFile(model=spec.name, component="dit", path="x", bytes=1, quant=True, sla=True)
    vae = FoundFile(model=spec.name, component="vae", path="y", bytes=1)
    rest = download.missing_files(files, spec, Inventory(files=(have, vae)))
    assert [file.component for file in rest] == ["text_encoder", "tokenizer"]
    plain = Inventory(files=(have.model_copy(update={"quant": False}),))
    assert download.missing_files(files, spec, plain)[0].component == "dit"


def test_the_demo_needs_no_download(tmp_path: Path) -> None:
    assert download.pull("demo", root=tmp_path) == []


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_is_blamed_and_not_the_hub(
    number: int, hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_file: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(download.os, "fsync", refuse)
    with pytest.raises(FileError) as caught:
        pull(tmp_path)
    assert (caught.value.code, caught.value.got) == ("disk_refuses", os.strerror(number))
    assert str(tmp_path) in caught.value.field


def test_a_file_larger_than_the_process_may_write_blames_the_disk(hub: type[Hub], tmp_path: Path) -> None:
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
    assert done.stdout.strip() == "disk_refuses", done.stderr


def test_two_downloads_of_one_file_do_not_write_into_each_other(hub: type[Hub], tmp_path: Path) -> None:
    seen: list[str] = []

    def second(*_: object) -> None:
        if not seen:
            with pytest.raises(FileError) as caught:
                pull(tmp_path)
            seen.append(caught.value.code)

    paths = pull(tmp_path, progress=second)
    assert seen == ["download_running"]
    assert all(path.read_bytes() == hub.files[str(path.relative_to(tmp_path))] for path in paths)
