"""Servers of weights: the Hugging Face hub, a mirror of it, ModelScope; where a file is on one, and why it is not.

ModelScope publishes Wan-AI, Comfy-Org and TurboDiffusion under the same names. Its files lie at
`/models/<repository>/resolve/master/<path>`, their sizes and SHA-256 in `/api/v1/models/<repository>/repo/files`
(modelscope/hub/api.py, `get_model_files`); it refuses askers without a User-Agent.
"""

import contextlib
import errno
import json
import os
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from turbodiff.spec.errors import RequestError
from turbodiff.spec.models import ModelFile

HUGGINGFACE = "https://huggingface.co"
MODELSCOPE = "www.modelscope.cn"  # of $MODELSCOPE_DOMAIN, which its own library reads
MODELSCOPE_HOSTS = ("modelscope.cn", "modelscope.ai")
SHA256 = re.compile(r"[0-9a-f]{64}")
TIMEOUT_S = 30
MAX_LISTING_BYTES = 8 << 20
MAX_WAIT_S = 300.0  # of a server that asks for patience; beyond that the person is told
USER_AGENT = "turbodiff"

# code of an error -> what happened, what to try; the page has them in spec/wording/error.toml
FAILURES: Mapping[str, tuple[str, str]] = {
    "download_no_network": ("there is no network", "connect this machine, then resume"),
    "download_dns": ("the name of the server cannot be resolved", "check the network and the mirror's address"),
    "hub_unreachable": ("the server does not answer", "set HF_ENDPOINT to a mirror that you can reach"),
    "download_timeout": ("the server takes too long", "resume later, or set HF_ENDPOINT to a mirror"),
    "download_broken": ("the connection breaks again and again", "resume later, or set HF_ENDPOINT to a mirror"),
    "download_proxy": ("the proxy does not let the download through", "check HTTPS_PROXY and ALL_PROXY"),
    "download_tls": ("the server's certificate is not trusted", "check the clock, SSL_CERT_FILE, and any proxy"),
    "download_gated": ("the server does not allow this download", "sign in with `hf auth login` and accept the terms"),
    "download_absent": ("the server does not have this file", "another mirror, or fetch it by hand"),
    "download_busy": ("the server asks to wait: too many downloads", "resume in some minutes, or use a mirror"),
    "download_server_error": ("the server has a fault of its own", "resume later, or set HF_ENDPOINT to a mirror"),
    "download_damaged": ("the downloaded file is not what the server promised; it was removed", "resume, or a mirror"),
    "download_differs": ("the server offers another file than was published", "another mirror"),
}
FINAL = ("download_gated", "download_absent", "download_differs", "download_proxy", "download_tls")  # as good as said
STATUS = {401: "download_gated", 403: "download_gated", 407: "download_proxy", 429: "download_busy"}


class Source(NamedTuple):
    """A server of weights; `trusted`: the person's token of the hub may be shown to it."""

    kind: Literal["hub", "modelscope"]
    endpoint: str
    trusted: bool = False

    @property
    def host(self) -> str:
        """Its name, without credentials."""
        return urlsplit(self.endpoint).netloc.rpartition("@")[2]

    def url(self, file: ModelFile) -> str:
        """Where a file is fetched by hand."""
        name = quote(file.names[0])
        path = f"models/{file.repo}/resolve/master/{name}" if self.kind == "modelscope" else ""
        return f"{without_credentials(self.endpoint)}/{path or f'{file.repo}/resolve/main/{name}'}"


class Remote(NamedTuple):
    """A file on a server as it is now; `etag` is its SHA-256 where the server tells it."""

    url: str
    location: str
    etag: str
    nbytes: int
    trusted: bool = False


class SourceError(ConnectionError):
    """A server does not have what it should: `code` is one of FAILURES."""

    def __init__(self, code: str, got: str) -> None:
        super().__init__(got)
        self.code = code


def check_mirror(text: str) -> str:
    """The address of a mirror as it is kept; "" for none.

    Raises:
        RequestError: not http or https, no host, or a name and password in it: it is shown to everybody at the page.
    """
    text = text.strip().rstrip("/")
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if text and (not sound or "@" in text or parts.query or parts.fragment or not text.isprintable() or " " in text):
        raise RequestError(
            "not the address of a mirror", code="mirror_bad", field="mirror", got=without_credentials(text)[:120],
            expected="https://host or http://host:port, without user name and password",
            try_instead="https://hf-mirror.com or https://www.modelscope.cn",
        )  # fmt: skip
    return text


def without_credentials(url: str) -> str:
    """An address as it may be shown."""
    parts = urlsplit(url) if "@" in url and "[" not in url else None
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts and parts.netloc else url


def sources(mirror: str = "") -> tuple[Source, ...]:
    """The servers to ask, in order: `mirror`, else $HF_ENDPOINT, else the hub itself; then ModelScope.

    The person's token goes to the hub and to what $HF_ENDPOINT names, as huggingface_hub does, never to a mirror that
    was typed into the page: whoever may use the page could have it sent to themselves.
    """
    named = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/")
    endpoint = mirror or named or HUGGINGFACE
    domain = os.environ.get("MODELSCOPE_DOMAIN", "").strip().rstrip("/") or MODELSCOPE
    modelscope = Source("modelscope", domain if "://" in domain else f"https://{domain}")
    host = urlsplit(endpoint).hostname or ""
    if endpoint == modelscope.endpoint or host.endswith(MODELSCOPE_HOSTS):
        return Source("modelscope", endpoint), Source("hub", named or HUGGINGFACE, trusted=True)
    return Source("hub", endpoint, trusted=endpoint in (HUGGINGFACE, named)), modelscope


def look_up(source: Source, file: ModelFile) -> Remote:
    """Where a file is on a server, its size and checksum.

    Raises:
        Exception: the server cannot be asked or does not have it; `failure` tells why. The transport of
            huggingface_hub raises kinds of its own, other ones in each version.
    """
    remote = _on_modelscope(source, file) if source.kind == "modelscope" else _on_hub(source, file)
    if not remote.etag or remote.nbytes < 0:
        raise SourceError("download_broken", f"{file.names[0]}: no size or checksum from {source.host}")
    if source.endpoint != HUGGINGFACE and SHA256.fullmatch(remote.etag) and file.sha256 not in ("", remote.etag):
        raise SourceError("download_differs", f"{file.names[0]}: {remote.etag[:16]} instead of {file.sha256[:16]}")
    return remote


def _on_hub(source: Source, file: ModelFile) -> Remote:
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url  # 0.3 s

    url = hf_hub_url(file.repo, file.names[0], endpoint=source.endpoint)
    token = (get_token() or False) if source.trusted else False
    found = get_hf_file_metadata(url, token=token, endpoint=source.endpoint, timeout=TIMEOUT_S)
    etag = re.sub(r"[^\w-]", "", found.etag or "")
    return Remote(url, found.location, etag, -1 if found.size is None else found.size, source.trusted)


def _on_modelscope(source: Source, file: ModelFile) -> Remote:
    import httpx

    query = {"Revision": "master", "Recursive": "true"}
    url, text = f"{source.endpoint}/api/v1/models/{file.repo}/repo/files", b""
    headers = {"User-Agent": USER_AGENT}
    with httpx.stream("GET", url, params=query, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
        answer.raise_for_status()
        for chunk in answer.iter_bytes():
            text += chunk
            if len(text) > MAX_LISTING_BYTES:
                raise SourceError("download_broken", f"{source.host} lists without end")
    try:
        listed: Sequence[Mapping[str, object]] = json.loads(text)["Data"]["Files"]
        found = next((row for row in listed if row["Path"] == file.names[0]), None)
        sha256, nbytes = (str(found["Sha256"]), int(str(found["Size"]))) if found else ("", 0)
    except (ValueError, KeyError, TypeError):
        raise SourceError("download_broken", f"{source.host} does not list its files") from None
    if found is None:
        raise SourceError("download_absent", f"{file.repo}/{file.names[0]}")
    place = source.url(file)
    return Remote(place, place, sha256 if SHA256.fullmatch(sha256) else "", nbytes)


def failure(error: BaseException) -> tuple[str, float]:
    """The code of FAILURES for an error of the network, and the seconds that the server asked to wait."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and len(chain) < 12:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for part in chain:
        if isinstance(part, SourceError):
            return part.code, 0.0
        answer = getattr(part, "response", None)
        status = getattr(answer, "status_code", None)
        if isinstance(status, int):
            code = "download_server_error" if status >= 500 else STATUS.get(status, "download_absent")
            told, wait_s = str(getattr(answer, "headers", {}).get("Retry-After", ""))[:40], 0.0
            with contextlib.suppress(ValueError, TypeError, OverflowError):  # RFC 9110, 10.2.3: seconds or a date
                until = None if told.strip().isdecimal() else parsedate_to_datetime(told)
                wait_s = float(told) if until is None else (until - datetime.now(UTC)).total_seconds()
            return code, max(0.0, wait_s)
    names = " ".join(type(part).__name__ for part in chain)
    numbers = {part.errno for part in chain if isinstance(part, OSError)}
    if "ProxyError" in names:
        return "download_proxy", 0.0
    if any(isinstance(part, ssl.SSLError) for part in chain):
        return "download_tls", 0.0
    if any(isinstance(part, socket.gaierror) for part in chain):
        return "download_dns", 0.0
    if numbers & {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}:
        return "download_no_network", 0.0
    if "Timeout" in names:
        return "download_timeout", 0.0
    return "hub_unreachable" if "ConnectError" in names or errno.ECONNREFUSED in numbers else "download_broken", 0.0
