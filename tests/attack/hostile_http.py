"""HTTP requests that no program of ours sends, seeded, as a server hands them on."""

import random
from typing import Any

PATHS = (
    "/", "/login", "/logout", "/healthz", "/media/x", "/x/login", "/gradio_api/upload", "/gradio_api/file=/etc/passwd",
    "/gradio_api/run/submit",
    "//login", "/login/../media/x", "/x/x/login", "/healthz/", "/\x00", "/\u202e", "/login%00",
)  # fmt: skip
HEADER_NAMES = (
    b"host", b"host", b"origin", b"cookie", b"authorization", b"content-length", b"x-forwarded-for",
    b"forwarded",
    b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-port", b"accept-language", b"accept", b"x-real-ip",
    b"range",
)  # fmt: skip
HEADER_VALUES = (
    b"127.0.0.1:7860", b"localhost", b"evil.example", b"[::1", b"10.0.0.1:99999999", b"null", b"http://[::1",
    b"for=\"" * 200, b"for=1.2.3.4;proto=https," * 300, b"1.2.3.4," * 500, b"Bearer x",
    b"Bearer open sesam", b"Basic !!",
    b"turbodiff_session=" + b"x" * 300, b"; ==;;\x01" * 50, b"-1", b"9" * 5000, b"1e9", b"\xff\xfe", b"",
    b"zh;q=" * 300,
    b"text/html", b"\xc2\xb2", b"https", b"a" * 9000,
)  # fmt: skip


def http_request(rng: random.Random) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An ASGI scope and the messages of its body, as a server hands on whatever a stranger sends."""
    path = rng.choice(PATHS)
    host = [(b"host", b"127.0.0.1:7860")] if rng.random() < 0.7 else []
    headers = host + [(rng.choice(HEADER_NAMES), rng.choice(HEADER_VALUES)) for _ in range(rng.randint(0, 8))]
    peer = rng.choice((("127.0.0.1", 1), ("10.1.2.3", 1), ("fe80::1%eth0", 1), ("", 0), None, ("not an address", 1)))
    scope = {
        "type": "http", "method": rng.choice(("GET", "POST", "HEAD", "DELETE", "PUT", "OPTIONS", "TRACE", "X" * 999)),
        "path": path, "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": rng.choice((b"", b"a=%ff&&=", b"x" * 9000)),
        "headers": headers, "client": peer, "scheme": "http", "root_path": "", "server": ("127.0.0.1", 7860),
        "http_version": "1.1",
    }  # fmt: skip
    bodies = (b"", b"password=x", b"password=" + b"%ff" * 2000, b"password=open+sesam", b"&" * 5000, b"\xff" * 300_000)
    parts = [rng.choice(bodies) for _ in range(rng.randint(0, 4))]
    messages = [{"type": "http.request", "body": part, "more_body": n < len(parts) - 1} for n, part in enumerate(parts)]
    return scope, messages or [{"type": "http.request", "body": b"", "more_body": False}]
