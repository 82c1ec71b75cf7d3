"""The environment of our own processes: which of its variables they may see, and where Python looks for modules.

Nothing but downloads uses the network, so only downloads see the variables about it: HTTP libraries read them when
they are imported, and one bad value ends the process (A1111 8026, Langchain-Chatchat 605). No library is imported but
by `usable_network`, which asks httpx.
"""

import contextlib
import ipaddress
import json
import os
import pwd
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy", "no_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSLKEYLOGFILE")
NETWORK = (*PROXIES, *(name.upper() for name in PROXIES), *CERTIFICATES)
KEPT = "TURBODIFF_NETWORK"  # those variables as one JSON object, for a download that a child starts
PASSWORD = "TURBODIFF_PASSWORD"
WEBHOOK = "TURBODIFF_WEBHOOK"
ENHANCER_KEY = "TURBODIFF_ENHANCER_KEY"
RUN_ID = "TURBODIFF_RUN_ID"  # of the supervisor's run, in the environment of every child of it
BEAT_FD = "TURBODIFF_BEAT_FD"  # a pipe on which the supervisor says that it turns (webui/keeper.py)
LAST_END = "TURBODIFF_LAST_END"  # how the supervisor before this one ended
START_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: a supervisor whose state folder was removed or damaged
HOST = re.compile(r"\*|[\w.*-]+(:\d+)?", re.ASCII)  # a name, a part of one, perhaps with a port


class BadSetting(NamedTuple):
    """A variable that a download cannot use: its name, its value, what it should be."""

    name: str
    value: str
    expected: str


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the page, of a worker, of every other Python of ours.

    The folder it was started in is no place for modules (PYTHONSAFEPATH; a `queue.py` there would be imported by the
    standard library), text is UTF-8, network variables are put aside, those of other Gradio programs are left out.
    """
    given = dict(os.environ if environment is None else environment)
    network = {name: given.pop(name) for name in NETWORK if name in given}
    others = [name for name in given if name.startswith("GRADIO_") and name != "GRADIO_ANALYTICS_ENABLED"]
    for name in (*others, "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS"):  # the last two are uvicorn's
        given.pop(name, None)
    if network:
        given[KEPT] = json.dumps(network)
    fixed = {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    return {**given, **fixed, "PYTHONPATH": module_path(given.get("PYTHONPATH", ""))}


def module_path(given: str) -> str:
    """PYTHONPATH for a child: this package's folder unless it is installed, then what was given, less the folder in
    which we were started: an empty entry means that one, and `PYTHONPATH=$PYTHONPATH:/x` makes one by accident."""
    root = Path(__file__).resolve().parents[2]
    own = [] if root.name in ("site-packages", "dist-packages") else [str(root)]
    started_in = current_folder()
    others = [entry for entry in given.split(os.pathsep) if entry and Path(entry).resolve() != started_in]
    return os.pathsep.join(dict.fromkeys([*own, *others]))


def current_folder() -> Path:
    """The folder that this process is in. One that was removed meanwhile is left for /: nothing relative leads anywhere
    from it, and every look at a relative path would fail."""
    try:
        return Path.cwd()
    except OSError:
        os.chdir("/")
        return Path("/")


def check_folder() -> None:
    """Check that the folder that a person starts us in is still there.

    Raises:
        FileError: code folder_gone.
    """
    from turbodiff.spec.errors import FileError

    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        raise FileError(
            "the folder that this was started in cannot be used",
            code="folder_gone",
            got=error.strerror,
            expected="a folder that exists",
            try_instead="cd to another folder, or cd . to one that was made anew",
        ) from None


def with_network(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child that downloads: the network variables are back."""
    given = dict(os.environ if environment is None else environment)
    try:
        kept = json.loads(given.pop(KEPT, "{}"))
    except ValueError:
        return given
    return given | ({str(name): str(value) for name, value in kept.items()} if isinstance(kept, dict) else {})


def usable_network(environment: Mapping[str, str]) -> tuple[dict[str, str], BadSetting | None]:
    """The network variables as httpx and Python's ssl can read them, and the first that these refuse when asked.

    `socks://` (what desktops write for any SOCKS proxy) is SOCKS 5; a bare `host:port` is http; networks in NO_PROXY
    (`::1/128`, `10.0.0.0/8`), which httpx takes for addresses or refuses, are left out unless they are one address.
    """
    import ssl

    import httpx

    usable = {name: environment[name].strip() for name in NETWORK if environment.get(name, "").strip()}
    for name, value in list(usable.items()):
        kind, context = name.lower(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        expected = "a file of certificates, in PEM form" if name == "SSL_CERT_FILE" else "a file or folder that exists"
        if kind == "ftp_proxy" or (kind != name and kind in environment and kind in PROXIES):
            del usable[name]  # nobody asks for the first; of two spellings urllib takes the small one, be it empty
            continue
        try:
            if kind == "no_proxy":
                usable[name] = ",".join(filter(None, map(_exception, re.split(r"[\s,;]+", value))))
            elif kind in PROXIES:
                expected = "http://host:port or socks5://host:port"
                scheme, _, rest = value.partition("://") if "://" in value else ("http", "", value)
                usable[name] = f"{'socks5' if scheme.lower() == 'socks' else scheme.lower()}://{rest}"
                url = httpx.URL(usable[name])
                httpx.Client(proxy=url, trust_env=False, verify=context).close()
                url.host.encode("idna")  # the lookup of a name does that
                if not url.host or (url.port is not None and not 0 < url.port < 65536) or url.path not in ("", "/"):
                    return usable, BadSetting(name, value, expected)
            elif name == "SSLKEYLOGFILE":  # Python opens it for writing with each TLS context
                del usable[name]
                if Path(value).is_file() or not Path(value).exists():  # a pipe would wait for its reader
                    with contextlib.suppress(OSError, ValueError):
                        context.keylog_filename = value
                        usable[name] = value
            elif name == "SSL_CERT_DIR":  # a list, as OpenSSL reads it
                if not any(Path(folder).is_dir() for folder in value.split(os.pathsep)):
                    return usable, BadSetting(name, value, expected)
            elif not Path(value).is_file() and (name == "SSL_CERT_FILE" or not Path(value).is_dir()):
                return usable, BadSetting(name, value, expected)
            elif name == "SSL_CERT_FILE":
                context.load_verify_locations(value)
        except (OSError, ValueError, ImportError, httpx.InvalidURL):
            return usable, BadSetting(name, value, expected)
    return usable, None


def _exception(entry: str) -> str:
    """One entry of NO_PROXY that httpx can read; "" for none."""
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        with contextlib.suppress(UnicodeError):
            name = entry if entry.isascii() else entry.encode("idna").decode()
            return name if HOST.fullmatch(name) else ""
        return ""
    return str(network.network_address) if network.num_addresses == 1 else ""


def home_folder() -> Path:
    """$HOME, else the home of this user, else a folder of this user's below the temporary one: a container's user
    may have neither."""
    named = os.environ.get("HOME", "")
    if not named:
        try:
            named = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            named = ""
    return Path(named) if named else Path(tempfile.gettempdir()) / f"turbodiff-{os.getuid()}"


def expand(path: str | Path) -> Path:
    """The path with a leading `~` as the home folder; any other `~name` stays as it is."""
    path = Path(path)
    return home_folder().joinpath(*path.parts[1:]) if path.parts[:1] == ("~",) else path
