"""From flags to a running app: the supervisor as this process, the page as its child."""

import argparse
import contextlib
import os
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil

from turbodiff.spec.errors import PortInUseError, RequestError, TurbodiffError

ROOT = Path(__file__).resolve().parents[1]
PORT = 7860
LOCAL = "127.0.0.1"
STARTUP_LOG = "webui_startup_latest.log"  # jobs/logs.py writes it
ANY = "0.0.0.0"


def parser() -> argparse.ArgumentParser:
    """Flags of `python webui/app.py`, the same for its web child."""
    flags = argparse.ArgumentParser(prog="webui/app.py", description="turbodiff: text or a picture to a short video")
    add = flags.add_argument
    add("--port", type=int, default=PORT, help="default: %(default)s")
    add(
        "--listen",
        nargs="?",
        const=ANY,
        default=LOCAL,
        metavar="ADDRESS",
        help="serve other machines; needs a password",
    )
    add(
        "--password", default=os.environ.get("TURBODIFF_PASSWORD", ""), help="for --listen; better: $TURBODIFF_PASSWORD"
    )
    add("--host-name", action="append", default=[], metavar="NAME", help="another name that this page answers to")
    add("--state-dir", type=Path, default=None, help="queue, caches, logs")
    add("--outputs", type=Path, default=Path("outputs"), help="where clips go; default: %(default)s")
    add("--lang", choices=("auto", "en", "zh"), default="auto", help="default: as the browser asks")
    add("--mcp", action="store_true", help="offer the API's calls to agents at /gradio_api/mcp/; needs the mcp package")
    add("--no-browser", action="store_true", help="do not open a browser")
    return flags


def check_port(host: str, port: int) -> None:
    """Fail early and say who holds the port.

    Raises:
        PortInUseError: names the holder where the system tells.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUseError(
                f"port {port} is taken",
                code="port_in_use",
                field="--port",
                got=holder_of(port) or error.strerror,
                try_instead=f"--port {port + 1}",
            ) from None


def holder_of(port: int) -> str:
    """The program that listens on a port: "python webui/app.py (pid 4211)"; "" where the system does not tell."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    return ""
                command = " ".join(psutil.Process(connection.pid).cmdline())[:80]
                return f"{command} (pid {connection.pid})"
    except psutil.Error:
        return ""
    return ""


def launch(argv: Sequence[str]) -> int:
    """Start, and stay until stopped; returns the exit code: 4 when the port is taken, 3 when the state folder is."""
    args = parser().parse_args(argv)
    try:
        check(args)
        if not args.no_browser:
            threading.Thread(target=open_when_up, args=(args.port,), daemon=True).start()
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        from turbodiff.studio import serve

        address = (LOCAL if args.listen == ANY else args.listen, args.port)
        sys.stdout.write(f"turbodiff at http://{address[0]}:{address[1]}, log in {STARTUP_LOG}; Ctrl-C ends it\n")
        sys.stdout.flush()
        code = serve(args.state_dir, args.outputs, [sys.executable, "-m", "webui.server", *argv], address)
        if code not in (0, 130):
            sys.stderr.write(f"[ERROR] ended with {code}: {STARTUP_LOG} says why\n")
        return code
    except TurbodiffError as error:
        sys.stderr.write(f"[ERROR] {error}\n")
        return error.exit_code


def check(args: argparse.Namespace) -> None:
    """What must hold before anything starts.

    Raises:
        PortInUseError: another program holds the port.
        RequestError: `--listen` without a password, `--mcp` without its package.
    """
    if args.mcp and find_spec("mcp") is None:
        raise RequestError(
            "agents are served with the mcp package",
            code="mcp_missing",
            field="--mcp",
            try_instead='pip install "turbodiff[mcp]", or leave --mcp out',
        )
    if args.listen != LOCAL and not args.password:
        raise RequestError(
            "other machines can reach --listen: it needs a password",
            code="listen_needs_password",
            field="--listen",
            try_instead="TURBODIFF_PASSWORD=... python webui/app.py --listen",
        )
    check_port(args.listen, args.port)


def open_when_up(port: int, patience_s: float = 60.0) -> None:
    """Open a browser once the page answers; a machine without one is fine."""
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), socket.create_connection((LOCAL, port), timeout=1):
            webbrowser.open(f"http://{LOCAL}:{port}")
            return
        time.sleep(0.3)
