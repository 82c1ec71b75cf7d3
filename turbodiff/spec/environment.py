"""The environment of our own processes: which of its variables they may see, and where Python looks for modules.

Nothing but downloads uses the network, so only downloads see the variables about it: HTTP libraries read them when
they are imported, and one bad value ends the process (A1111 8026, Langchain-Chatchat 605). Standard library only.
"""

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
HOST = re.compile(r"\*|[\w.*-]+(:\d+)?")  # a name, a part of one, perhaps with a port
SCHEMES = ("http", "https", "socks5", "socks5h")  # what httpx takes (0.28, _config.py)


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
    started_in = Path.cwd()
    others = [entry for entry in given.split(os.pathsep) if entry and Path(entry).resolve() != started_in]
    return os.pathsep.join(dict.fromkeys([*own, *others]))


def with_network(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child that downloads: the network variables are back."""
    given = dict(os.environ if environment is None else environment)
    try:
        kept = json.loads(given.pop(KEPT, "{}"))
    except ValueError:
        return given
    return given | ({str(name): str(value) for name, value in kept.items()} if isinstance(kept, dict) else {})


def usable_network(environment: Mapping[str, str]) -> tuple[dict[str, str], BadSetting | None]:
    """The network variables as httpx and Python's ssl can read them, and the first that nothing can be made of.

    `socks://` (what desktops write for any SOCKS proxy) is SOCKS 5; a bare `host:port` is http; networks in NO_PROXY
    (`::1/128`, `10.0.0.0/8`), which httpx takes for addresses or refuses, are left out unless they are one address.
    """
    usable = {name: environment[name].strip() for name in NETWORK if environment.get(name, "").strip()}
    for name, value in list(usable.items()):
        if name.lower() == "no_proxy":
            usable[name] = ",".join(filter(None, map(_exception, value.replace(" ", ",").split(","))))
        elif name.lower() in PROXIES:
            scheme, mark, rest = value.partition("://")
            scheme, rest = (scheme.lower(), rest) if mark else ("http", value)
            scheme = "socks5" if scheme == "socks" else scheme
            host, _, port = rest.rpartition("@")[2].rstrip("/").rpartition(":")
            if scheme not in SCHEMES or not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
                return usable, BadSetting(name, value, "http://host:port or socks5://host:port")
            usable[name] = f"{scheme}://{rest}"
        elif name == "SSLKEYLOGFILE":  # Python opens it for writing with each TLS context
            if not os.access(value if Path(value).exists() else Path(value).parent, os.W_OK):
                del usable[name]
        elif not (Path(value).is_dir() if name == "SSL_CERT_DIR" else Path(value).exists()):
            return usable, BadSetting(name, value, "a file or folder that exists, or not set")
    return usable, None


def _exception(entry: str) -> str:
    """One entry of NO_PROXY that httpx can read; "" for none."""
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return entry if HOST.fullmatch(entry) else ""
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
