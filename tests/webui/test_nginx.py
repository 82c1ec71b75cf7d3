"""A real nginx before the real page: below a prefix, plain and with TLS."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

APP = Path(__file__).resolve().parents[2] / "webui" / "app.py"
PASSWORD = "correct horse"
WAIT_S = 240.0  # on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("nginx") and shutil.which("openssl")), reason="nginx or openssl is not installed"
    ),
]

CONF = """
daemon off; master_process off; error_log {folder}/error.log; pid {folder}/nginx.pid;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  proxy_http_version 1.1; proxy_buffering off; client_max_body_size 8m;
  proxy_set_header Host $http_host; proxy_set_header X-Forwarded-Proto $scheme;
  proxy_set_header X-Forwarded-For $remote_addr;
  server {{ listen 127.0.0.1:{plain}; location /video/ {{ proxy_pass http://127.0.0.1:{app}; }} }}
  server {{ listen 127.0.0.1:{tls} ssl; ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
    location /video/ {{ proxy_pass http://127.0.0.1:{app}; }} }}
}}
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The page behind nginx: its address plain and with TLS."""
    folder = tmp_path_factory.mktemp("nginx")
    app, plain, tls = free_ports(3)
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2"]
    subprocess.run(["openssl", "req", "-x509", *key, "-subj", "/CN=localhost"], check=True, capture_output=True)
    (folder / "nginx.conf").write_text(CONF.format(folder=folder, app=app, plain=plain, tls=tls))
    (folder / "password").write_text(PASSWORD)
    command = [sys.executable, str(APP), "--no-browser", "--port", str(app), "--root-path", "/video"]
    command += ["--proxy", "127.0.0.1", "--password-file", str(folder / "password")]
    command += ["--state-dir", str(folder / "state"), "--outputs", str(folder / "outputs")]
    page = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, conf = folder / "error.log", folder / "nginx.conf"
    nginx = subprocess.Popen(["nginx", "-e", log, "-c", conf], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            try:
                if httpx.get(f"http://127.0.0.1:{plain}/video/healthz", timeout=20, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert page.poll() is None and nginx.poll() is None, log.read_text()
            time.sleep(0.3)
        yield {"plain": f"http://127.0.0.1:{plain}/video", "tls": f"https://127.0.0.1:{tls}/video"}
    finally:
        for process in (nginx, page):
            process.terminate()
            process.wait(WAIT_S)


def client(base: str) -> httpx.Client:
    """A browser's cookies and origin at an address."""
    origin = base.removesuffix("/video")
    return httpx.Client(base_url=base, headers={"origin": origin}, verify=False, timeout=WAIT_S, trust_env=False)


@pytest.mark.parametrize("scheme", ["plain", "tls"])
def test_the_page_works_behind_nginx_below_a_prefix(site: dict[str, str], scheme: str) -> None:
    base = site[scheme]
    with client(base) as browser:
        away = browser.get("/", headers={"accept": "text/html"})
        assert away.status_code in (302, 303, 307) and "/video/" in away.headers["location"]
        assert browser.post("/login", data={"password": PASSWORD}).status_code < 400
        assert browser.get("/config").json()["root"].rstrip("/") == base
        assert browser.get("/zh/config").json()["root"].rstrip("/") == f"{base}/zh"
        for path in ("/", "/zh/", "/seeds.md", "/healthz"):
            assert browser.head(path).status_code == 200, path
        asked = {"accept": "text/html", "accept-language": "en;q=0.4, zh-CN;q=0.9"}
        assert browser.get("/", headers=asked, follow_redirects=True).url.path == "/video/zh/"
        assert browser.post("/gradio_api/upload", files={"files": b"a picture"}).status_code == 200
        wishes = {"prompt": "a red circle moves right on a black background", "seed": 1, "num_frames": 5, "steps": 1}
        call = browser.post("/gradio_api/call/submit", json={"data": [wishes]}).json()["event_id"]
        with browser.stream("GET", f"/gradio_api/call/submit/{call}") as stream:
            answer = "".join(stream.iter_text())
        assert "event: complete" in answer and '"job"' in answer


def test_guesses_at_the_password_are_counted_whatever_address_they_claim(site: dict[str, str]) -> None:
    """Directly at the page 127.0.0.1 is the named proxy; through nginx the address that nginx saw counts."""
    with client(site["plain"]) as browser:
        codes = [
            browser.post("/login", data={"password": "guess"}, headers={"x-forwarded-for": f"10.0.0.{n}"}).status_code
            for n in range(12)
        ]
    assert 429 in codes
