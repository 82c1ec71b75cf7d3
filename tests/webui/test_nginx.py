"""The page behind a real nginx with the lines that README gives: a sub-path, with TLS and without."""

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.webui.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PATIENCE_S = 180.0
PASSWORD = "open sesame"
NAME = "video.example"
PROMPT = json.dumps({"steps": 2, "dt_s": 0.05})
KINDS = {  # (TLS, how the proxy passes the host on, what stands behind the port of proxy_pass)
    "tls": (True, "$http_host", "/"),
    "plain": (False, "$host:$server_port", "/"),
    "the prefix stays in the path": (False, "$http_host", ""),
    "tls with a host that lost its port": (True, "$host", "/"),  # as at 443, where browsers send none
}
pytestmark = [
    pytest.mark.skipif(NGINX is None, reason="no nginx here: apt-get install nginx-light"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here, which makes the certificate"),
]


def lines_of(document):
    """README's server block."""
    return re.search(r"```nginx\n(.*?)```", (ROOT / document).read_text("utf-8"), re.DOTALL)[1]


def replaced(text, *pairs):
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def server(port, app_port, folder, tls, host, target):
    """README's server block with this test's ports and certificate."""
    text = replaced(
        lines_of("README.md"),
        ("http://127.0.0.1:7860/", f"http://127.0.0.1:{app_port}{target}"),
        ("Host $http_host", f"Host {host}"),
        ("/etc/ssl/video.example", str(folder / "server")),
        ("listen 443 ssl", f"listen 127.0.0.1:{port}{' ssl' if tls else ''}"),
    )
    return text if tls else re.sub(r" *ssl_certificate.*\n", "", text)


@pytest.fixture(scope="module")
def sites(start_app, tmp_path_factory):
    """The app, and an address of nginx for each of `KINDS`; the file of the certificate."""
    folder = tmp_path_factory.mktemp("nginx")
    certificate = folder / "server.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},IP:127.0.0.1",
         "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
         "-keyout", folder / "server.key", "-out", certificate],
        check=True, capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    (folder / "password").write_text(f"{PASSWORD}\n")
    flags = ["--proxy", "127.0.0.1", "--root-path", "/video", "--host-name", NAME]
    app = start_app(tmp_path_factory.mktemp("behind"), *flags, "--password-file", str(folder / "password"))
    ports = {kind: free_port() for kind in KINDS}
    temporary = "".join(f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi"))
    servers = "".join(server(ports[kind], app.port, folder, *KINDS[kind]) for kind in KINDS)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary} scgi_temp_path {folder}/scgi;\n{servers} }}"
    )
    proxy = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        yield app, {kind: f"http{'s' * KINDS[kind][0]}://127.0.0.1:{port}" for kind, port in ports.items()}, certificate
    finally:
        proxy.terminate()
        proxy.wait(PATIENCE_S)
        app.stop()


@contextlib.contextmanager
def browser(sites, kind, address="127.0.0.1"):
    """A client of nginx at an address of loopback; waits until nginx answers."""
    _, urls, certificate = sites
    trust = ssl.create_default_context(cafile=str(certificate))
    scheme, _, place = urls[kind].partition("://")
    host = f"{NAME}:{place.partition(':')[2]}"
    headers = {"host": host, "origin": f"{scheme}://{host}"}
    transport = httpx.HTTPTransport(verify=trust, local_address=address)
    with httpx.Client(base_url=urls[kind], headers=headers, transport=transport, timeout=PATIENCE_S) as client:
        end_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                assert client.get("/video/healthz").status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < end_s, "nginx does not start"
                time.sleep(0.1)
        yield client


def call(client, name, *data):
    started = client.post(f"/video/gradio_api/call/{name}", json={"data": list(data)})
    assert started.status_code == 200, started.text
    with client.stream("GET", f"/video/gradio_api/call/{name}/{started.json()['event_id']}") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        text = "".join(stream.iter_text())
    return json.loads(re.search(r"event: complete\ndata: (.*)", text)[1])[0]


def test_both_readmes_give_the_same_lines():
    english, chinese = (re.sub(r" *#.*", "", lines_of(document)) for document in ("README.md", "README.zh.md"))
    assert english == chinese


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_way_from_login_to_clip_works_behind_nginx(sites, kind):
    app = sites[0]
    with browser(sites, kind) as client:
        site = client.headers["origin"]
        root = site.rpartition(":")[0] if KINDS[kind][1] == "$host" else site
        page = {"accept": "text/html", "accept-language": "en;q=0.3, zh-CN;q=0.9"}
        assert client.get("/video").headers["location"] == f"{site}/video/"
        assert client.get("/video/", headers=page).headers["location"] == "/video/login"
        assert "action='/video/login'" in client.get("/video/login").text
        login = client.post("/video/login", data={"password": PASSWORD})
        assert login.status_code == 200 and "; Path=/video" in login.headers["set-cookie"]
        assert ("; Secure" in login.headers["set-cookie"]) is KINDS[kind][0]
        assert client.get("/video/", headers=page).headers["location"] == "/video/zh/"
        assert client.get("/video/", headers={**page, "accept-language": "de, en;q=0.1"}).status_code == 200
        assert client.get("/video/zh?a=1").headers["location"] == "/video/zh/?a=1"
        for path, lang in (("/video/config", "Generate"), ("/video/zh/config", "生成")):
            config = client.get(path)
            assert lang in config.text
            assert config.json()["root"] == root + path.removesuffix("/config")
        evil = client.post(
            "/video/gradio_api/call/list", json={"data": [1]}, headers={"origin": "https://evil.example"}
        )
        assert evil.status_code == 403
        upload = client.post("/video/gradio_api/upload", files={"files": ("x.png", os.urandom(2 << 20))})
        assert upload.status_code == 200 and len(upload.json()) == 1  # nginx's own limit is 1 MB
        assert client.post("/video/gradio_api/upload", content=b"x" * (26 << 20)).status_code == 413

        job = call(client, "submit", {"prompt": PROMPT, "model": "demo", "seed": 7})["job"]
        app.wait(lambda: call(client, "status", job)["state"] == "done", PATIENCE_S)
        url = call(client, "result", job)["url"]
        assert url.startswith("/video/media/")
        whole, part = client.get(url), client.get(url, headers={"range": "bytes=4-7"})
        assert (whole.status_code, part.status_code, part.content) == (200, 206, b"ftyp")
        assert part.headers["content-range"] == f"bytes 4-7/{len(whole.content)}"
        for path in (
            url,
            "/video/",
            "/video/seeds.md",
            "/video/healthz",
            "/video/zh/",
            "/video/theme.css",
            "/video/config",
        ):
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b"")
        assert client.head(url).headers["content-length"] == str(len(whole.content))
        out = client.post("/video/logout")
        assert out.headers["location"] == "/video/login" and client.get("/video/config").status_code == 401


def test_a_forged_client_address_counts_neither_beside_the_proxy_nor_through_it(sites):
    app, _, _ = sites

    def guess(client, path, number):
        forged = {"x-forwarded-for": f"9.9.9.{number}", "forwarded": f"for=9.9.9.{number}"}
        return client.post(path, data={"password": "x"}, headers=forged).status_code

    limited = [401] * 5 + [429] * 2
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.3"), timeout=PATIENCE_S) as beside:
        assert [guess(beside, f"{app.url}/login", number) for number in range(7)] == limited
    with browser(sites, "tls", "127.0.0.4") as through:
        assert [guess(through, "/video/login", number) for number in range(7)] == limited
    with browser(sites, "tls", "127.0.0.5") as another:  # the proxy tells them apart: nobody locks everybody out
        assert guess(another, "/video/login", 0) == 401
