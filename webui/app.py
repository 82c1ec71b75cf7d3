"""`python webui/app.py`: runs the supervisor, with the page as its child. Works from any folder and with any Python.

Flags: --port 7860, --no-browser, --listen, --state-dir, --outputs, --lang en|zh. See --help. What is not of the
standard library is imported inside the functions: a Python without it must reach the line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
import time
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PORT = 7860
LOOPBACK = "127.0.0.1"
ALL_ADDRESSES = "0.0.0.0"
STARTUP_LOG = "webui_startup_latest.log"  # diagnostics/logs.py writes it


def use_own_python() -> None:
    """Go on in .venv when another Python started this file, so that the guide's command always works."""
    own = VENV / "bin" / "python"
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    if own.exists():
        os.execv(own, [str(own), str(Path(__file__).resolve()), *sys.argv[1:]])
    if sys.version_info < (3, 11) or find_spec("gradio") is None or find_spec("pydantic") is None:
        sys.exit("turbodiff is not installed for this Python: run scripts/start once")


def parser() -> argparse.ArgumentParser:
    """Flags of `python webui/app.py`, the same for its web child."""
    flags = argparse.ArgumentParser(prog="webui/app.py", description="turbodiff: text or a picture to a short video")
    add = flags.add_argument
    add("--port", type=int, default=PORT, help="default: %(default)s")
    add(
        "--listen",
        nargs="?",
        const=ALL_ADDRESSES,
        default=LOOPBACK,
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


def check(args: argparse.Namespace) -> None:
    """Check what must hold before anything starts.

    Raises:
        PortInUseError: another program holds the port; it is named where the system tells.
        RequestError: `--listen` without a password, `--mcp` without its package.
    """
    from turbodiff.spec.errors import PortInUseError, RequestError

    if args.mcp and find_spec("mcp") is None:
        raise RequestError(
            "agents are served with the mcp package",
            code="mcp_missing",
            field="--mcp",
            try_instead='pip install "turbodiff[mcp]", or leave --mcp out',
        )
    if args.listen != LOOPBACK and not args.password:
        raise RequestError(
            "other machines can reach --listen: it needs a password",
            code="listen_needs_password",
            field="--listen",
            try_instead="TURBODIFF_PASSWORD=... python webui/app.py --listen",
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.listen, args.port))
        except OSError as error:
            raise PortInUseError(
                f"port {args.port} is taken",
                code="port_in_use",
                field="--port",
                got=_port_holder(args.port) or error.strerror,
                try_instead=f"--port {args.port + 1}",
            ) from None


def _port_holder(port: int) -> str:
    """The program that listens on a port: "python webui/app.py (pid 4211)"; "" where the system does not tell."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                command = " ".join(psutil.Process(connection.pid).cmdline())[:80] if connection.pid else ""
                return f"{command} (pid {connection.pid})" if connection.pid else ""
    return ""


def open_when_up(port: int, patience_s: float = 60.0) -> None:
    """Open a browser once the page answers; a machine without one is fine."""
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
            webbrowser.open(f"http://{LOOPBACK}:{port}")
            return
        time.sleep(0.3)


def main(argv: Sequence[str]) -> int:
    """Start, and stay until stopped; returns the exit code: 4 when the port is taken, 3 when the state folder is."""
    use_own_python()
    # a script's own folder comes first on sys.path: webui/ there would shadow modules named like ours
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "webui")]
    from turbodiff.spec.errors import TurbodiffError

    args = parser().parse_args(argv)
    try:
        check(args)
        if not args.no_browser:
            threading.Thread(target=open_when_up, args=(args.port,), daemon=True).start()
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        from turbodiff.studio import Studio

        address = (LOOPBACK if args.listen == ALL_ADDRESSES else args.listen, args.port)
        sys.stdout.write(f"turbodiff at http://{address[0]}:{address[1]}, log in {STARTUP_LOG}; Ctrl-C ends it\n")
        sys.stdout.flush()
        studio = Studio(args.state_dir, args.outputs)
        code = studio.serve([sys.executable, "-m", "webui.server", *argv], address)
        if code not in (0, 130):
            sys.stderr.write(f"[ERROR] ended with {code}: {STARTUP_LOG} says why\n")
        return code
    except TurbodiffError as error:
        sys.stderr.write(f"[ERROR] {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
