"""Where the page listens: sockets of an address or a name, and a true sentence for each reason that there are none.

Beyond the standard library only turbodiff.spec: the launcher uses it before anything else is loaded.
"""

import contextlib
import errno
import ipaddress
import socket
from pathlib import Path

from turbodiff.spec.errors import PortInUseError, RequestError, TurbodiffError
from turbodiff.spec.page_flags import ALL_ADDRESSES, LOOPBACK, check_port

ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # no such address, no IPv6 at all
FIRST_FREE_PORT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")  # ip(7); 1024 where it is not told
Place = tuple[socket.AddressFamily, tuple[str, int]]


def is_loopback(listen: str) -> bool:
    """Whether only this machine reaches an address or name of `--listen`; False for what cannot be resolved."""
    with contextlib.suppress(TurbodiffError):
        return all(ipaddress.ip_address(where[0].partition("%")[0]).is_loopback for _, where in _places(listen, 1))
    return False


def listening_sockets(listen: str, port: int) -> list[socket.socket]:
    """One bound socket per address of `listen`; `::` also takes IPv4. Close them, or serve with them.

    Raises:
        PortInUseError: another program holds the port; it is named where the system tells.
        RequestError: no such port, name or address here, or no right to it.
    """
    check_port(port)
    made: list[socket.socket] = []
    with contextlib.ExitStack() as on_failure:
        places = _places(listen, port)
        for number, (family, where) in enumerate(places, 1):
            try:
                sock = on_failure.enter_context(socket.socket(family, socket.SOCK_STREAM))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(where[0] != "::"))
                sock.bind(where)
            except OSError as error:
                if error.errno in ABSENT and (made or number < len(places)):
                    continue  # "localhost" on a machine without IPv6: its other address does
                raise _refused(error, listen, port) from None
            made.append(sock)
        on_failure.pop_all()
    return made


def reachable_at(listen: str) -> str:
    """The address at which this machine reaches a page that listens there."""
    if listen in ("", ALL_ADDRESSES, "::"):
        return LOOPBACK
    with contextlib.suppress(TurbodiffError):
        return _places(listen, 1)[0][1][0]
    return listen


def url_of(address: str, port: int, root_path: str = "") -> str:
    """The address of the page for people; IPv6 in brackets."""
    return f"http://{f'[{address}]' if ':' in address else address}:{port}{root_path}"


def _places(listen: str, port: int) -> list[Place]:
    """The addresses that a name or address stands for.

    Raises:
        RequestError: none.
    """
    name = listen.strip().removeprefix("[").removesuffix("]")
    try:
        if not name:
            raise OSError("the name is empty")
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RequestError(
            "there is no such name or address", code="address_unknown", field="--listen",
            got=f"{listen} ({getattr(error, 'strerror', None) or error})", expected="an address or name",
            try_instead="--listen alone serves every address",
        ) from None  # fmt: skip
    places = {where: family for family, _, _, _, where in found}
    return [(family, where) for where, family in places.items()]  # type: ignore[misc]


def _refused(error: OSError, listen: str, port: int) -> TurbodiffError:
    """The sentence for a socket that the system refuses (bind(2), socket(2))."""
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"port {port} is taken", code="port_in_use", field="--port", got=_port_holder(port) or error.strerror,
            try_instead=f"--port {port + 1 if port < 65535 else 7860}",
        )  # fmt: skip
    if error.errno in (errno.EACCES, errno.EPERM):
        first = FIRST_FREE_PORT.read_text("ascii").strip() if FIRST_FREE_PORT.exists() else "1024"
        return RequestError(
            f"port {port} needs a right that this user lacks", code="port_forbidden", field="--port", got=port,
            expected=f"{first} or above", try_instead="--port 7860, and a reverse proxy for a lower one",
        )  # fmt: skip
    if error.errno in ABSENT:
        return RequestError(
            "this machine does not have that address", code="address_absent", field="--listen", got=listen,
            expected=", ".join(own_addresses()), try_instead="--listen alone serves every address",
        )  # fmt: skip
    return RequestError(
        "the system refuses to listen there", code="cannot_listen", field="--listen",
        got=f"{listen}:{port}: {error.strerror or error}", try_instead="--listen alone serves every address",
    )  # fmt: skip


def own_addresses() -> list[str]:
    """The IP addresses of this machine's interfaces."""
    import psutil

    found = [entry for entries in psutil.net_if_addrs().values() for entry in entries]
    return sorted({e.address for e in found if e.family in (socket.AF_INET, socket.AF_INET6)})


def own_names() -> set[str]:
    """Names by which a network may know this machine: its host name, without its domain, and as mDNS writes it."""
    name = socket.gethostname().lower().rstrip(".")
    short = name.partition(".")[0]
    return {name, short, f"{short}.local"} if short else set()


def _port_holder(port: int) -> str:
    """The program that listens on a port: "python webui/app.py (pid 4211)"; "" where the system does not tell."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                command = " ".join(psutil.Process(connection.pid).cmdline())[:80] if connection.pid else ""
                return f"{command} (pid {connection.pid})" if connection.pid else ""
    return ""
