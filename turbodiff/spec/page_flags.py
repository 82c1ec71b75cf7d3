"""The flags of starting the page: one parser for every way to do so (scripts/start, python webui/app.py, turbodiff
serve, turbodiff service), of the standard library alone, because the launcher reads it before anything is installed.
"""

import argparse
import ipaddress
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from turbodiff.spec.environment import PASSWORD, WEBHOOK, expand
from turbodiff.spec.errors import RequestError

PORT = 7860
LOOPBACK = "127.0.0.1"
ALL_ADDRESSES = "0.0.0.0"
ASK = "\0ask"  # `--password` without a value; no argument of a process can hold it


def page_parser(prog: str = "webui/app.py", *, as_service: bool = False) -> argparse.ArgumentParser:
    """The parser of these flags. `as_service`: for files that start the page later, where a password on the command
    line would stay in them."""
    flags = argparse.ArgumentParser(
        prog=prog, description="turbodiff: text or a picture to a short video", allow_abbrev=False
    )
    add = flags.add_argument
    add("--port", type=int, default=PORT, help="default: %(default)s")
    add(
        "--listen",
        nargs="?",
        const=ALL_ADDRESSES,
        default=LOOPBACK,
        metavar="ADDRESS",
        help="serve other machines, all addresses or one; needs a password",
    )
    if not as_service:
        add(
            "--password",
            nargs="?",
            const=ASK,
            default=None,
            help=f"for --listen; without a value it is asked for; or ${PASSWORD}",
        )
    add("--password-file", type=Path, default=None, metavar="FILE", help="its first line is the password, as UTF-8")
    add("--host-name", action="append", default=[], metavar="NAME", help="another name that this page answers to")
    add(
        "--proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a reverse proxy (address or network) whose X-Forwarded headers are believed",
    )
    add("--root-path", default="", metavar="/PATH", help="where a reverse proxy puts the page: https://name/PATH/")
    add("--state-dir", type=Path, default=None, help="queue, caches, logs")
    add("--outputs", type=Path, default=Path("outputs"), help="where clips go; default: %(default)s")
    add("--lang", choices=("auto", "en", "zh"), default="auto", help="default: as the browser asks")
    add("--mcp", action="store_true", help="offer the API's calls to agents at /gradio_api/mcp/; needs the mcp package")
    add(
        "--webhook",
        default=os.environ.get(WEBHOOK, ""),
        metavar="URL",
        help=f"told with a POST when a job is done or failed (its number, model, size, seed; no prompt); or ${WEBHOOK}",
    )
    add(
        "--enhancer",
        default="",
        metavar="URL",
        help="an OpenAI-compatible server that may lengthen a prompt when asked to: http://127.0.0.1:11434/v1 (Ollama)",
    )
    add("--enhancer-model", default="", metavar="NAME", help="its model; default: the first that it lists")
    add("--no-browser", action="store_true", help="do not open a browser")
    if as_service:
        add("--dry-run", action="store_true", help="show what would be written and run; change nothing")
    return flags


def as_flags(args: argparse.Namespace) -> list[str]:
    """What was parsed, as flags that mean the same in any folder: port and outputs always, others where they were
    given; not those about the browser, a password and a dry run, which are of one start."""
    flags = ["--port", str(args.port), "--outputs", str(expand(args.outputs).absolute())]
    for name in ("state_dir", "password_file"):
        if path := getattr(args, name):
            flags += [f"--{name.replace('_', '-')}", str(expand(path).absolute())]
    given: Sequence[tuple[str, Sequence[str]]] = (
        ("--listen", [args.listen] if args.listen != LOOPBACK else []),
        ("--host-name", args.host_name),
        ("--proxy", args.proxy),
        ("--root-path", [args.root_path] if args.root_path else []),
        ("--lang", [args.lang] if args.lang != "auto" else []),
        ("--webhook", [args.webhook] if args.webhook else []),
        ("--enhancer", [args.enhancer] if args.enhancer else []),
        ("--enhancer-model", [args.enhancer_model] if args.enhancer_model else []),
    )
    flags += [f"{name}={value}" for name, values in given for value in values]  # with "=": a value may begin with "-"
    return flags + (["--mcp"] if args.mcp else [])


def check_port(port: int) -> None:
    """Raises RequestError: there is no such port."""
    if not 1 <= port <= 65535:
        raise RequestError(
            "there is no such port", code="bad_port", field="--port", got=port, expected="1 to 65535",
            try_instead=f"--port {PORT}",
        )  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Check what can be told without the network and the disk.

    Raises:
        RequestError: a port, a proxy, a host name, a root path or an address that is none; `--mcp` without its package.
    """
    if args.mcp and find_spec("mcp") is None:
        raise RequestError(
            "agents are served with the mcp package",
            code="mcp_missing",
            field="--mcp",
            try_instead='pip install "turbodiff[mcp]", or leave --mcp out',
        )
    for proxy in args.proxy:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            raise RequestError(
                "a proxy is named by its address or network",
                code="bad_proxy",
                field="--proxy",
                got=proxy,
                try_instead="--proxy 127.0.0.1",
            ) from None
    for name in args.host_name:
        if not re.fullmatch(r"[\w.-]+|\[?[0-9A-Fa-f:.]+\]?", name):
            raise RequestError(
                "a host name stands alone, without scheme, port or path",
                code="bad_host_name",
                field="--host-name",
                got=name,
                try_instead="--host-name video.example",
            )
    if args.root_path and not re.fullmatch(r"(/(?!\.{1,2}(/|$))[\w.~-]+)+/?", args.root_path):
        raise RequestError(
            "a root path is a slash and names of letters, digits and . _ ~ -",
            code="bad_root_path",
            field="--root-path",
            got=args.root_path,
            try_instead="--root-path /video",
        )
    check_port(args.port)
    for flag, url, example in (
        ("--webhook", args.webhook, "http://127.0.0.1:8080/turbodiff"),
        ("--enhancer", args.enhancer, "http://127.0.0.1:11434/v1"),
    ):
        if url and not is_web_address(url):
            raise RequestError(
                "an address begins with http:// or https://", code="bad_address", field=flag, got=url,
                expected="http:// | https://", try_instead=f"{flag} {example}",
            )  # fmt: skip


def is_web_address(url: str) -> bool:
    """Whether a text is an http or https address with a host, and nothing but visible ASCII."""
    try:
        found = urlsplit(url)
        named = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:
        return False
    return named and re.fullmatch(r"[!-~]+", url) is not None
