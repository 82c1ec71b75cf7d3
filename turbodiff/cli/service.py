"""`turbodiff service`: the app as a systemd unit and a desktop entry of this user; nothing of the system, no sudo."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from turbodiff.cli.flags import PAGE_FLAGS
from turbodiff.diagnostics.logs import redact
from turbodiff.spec.environment import KEPT, NETWORK, PASSWORD, home_folder, with_network
from turbodiff.spec.errors import FileError, RequestError, TurbodiffError
from turbodiff.spec.files import atomic_write
from turbodiff.spec.page_flags import ALL_ADDRESSES, LOOPBACK, as_flags, check_flags, page_parser
from turbodiff.spec.wording import Words, shell_language

UNIT, ENTRY = "turbodiff.service", "turbodiff.desktop"
MARK = "# Made by `turbodiff service install`; `turbodiff service uninstall` takes it away.\n"
# the folder as an argument: WorkingDirectory= of systemd and Path= of a desktop entry have no way to quote
RUN = ("/bin/sh", "-c", 'cd -- "$1" && shift && exec "$@"', "turbodiff")
# 2, 3, 4: a wrong flag, a state folder or port in use; trying again mends none (spec/errors.py). A worker that the
# kernel ends for want of memory is replaced by the supervisor: OOMPolicy=stop, the default, would end the app with it.
UNIT_TEXT = """{mark}[Unit]
Description=turbodiff: text or a picture to a short video
StartLimitIntervalSec=300
StartLimitBurst=5

[Service]
ExecStart={command}
{environment}Restart=on-failure
RestartSec=5
RestartPreventExitStatus=2 3 4
KillMode=mixed
TimeoutStopSec=30
OOMPolicy=continue

[Install]
WantedBy=default.target
"""
ENTRY_TEXT = """[Desktop Entry]
{mark}Type=Application
Name=turbodiff
Comment=Text or a picture to a short video
Comment[zh_CN]=文字或图片生成短视频
Exec={command}
Icon={icon}
Terminal={terminal}
Categories=AudioVideo;Video;
"""
CARRIED = (
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES"),
    *("XDG_STATE_HOME", "XDG_CACHE_HOME", *NETWORK),
)
NOT_CARRIED = (PASSWORD, KEPT)
ONLY_HERE = ("", LOOPBACK, "localhost", "::1", "[::1]")
START_WAIT_S, SYSTEMCTL_WAIT_S, POLL_S = 60.0, 60.0, 0.3
NOT_RUNNING = 3  # as `systemctl status` ends

service_app = typer.Typer(
    help="Start with the session, stand in the menu of programs: install, uninstall, status, open.",
    no_args_is_help=True,
)
DryRun = Annotated[bool, typer.Option("--dry-run", help="show what would be written and run; change nothing")]


def say(line: str) -> None:
    """Print one line; a password in an address is no part of it."""
    sys.stdout.write(redact(line) + "\n")


def places() -> tuple[Path, Path]:
    """Where the unit and the entry go (XDG Base Directory Specification 0.8: a path that is not absolute is none)."""
    found = []
    for variable, default in (("XDG_CONFIG_HOME", ".config"), ("XDG_DATA_HOME", ".local/share")):
        named = Path(os.environ.get(variable, ""))
        found.append(named if named.is_absolute() else home_folder().absolute() / default)
    return found[0] / "systemd" / "user" / UNIT, found[1] / "applications" / ENTRY


def state_of(path: Path) -> str:
    """ "ours", "absent", or "foreign": what stands there was not made by `install`, so it is left alone."""
    if not os.path.lexists(path):
        return "absent"
    try:
        return "ours" if not path.is_symlink() and MARK.encode() in path.read_bytes() else "foreign"
    except OSError:
        return "foreign"


def systemctl(*args: str) -> str | None:
    """What `systemctl --user ARGS` printed; None where it is not there, does not answer, or did not do it."""
    try:
        done = subprocess.run(
            ["systemctl", "--user", *args],
            capture_output=True, stdin=subprocess.DEVNULL, timeout=SYSTEMCTL_WAIT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def for_systemd(text: str, dollar: str) -> str:
    """A quoted word of a unit (systemd.syntax(7), Quoting; systemd.unit(5), Specifiers): what is no plain text is
    written as bytes, and `dollar` stands for "$", which only command lines expand (systemd.service(5))."""
    special = {'"': '\\"', "\\": "\\\\", "%": "%%", "$": dollar}
    plain = (
        special.get(char, char if char.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(char)))
        for char in text
    )
    return f'"{"".join(plain)}"'


def for_desktop(text: str) -> str:
    """A value of a desktop entry (Desktop Entry Specification 1.5, Possible value types)."""
    return "".join({"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char, char) for char in text)


def read_flags(context: typer.Context, name: str) -> argparse.Namespace:
    """The flags of a command that starts the page later, checked now.

    Raises:
        RequestError: a flag that the page would refuse.
    """
    args = page_parser(f"turbodiff service {name}", as_service=True).parse_args(context.args)
    check_flags(args)
    if args.listen not in ONLY_HERE and args.password_file is None:
        raise RequestError(
            "other machines can reach --listen: it needs a password, and a service has it from a file",
            code="listen_needs_password",
            field="--listen",
            got=args.listen,
            try_instead="--password-file FILE",
        )
    return args


def url_of(args: argparse.Namespace) -> str:
    """Where this machine reaches the page."""
    everywhere = args.listen in (*ONLY_HERE, ALL_ADDRESSES, "::")
    host = LOOPBACK if everywhere else args.listen.removeprefix("[").removesuffix("]")
    return f"http://{f'[{host}]' if ':' in host else host}:{args.port}/"


def file_texts(flags: Sequence[str]) -> Mapping[Path, str]:
    """The unit and the entry, for this Python, this folder and these flags; a text of "" is one that no entry can hold:
    a path that is not UTF-8, or with control characters."""
    unit, entry = places()
    webui = importlib.util.find_spec("webui")
    assert webui is not None and webui.origin is not None
    app, python = Path(webui.origin).absolute().with_name("app.py"), os.path.abspath(sys.executable)  # noqa: PTH100
    start = (*RUN, str(Path.cwd()), python, "-P", str(app), *flags, "--no-browser")
    opens = (*RUN, str(Path.cwd()), python, "-P", "-m", "turbodiff.cli", "service", "open", *flags)
    given = with_network()
    carried = {
        name: value
        for name, value in sorted(given.items())
        if value and (name in CARRIED or name.startswith("TURBODIFF_")) and name not in NOT_CARRIED
    }
    environment = "".join(f"Environment={for_systemd(f'{name}={value}', '$')}\n" for name, value in carried.items())
    command = " ".join(for_systemd(word, "$$") for word in start)
    texts = {unit: UNIT_TEXT.format(mark=MARK, command=command, environment=environment), entry: ""}
    icon = str(app.parent / "static" / "favicon.svg")
    if all(char.isprintable() or char in "\n\t\r" for char in "".join((*opens, icon))):
        # The Exec key: quoted, then "%" doubled, then escaped as any value
        escapes = str.maketrans({char: f"\\{char}" for char in '\\"`$'})
        quoted = " ".join(f'"{word.translate(escapes)}"' for word in opens).replace("%", "%%")
        terminal = "false" if systemctl("show-environment") is not None else "true"
        texts[entry] = ENTRY_TEXT.format(
            mark=MARK, command=for_desktop(quoted), icon=for_desktop(icon), terminal=terminal
        )
    return texts


@service_app.command("install", **PAGE_FLAGS)
def install_service(context: typer.Context) -> None:
    """Start the app with this user's session, and put it into the menu. Flags as of `serve`; again changes them."""
    args = read_flags(context, "install")
    dry_run = args.dry_run
    if os.geteuid() == 0 and os.environ.get("SUDO_USER"):
        raise TurbodiffError(
            "a service of this user is installed as this user",
            code="service_sudo",
            got="sudo",
            try_instead="turbodiff service install, without sudo",
        )
    texts, words = file_texts(as_flags(args)), Words(shell_language())
    for path in texts:
        if state_of(path) == "foreign":
            raise FileError(
                "a file of that name is not of `turbodiff service install`; it was left alone",
                code="service_foreign",
                got=path,
                try_instead=f"move {path} away",
            )
    answers = systemctl("show-environment") is not None
    for path, text in texts.items():
        kept = state_of(path) == "ours" and path.read_bytes() == text.encode()
        if not text:
            say(words("shell.no_entry", name=path.name))
        elif kept:
            say(words("shell.unchanged", path=path))
        elif dry_run:
            say(words("shell.would_write", path=path, text=text))
        else:
            try:
                with atomic_write(path) as part:
                    part.touch(0o600)  # a proxy's address may hold a password
                    part.write_text(text, "utf-8")
            except OSError as error:
                raise FileError(
                    "the file cannot be written",
                    code="output_unwritable",
                    got=f"{path}: {error.strerror}",
                    try_instead="$XDG_CONFIG_HOME and $XDG_DATA_HOME, where this user can write",
                ) from None
            say(words("shell.wrote", path=path))
    steps = (("daemon-reload",), ("enable", "--now", UNIT))
    for step in steps:
        line = f"systemctl --user {' '.join(step)}"
        if dry_run or not answers:
            say(words("shell.would_run" if answers else "shell.to_run", line=line))
        elif systemctl(*step) is None:
            raise TurbodiffError(
                "systemd did not start the service",
                code="service_refused",
                got=line,
                try_instead=f"systemctl --user status {UNIT}, journalctl --user -u {UNIT}",
            )
        else:
            say(words("shell.ran", line=line))
    if answers:
        say(words("shell.page_at", url=url_of(args), command=f"systemctl --user restart {UNIT}"))
        say(words("shell.linger", command="loginctl enable-linger"))


@service_app.command("uninstall")
def uninstall_service(dry_run: DryRun = False) -> None:
    """Stop the service and take away what `install` wrote; clips, queue and weights stay."""
    (unit, entry), words = places(), Words(shell_language())
    answers = systemctl("show-environment") is not None
    if state_of(unit) == "ours" and answers:
        done = "would_run" if dry_run else "failed_to_run" if systemctl("disable", "--now", UNIT) is None else "ran"
        say(words(f"shell.{done}", line=f"systemctl --user disable --now {UNIT}"))
    wanted = unit.parent / "default.target.wants" / UNIT  # what `enable` made, where systemd cannot take it away
    enabled = wanted.is_symlink() and wanted.readlink() in (unit, Path("..") / UNIT)
    for path in (*((wanted,) if enabled else ()), unit, entry):
        state = "ours" if path is wanted else state_of(path)
        if state == "ours":
            if not dry_run:
                path.unlink(missing_ok=True)
            say(words("shell.would_remove" if dry_run else "shell.removed", path=path))
        else:
            say(words("shell.not_there" if state == "absent" else "shell.left_alone", path=path))
    if answers and not dry_run:
        systemctl("daemon-reload")


@service_app.command("status")
def service_status() -> None:
    """What is installed, whether systemd runs it, whether the page answers; ends with 3 where it does not."""
    words = Words(shell_language())
    for path in places():
        say(f"{words(f'shell.is_{state_of(path)}'):10} {path}")
    unit = places()[0]
    text = unit.read_text("utf-8") if state_of(unit) == "ours" else ""
    told = [word.replace("%%", "%") for word in re.findall(r'"(--port" "\d+|--listen=[^"]*)"', text)]
    url = url_of(page_parser(as_service=True).parse_args([part for word in told for part in word.split('" "')]))
    active = systemctl("show", "--property=ActiveState", "--value", UNIT)
    say(f"systemd    {words('shell.systemd_silent') if active is None else active}")
    up = page_answers(url)
    say(f"{words('shell.page'):10} {url} {words('shell.page_answers' if up else 'shell.page_silent')}")
    if not up:
        raise typer.Exit(NOT_RUNNING)


def page_answers(url: str) -> bool:
    """Whether our page is at this address of this machine."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}healthz", timeout=2) as answer:
            return bool(answer.read(64).strip() == b'{"ok":true}')
    except (OSError, ValueError):
        return False


@service_app.command("open", **PAGE_FLAGS)
def open_page(context: typer.Context) -> None:
    """Open the page in a browser; what does not run yet is started: the service, else the app in this terminal."""
    args = read_flags(context, "open")
    url = url_of(args)
    if not page_answers(url):
        if state_of(places()[0]) != "ours" or systemctl("start", UNIT) is None:
            from turbodiff.cli.queue import serve

            serve(context)
        end_s = time.monotonic() + START_WAIT_S
        while not page_answers(url):
            if time.monotonic() > end_s:
                raise TurbodiffError(
                    "the page does not answer",
                    code="service_silent",
                    got=f"{url} after {START_WAIT_S:g} s",
                    try_instead=f"systemctl --user status {UNIT}, or another --port",
                )
            time.sleep(POLL_S)
    webbrowser.open(url)


__all__ = ["service_app"]
