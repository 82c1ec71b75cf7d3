"""`python webui/app.py`: runs the supervisor, with the page as its child. Works from any folder and with any Python.

It runs twice: the process that was started stays beside the supervisor and starts it again where it dies (keeper.py).
Flags: turbodiff/spec/page_flags.py. What is not of the
standard library is imported inside the functions: a Python without it must reach the line that says so.
"""

# ruff: noqa: PTH100, PTH112, PTH117, PTH120, PTH121
from __future__ import annotations

import os
import sys

# An empty entry of PYTHONPATH is the folder that this is started in: a queue.py there would be imported below. Only the
# folder that we lie in ourselves may stay.
if not os.path.samefile(os.curdir, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
    sys.path[:] = (
        entry
        for entry in tuple(sys.path)
        if os.path.isabs(entry) and not (os.path.isdir(entry) and os.path.samefile(entry, os.curdir))
    )

import contextlib
import faulthandler
import getpass
import signal
import socket
import threading
import time
import traceback
import unicodedata
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PASSWORD = "TURBODIFF_PASSWORD"
PASSWORD_BYTES = 1024  # what a login page may send (security.LOGIN_BYTES) holds it with each byte as %XX
STARTUP_LOG, RUN_LOG = "webui_startup_latest.log", "webui_test.log"  # diagnostics/logs.py writes them


def use_own_python() -> None:
    """Go on in .venv when another Python started this file, so that the guide's command always works."""
    own = VENV / "bin" / "python"
    if os.path.realpath(sys.prefix) != os.path.realpath(VENV):
        try:
            own.stat()  # also a right: `exists` would raise where a folder above it is another user's
            os.execv(own, [str(own), str(Path(__file__).resolve()), *sys.argv[1:]])
        except (FileNotFoundError, NotADirectoryError):
            pass  # no .venv, or one whose Python is gone: this Python may do
        except OSError as error:
            sys.exit(
                f"{own} cannot be run by this user ({error.strerror}): remove {VENV}, or copy turbodiff to a folder of "
                "your own, and run scripts/start there once"
            )
    if sys.version_info < (3, 11) or find_spec("gradio") is None or find_spec("pydantic") is None:
        sys.exit("turbodiff is not installed for this Python: run scripts/start once")


def read_password(args: argparse.Namespace) -> str:
    """The password of `--password-file`, of the terminal, of `--password` or of $TURBODIFF_PASSWORD; "" for none.

    Raises:
        RequestError: the file cannot be read, there is no terminal to ask at, or what was given is nothing that a
            person can type into the login page: not UTF-8, empty, with control characters, too long.
    """
    from turbodiff.spec.errors import RequestError
    from turbodiff.spec.files import open_file
    from turbodiff.spec.page_flags import ASK

    named, password = f"${PASSWORD}" if args.password is None else "--password", str(args.password or "")
    try:
        if args.password_file is not None:
            named = "--password-file"
            with open_file(args.password_file) as file:
                line = file.readline(4 * PASSWORD_BYTES)
            is_whole = len(line) < 4 * PASSWORD_BYTES  # else too long anyway, and maybe cut within a letter
            password = line.decode("utf-8" if is_whole else "latin-1").removesuffix("\n").removesuffix("\r")
        elif args.password == ASK:
            password = getpass.getpass("password: ")
        elif args.password is None:
            password = os.environ.get(PASSWORD, "")
        password = password.removeprefix("\N{BYTE ORDER MARK}")
        n_bytes = len(password.encode())
    except (OSError, EOFError) as error:
        told = (str(args.password_file or ""), getattr(error, "strerror", ""))
        raise RequestError(
            "the password cannot be read",
            code="password_unread",
            field=named,
            got=": ".join(filter(None, told)) or "no terminal",
            try_instead=f"${PASSWORD}, or --password-file with a file that this user can read",
        ) from None
    except UnicodeError:
        flaw = "bytes that are not UTF-8"
    else:
        odd = [ord(letter) for letter in password if unicodedata.category(letter) == "Cc"]
        flaw = f"the control character U+{odd[0]:04X}" if odd else ""
        flaw = f"{n_bytes} bytes" if n_bytes > PASSWORD_BYTES else flaw
        flaw = "nothing" if not password and named != f"${PASSWORD}" else flaw
    if flaw:
        raise RequestError(
            "the password cannot be used",
            code="password_unusable",
            field=named,
            got=flaw,
            expected=f"one line of UTF-8 text, 1 to {PASSWORD_BYTES} bytes",
            try_instead="save the file as UTF-8" if args.password_file else "--password-file with such a line",
        )
    return password


def without_password(argv: Sequence[str]) -> list[str]:
    """The flags less those about the password: what stands in a command line, every user of the machine can read."""
    kept: list[str] = []
    skip = False
    for flag in argv:
        name, _, value = flag.partition("=")
        if skip and not flag.startswith("-"):
            skip = False
        elif name in ("--password", "--password-file"):
            skip = not value
        else:
            skip = False
            kept.append(flag)
    return kept


def check(args: argparse.Namespace) -> None:
    """Check what must hold before anything starts.

    Raises:
        PortInUseError: another program holds the port; it is named where the system tells.
        RequestError: `--listen` without a password, at no address or port of ours; `--mcp` without its package; a
            proxy or a root path that is none.
    """
    from turbodiff.spec.errors import RequestError
    from turbodiff.spec.page_flags import check_flags
    from webui.listening import is_loopback, listening_sockets

    check_flags(args)
    for sock in listening_sockets(args.listen, args.port):
        sock.close()
    if not args.password and not is_loopback(args.listen):
        raise RequestError(
            "other machines can reach --listen: it needs a password",
            code="listen_needs_password",
            field="--listen",
            try_instead=f"{PASSWORD}=... python webui/app.py --listen",
        )


def open_when_up(url: str, address: tuple[str, int], patience_s: float = 60.0) -> None:
    """Open a browser once the page answers; a machine without one is fine."""
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            webbrowser.open(url)
            return
        time.sleep(0.3)


def main(argv: Sequence[str]) -> int:
    """Start, and stay until stopped; returns the exit code: 4 when the port is taken, 3 when the state folder is."""
    use_own_python()
    # a script's own folder comes first on sys.path: webui/ there would shadow modules named like ours
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "webui")]
    from turbodiff.spec import stdio
    from turbodiff.spec.environment import BEAT_FD, LAST_END, check_folder
    from turbodiff.spec.errors import TurbodiffError, closed_to_us, not_started
    from turbodiff.spec.page_flags import page_parser
    from turbodiff.spec.wording import Words, shell_language
    from webui.keeper import CRASHED, keep

    stdio.make_safe()
    args = page_parser().parse_args(argv)
    try:
        check_folder()
        args.password = os.environ[PASSWORD] = read_password(args)
        if without_password(argv) != list(argv):  # off the command line, which `ps` shows to everybody
            again = [sys.executable, "-P", str(Path(__file__).resolve()), *without_password(argv)]
            try:
                os.execv(sys.executable, again)
            except OSError as error:
                raise not_started(sys.executable, error) from None
        if BEAT_FD not in os.environ:
            return keep([sys.executable, "-P", str(Path(__file__).resolve()), *argv])
        faulthandler.register(signal.SIGUSR1)
        check(args)
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        from turbodiff.spec.page_flags import UsedCards
        from turbodiff.studio import Studio
        from webui.listening import reachable_at, url_of

        address = (reachable_at(args.listen), args.port)
        url = url_of(*address)
        if not args.no_browser and LAST_END not in os.environ:
            threading.Thread(target=open_when_up, args=(url, address), daemon=True).start()
        sys.stdout.write(f"turbodiff at {url}, log in {STARTUP_LOG}; Ctrl-C ends it\n")
        sys.stdout.flush()
        studio = Studio(args.state_dir, args.outputs)
        # the last one counts; the folder that this is started in may be gone when the page starts again
        places = ["--outputs", str(studio.outputs), "--state-dir", str(studio.state.absolute())]
        code = studio.serve(
            [sys.executable, "-P", "-m", "webui.server", *argv, *places], address,
            UsedCards(args.cluster, args.cluster_gpus, not args.no_local_gpus, args.cluster_downloads),
        )  # fmt: skip
        if code not in (0, 130, 131):  # 128 and the number of a signal from the keyboard
            sys.stderr.write(f"[ERROR] ended with {code}: {STARTUP_LOG} says why\n")
        return code
    except (TurbodiffError, PermissionError) as error:
        said = closed_to_us(error) if isinstance(error, PermissionError) else error
        sys.stderr.write(f"[ERROR] {Words(shell_language()).error_line(said)}\n")
        return said.exit_code
    except Exception:  # noqa: BLE001  of the supervisor's start or end: what keeps it tries again
        traceback.print_exc()
        return CRASHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
