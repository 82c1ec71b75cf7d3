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
from typing import NamedTuple
from urllib.parse import urlsplit

from turbodiff.spec.environment import PASSWORD, WEBHOOK, expand
from turbodiff.spec.errors import RequestError

PORT = 7860
LOOPBACK = "127.0.0.1"
ALL_ADDRESSES = "0.0.0.0"
ALL_CARDS = 1_000_000
TOKEN_FILE, TOKEN_MODE = "~/.ray/auth_token", "RAY_AUTH_MODE=token"  # of a cluster, where Ray looks for it
ASK = "\0ask"  # `--password` without a value; no argument of a process can hold it


class UsedCards(NamedTuple):
    """Which cards work: those of the cluster at an address ("" for none, or "auto"), at most so many of them, and this
    machine's own; whether machines of the cluster may download weights."""

    cluster: str = ""
    most: int = ALL_CARDS
    local: bool = True
    downloads: bool = False


HERE = UsedCards()


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
    add("--metrics", action="store_true", help="serve /metrics for Prometheus, behind the password like the page")
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
    add("--cluster", default="", metavar="ADDRESS", help="cards of a Ray cluster work, too: HOST:PORT or auto")
    add("--cluster-gpus", type=int, default=ALL_CARDS, metavar="N", help="how many of them at most; default: all")
    add("--cluster-downloads", action="store_true", help="its machines may download the weights that a job waits for")
    add("--no-local-gpus", action="store_true", help="with --cluster: the cards of this machine do not work")
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
        ("--cluster", [args.cluster] if args.cluster else []),
        ("--cluster-gpus", [str(args.cluster_gpus)] if args.cluster_gpus != ALL_CARDS else []),
    )
    flags += [f"{name}={value}" for name, values in given for value in values]  # with "=": a value may begin with "-"
    switches = ("mcp", "metrics", "cluster-downloads", "no-local-gpus")
    return flags + [f"--{name}" for name in switches if getattr(args, name.replace("-", "_"))]


def check_port(port: int) -> None:
    """Raises RequestError: there is no such port."""
    if not 1 <= port <= 65535:
        raise RequestError(
            "there is no such port", code="bad_port", field="--port", got=port, expected="1 to 65535",
            try_instead=f"--port {PORT}",
        )  # fmt: skip


def check_cluster(address: str, field: str) -> None:
    """Raises RequestError: it is neither the address of a cluster's head nor "auto"."""
    named = re.fullmatch(r"(?:\[[0-9A-Fa-f:]+\]|[\w.-]+):(\d{1,5})", address)
    if address != "auto" and not (named and 1 <= int(named[1]) <= 65535):
        raise RequestError(
            "a cluster is named by the address of its head",
            code="bad_cluster",
            field=field,
            got=address,
            try_instead="10.0.0.1:6379",
        )


def check_flags(args: argparse.Namespace) -> None:
    """Check what can be told without the network and the disk.

    Raises:
        RequestError: a port, a proxy, a host name, a root path, an address or a cluster that is none; `--mcp` or
            `--cluster` without its package; `--no-local-gpus` without a cluster.
    """
    _check_cards(args)
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


def _check_cards(args: argparse.Namespace) -> None:
    if args.cluster and find_spec("ray") is None:
        raise RequestError(
            "the cards of other machines are reached with Ray",
            code="cluster_missing",
            field="--cluster",
            try_instead='pip install "turbodiff[cluster]", or leave --cluster out',
        )
    if args.cluster:
        check_cluster(args.cluster, "--cluster")
    if args.no_local_gpus and not args.cluster:
        raise RequestError(
            "without the cards of this machine there is none",
            code="no_cards_left",
            field="--no-local-gpus",
            try_instead="--cluster ADDRESS, or leave --no-local-gpus out",
        )
    said = {"--cluster-gpus": args.cluster_gpus != ALL_CARDS, "--cluster-downloads": args.cluster_downloads}
    for flag in [flag for flag, is_given in said.items() if is_given and not args.cluster]:
        raise RequestError(
            "it is about a cluster, and none is named", code="cluster_unnamed", field=flag,
            try_instead=f"--cluster ADDRESS, or leave {flag} out",
        )  # fmt: skip
    if args.cluster_gpus < 1:
        raise RequestError(
            "a cluster works with one card at least",
            code="bad_cluster_gpus",
            field="--cluster-gpus",
            got=args.cluster_gpus,
            try_instead="--cluster-gpus 1",
        )
