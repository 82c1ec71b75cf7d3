"""What children see of the environment, where they look for modules, and standard streams that cannot fail."""

import json
import os
import random
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from turbodiff.spec import environment
from turbodiff.spec.environment import NETWORK, child_environment, expand, home_folder, usable_network, with_network

ROOT = Path(__file__).resolve().parents[2]
SHADOWS = ("webui.py", "queue.py", "inspect.py", "torch.py", "typing.py", "turbodiff.py", "json.py")


def run(code, folder, *, shell="", **variables):
    """Run Python code of a process of ours in a folder; `shell` are redirections."""
    command = f'exec "$0" -P -c "$1" {shell}'
    full = {**child_environment(), **variables}
    return subprocess.run(
        ["bash", "-c", command, sys.executable, code], cwd=folder, env=full, capture_output=True, timeout=60
    )


def test_network_variables_are_put_aside_and_come_back_for_a_download():
    given = {"ALL_PROXY": "socks5://a:1", "no_proxy": "::1/128", "SSL_CERT_FILE": "/none", "HF_ENDPOINT": "https://m"}
    seen = child_environment(given)
    assert not set(NETWORK) & set(seen)
    assert seen["HF_ENDPOINT"] == "https://m"
    assert with_network(child_environment(seen)).items() >= given.items()  # also through two of our processes
    assert with_network({environment.KEPT: "garbage", "A": "b"}) == {"A": "b"}


def test_settings_of_other_gradio_and_uvicorn_programs_are_left_out():
    given = {"GRADIO_DEFAULT_CONCURRENCY_LIMIT": "abc", "GRADIO_ALLOWED_PATHS": "/", "WEB_CONCURRENCY": "x"}
    assert not set(given) & set(child_environment(given))


@pytest.mark.parametrize("python_path", ["", ":/nowhere", ".", None])
def test_modules_of_the_folder_it_starts_in_are_not_imported(tmp_path, monkeypatch, python_path):
    for name in SHADOWS:
        (tmp_path / name).write_text("raise SystemExit('shadowed by ' + __name__)")
    monkeypatch.chdir(tmp_path)
    if python_path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", python_path)
    done = run("import queue, inspect, json, typing, turbodiff.spec, webui; print(webui.__file__)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.decode().strip()).parent.name == "webui"


@pytest.mark.parametrize(
    ("name", "value", "usable"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:7891/", "socks5://127.0.0.1:7891/"),
        ("all_proxy", "socks5h://127.0.0.1:7891", "socks5h://127.0.0.1:7891"),
        ("HTTPS_PROXY", "127.0.0.1:7890", "http://127.0.0.1:7890"),
        ("https_proxy", "http://me:p@ss@proxy:8080", "http://me:p@ss@proxy:8080"),
        ("NO_PROXY", "localhost,127.0.0.1,::1/128, 10.0.0.0/8,[::1],*.lan,{!", "localhost,127.0.0.1,::1,::1,*.lan"),
        ("NO_PROXY", "::1/128", "::1"),
        ("NO_PROXY", "localhost;*.lan ;\t10.0.0.1", "localhost,*.lan,10.0.0.1"),
        ("no_proxy", "a:b:c,é.example,\udc80,%,http://x,a/b", "xn--9ca.example"),
        ("HTTP_PROXY", "http://proxy", "http://proxy"),
        ("HTTPS_PROXY", "proxy.lan", "http://proxy.lan"),
        ("all_proxy", "SOCKS5://[::1]", "socks5://[::1]"),
        ("SSL_CERT_DIR", f"/nowhere{os.pathsep}{ROOT}", f"/nowhere{os.pathsep}{ROOT}"),
    ],
)  # fmt: skip
def test_what_people_write_into_proxy_variables_is_made_usable(name, value, usable):
    found, bad = usable_network({name: value})
    assert bad is None
    assert found == {name: usable}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks4://127.0.0.1:1"),
        ("HTTP_PROXY", "http://"),
        ("HTTPS_PROXY", "http:proxy:80"),
        ("https_proxy", "http://proxy:port"),
        ("ALL_PROXY", "http://proxy:99999"),
        ("ALL_PROXY", "http://proxy:0"),
        ("ALL_PROXY", "http://[::1:80"),
        ("ALL_PROXY", "http://[::g]:80"),
        ("ALL_PROXY", "http://a\tb:80"),
        ("ALL_PROXY", "http://999.1.1.1:80"),
        ("ALL_PROXY", "http://a..b:80"),
        ("ALL_PROXY", "http://" + "a" * 300),
        ("ALL_PROXY", "http://" + "a" * 99_999),
        ("ALL_PROXY", "http://me:\udc80@proxy:80"),
        ("ALL_PROXY", "http://\udc80:80"),
        ("ALL_PROXY", "http://proxy:80/proxy.pac"),
        ("SSL_CERT_FILE", "/nonexistent.pem"),
        ("SSL_CERT_FILE", str(ROOT)),
        ("SSL_CERT_FILE", str(ROOT / "LICENSE")),
        ("SSL_CERT_FILE", "/dev/null"),
        ("SSL_CERT_FILE", "/" + "a" * 9999),
        ("SSL_CERT_FILE", "/\udc80"),
        ("SSL_CERT_DIR", str(ROOT / "LICENSE")),
        ("REQUESTS_CA_BUNDLE", "/nonexistent.pem"),
        ("SSL_CERT_DIR", "/nonexistent"),
    ],
)
def test_what_nothing_can_be_made_of_is_named(name, value):
    _, bad = usable_network({name: value})
    assert bad is not None and (bad.name, bad.value) == (name, value) and bad.expected


def test_what_nobody_reads_stops_no_download(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for keys in (tmp_path, tmp_path / "none" / "x", tmp_path / "fifo", Path("/dev/full")):
        assert usable_network({"SSLKEYLOGFILE": str(keys)}) == ({}, None)
    assert usable_network({"SSLKEYLOGFILE": str(tmp_path / "keys")})[0]
    assert usable_network({"ftp_proxy": "nonsense://"}) == ({}, None)
    assert usable_network({"HTTP_PROXY": "nonsense://", "http_proxy": "http://h"}) == ({"http_proxy": "http://h"}, None)
    assert usable_network({"HTTP_PROXY": "http://h", "http_proxy": ""}) == ({}, None)  # urllib: the small one decides


WORDS = [
    *"abz019.:/@[]%*-_;, \t\x1bé密\udc80?#",
    "http://",
    "socks5://",
    "socks://",
    "::1",
    "10.0.0.1",
    "/24",
    "xn--",
    ":80",
]


@pytest.mark.parametrize("name", ["ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"])
def test_whatever_is_called_usable_the_http_library_takes(name, monkeypatch, tmp_path):
    for other in NETWORK:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.chdir(tmp_path)
    rng, context = random.Random(16), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    taken = 0
    for _ in range(300):
        given = {name: "".join(rng.choices(WORDS, k=rng.randint(1, 9)))}
        usable, bad = usable_network(given | ({"HTTPS_PROXY": "http://h:1"} if name == "NO_PROXY" else {}))
        if bad is None and usable:
            with monkeypatch.context() as patch:
                for variable, value in usable.items():
                    patch.setenv(variable, value)
                httpx.Client(verify=True if name.startswith("SSL") else context).close()
            taken += 1
    assert taken > 10 or name.startswith("SSL_CERT")


def test_a_user_without_home_and_name_still_has_a_folder(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(environment.pwd, "getpwuid", {}.__getitem__)
    assert home_folder().name == f"turbodiff-{os.getuid()}"
    assert expand("~/models") == home_folder() / "models"
    assert expand("~nobody/x") == Path("~nobody/x")


SAY = "from turbodiff.spec import stdio; stdio.make_safe(); import sys; "


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>/dev/full"])
def test_closed_and_full_streams_stop_nothing(tmp_path, shell):
    code = SAY + "print('a' * 9999, flush=True); print('b', file=sys.stderr); sys.stdin.read(); open('done', 'w')"
    assert run(code, tmp_path, shell=f"{shell} {'' if '<' in shell else '</dev/null'}").returncode == 0
    assert (tmp_path / "done").exists()


def test_a_broken_pipe_stops_nothing(tmp_path):
    code = SAY + "[print('a' * 999) for _ in range(999)]; open('done', 'w')"
    run(code, tmp_path, shell="| head -c 1")
    assert (tmp_path / "done").exists()


def test_the_next_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    run(SAY + "file = open('log', 'w'); print('not for the file'); file.close()", tmp_path, shell=">&- 2>&- <&-")
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "ascii:strict"])
def test_letters_that_an_encoding_lacks_stay_readable_and_valid_json(tmp_path, encoding):
    code = "import json; " + SAY + "print(json.dumps(dict(a='樱é😀'), ensure_ascii=False))"
    done = run(code, tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode(encoding.partition(":")[0])) == {"a": "樱é😀"}
