"""A server of weights on this machine: answers as the Hugging Face hub, its storage and ModelScope do, and badly."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep  # tests replace time.sleep, which is ours, not the server's

from tests.weights import tiny
from turbodiff.spec.models import find_model

MODEL = "Wan2.1-1.3B"
CHUNK_BYTES = 64 << 10


class Hub:
    """Files by name, and what goes wrong with them."""

    def __init__(self, files):
        self.files = dict(files)
        self.cut = {}  # name -> bytes after which the connection breaks, once
        self.lie = set()  # names whose checksum is another
        self.status = {}  # name -> [status, headers, how many times]
        self.ignores_ranges = False
        self.answers_200 = False  # to a range, with Content-Range, as ModelScope does
        self.bytes_per_s = 0  # 0: as fast as it goes
        self.ranges = []  # "name@first byte" of each request for bytes
        self.tokens = []  # Authorization headers
        self.asked = []  # every path
        self.now = self.most = 0  # connections that read bytes
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def digest(self, name):
        return hashlib.sha256(b"other" if name in self.lie else self.files[name]).hexdigest()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append(path)
        if path.startswith("/api/v1/models/"):
            rows = [{"Path": name, "Size": len(data), "Sha256": hub.digest(name)} for name, data in hub.files.items()]
            return self.plain(200, {}, json.dumps({"Code": 200, "Data": {"Files": rows}}).encode())
        name = (
            path.partition("/resolve/main/")[2] or path.partition("/resolve/master/")[2] or path.partition("/blob/")[2]
        )
        status, headers, times = hub.status.get(name, (0, {}, 0))
        if times and (body or "only bytes" not in headers):
            hub.status[name] = (status, headers, times - 1)
            return self.plain(status, {key: value for key, value in headers.items() if key != "only bytes"})
        data = hub.files.get(name)
        if data is None:
            return self.plain(404, {"X-Error-Code": "EntryNotFound"})
        if not body and "/resolve/main/" in path:
            port = hub.server.server_port  # storage is another host
            told = {"ETag": '"x"', "X-Linked-ETag": f'"{hub.digest(name)}"', "X-Linked-Size": str(len(data))}
            return self.plain(
                302, {**told, "X-Repo-Commit": "0" * 40, "Location": f"http://localhost:{port}/blob/{name}"}
            )
        hub.tokens.append(self.headers.get("Authorization", ""))
        return self.send(name, data)

    def plain(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send(self, name, data):
        hub, asked = self.hub, self.headers.get("Range", "")
        first, last = 0, len(data) - 1
        ranged = asked and not hub.ignores_ranges
        if ranged:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), int(end or last)
        hub.ranges.append(f"{name}@{first}")
        self.send_response(206 if ranged and not hub.answers_200 else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        with hub.lock:
            hub.now += 1
            hub.most = max(hub.most, hub.now)
            stop = min(hub.cut.pop(name, last + 1 - first), last + 1 - first)
        try:
            for at in range(first, first + stop, CHUNK_BYTES):
                piece = data[at : min(at + CHUNK_BYTES, first + stop)]
                if at + CHUNK_BYTES >= first + stop:
                    with hub.lock:  # before the asker can know that it is over
                        hub.now -= 1
                self.wfile.write(piece)
                if hub.bytes_per_s:
                    sleep(len(piece) / hub.bytes_per_s)
            if stop < last + 1 - first:
                self.close_connection = True
                self.connection.close()
        except OSError:
            self.close_connection = True

    def log_message(self, *_):
        pass


def published(folder: Path, nbytes: int = 5_000_000):
    """Files of the model by name: a small checkpoint for each network, bytes without meaning for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = tiny.write("turbowan.pth", folder).read_bytes()
    noise = bytes(range(256)) * (nbytes // 256)
    names = [file.names[0] for file in find_model(MODEL).files]
    return {name: checkpoint if name.endswith(".pth") else noise for name in names}


def configs(folder: Path):
    """The models of configs/ without the checksums of their publishers: what is served here is made up."""
    target = folder / "configs" / "models"
    target.mkdir(parents=True)
    for path in (Path(__file__).resolve().parents[2] / "configs" / "models").glob("*.toml"):
        lines = path.read_text("utf-8").splitlines(keepends=True)
        (target / path.name).write_text("".join(line for line in lines if not line.startswith("sha256 =")), "utf-8")
    return target.parent
