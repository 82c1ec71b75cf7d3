"""Who holds the memory of a card: our worker, one left by an earlier run, other programs, the desktop, nobody known.

Nothing in here signals anybody. A line to copy is offered for programs of the same user only; never for the
desktop, and for a browser the advice is to close its video tabs.
"""

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict

from turbodiff.gpu.probe import Sample

HolderKind = Literal["worker", "leftover", "same_user", "browser", "desktop", "other_user", "unaccounted"]

X11 = ("xorg", "x", "xwayland", "xfwm4", "compiz", "gdm")
DESKTOP = (*X11, "gnome-shell", "kwin_x11", "kwin_wayland", "plasmashell", "mutter", "cinnamon", "sway", "weston")
BROWSERS = ("chrome", "chromium", "firefox", "firefox-bin", "msedge", "brave", "opera", "vivaldi-bin")
IDLE_SHARE = 0.02  # of one core over its whole life
COMMAND_CHARS = 160
OVERCOUNT = 1.1  # sums above this share of what is used are not believed (old drivers garble the list)
MAX_PID = 1 << 22  # the kernel's limit on 64-bit machines, proc(5); garbled lists hold larger ones
HOST_COMMAND = "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv"
DEVICES = ("/dev/nvidia", "/dev/dxg")


class Holder(BaseModel):
    """One row of the table. `bytes`, `idle` None: unknown; `kill_line` is "" where there is none to offer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: HolderKind
    bytes: int | None = None
    pid: int | None = None
    name: str = ""
    command: str = ""
    age_s: float | None = None
    idle: bool | None = None
    kill_line: str = ""


class CardHolders(BaseModel):
    """The rows of one card; `listed` False where NVML keeps no list, then `host_command` is what to run on the host."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    uuid: str
    name: str
    used_bytes: int | None
    listed: bool
    rows: tuple[Holder, ...]
    host_command: str = ""


def holders(
    sample: Sample, own_pids: Collection[int] = (), leftover_pids: Collection[int] = ()
) -> tuple[CardHolders, ...]:
    """Every card of a sample with who holds its memory, largest first, the unaccounted rest last.

    Args:
        own_pids: our worker. leftover_pids: workers of an earlier run, as the jobs room recognised them.
    """
    return tuple(_card(card, own_pids, leftover_pids) for card in sample.cards if card["state"] == "ok")


def _card(card: dict[str, Any], own_pids: Collection[int], leftover_pids: Collection[int]) -> CardHolders:
    used = card["used_bytes"]
    believed = _believed(card)
    listed = believed is not None
    rows = [_row(pid, n_bytes, own_pids, leftover_pids) for pid, n_bytes in (believed or {}).items()]
    if not listed:
        rows = [_row(pid, None, own_pids, leftover_pids) for pid in _same_user_pids()]
    rows.sort(key=lambda row: -(row.bytes or 0))
    known = sum(row.bytes or 0 for row in rows)
    if used is not None and used > known:
        rows.append(Holder(kind="unaccounted", bytes=used - known))
    return CardHolders(
        uuid=card["uuid"],
        name=card["name"],
        used_bytes=used,
        listed=listed,
        rows=tuple(rows),
        host_command="" if listed else HOST_COMMAND,
    )


def _believed(card: dict[str, Any]) -> dict[int, int | None] | None:
    """Bytes by pid, a process on both lists once; None for a list that is absent or cannot be true.

    In a container the pids are the host's: none of them exists here, and the list is as good as absent.
    """
    if card["processes"] is None:
        return None
    total, used = card["total_bytes"], card["used_bytes"]
    by_pid: dict[int, int | None] = {}
    for process in card["processes"]:
        n_bytes, seen = process["bytes"], by_pid.get(process["pid"])
        by_pid[process["pid"]] = n_bytes if seen is None else max(seen, n_bytes or 0)
    if not by_pid:
        return {} if not used else _empty_list(used)
    real = {pid: n for pid, n in by_pid.items() if _exists(pid) and (n is None or total is None or n <= total)}
    known = sum(n or 0 for n in real.values())
    return real if real and (used is None or known <= OVERCOUNT * used) else None


def _exists(pid: int) -> bool:
    return 0 < pid <= MAX_PID and psutil.pid_exists(pid)


def _empty_list(used_bytes: int) -> dict[int, int | None] | None:
    """An empty list beside much used memory is a container's or WSL's; beside a little it is the truth."""
    return {} if used_bytes < 1 << 30 else None


def _row(pid: int, n_bytes: int | None, own_pids: Collection[int], leftover_pids: Collection[int]) -> Holder:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            name, same_user = process.name(), process.uids().real == os.getuid()
            age_s = max(0.0, time.time() - process.create_time())
            busy_s = sum(process.cpu_times()[:2])
            command = " ".join(process.cmdline())[:COMMAND_CHARS] if same_user else ""
    except psutil.Error:
        return Holder(kind="other_user", bytes=n_bytes, pid=pid)
    kind = _kind(pid, name, same_user, own_pids, leftover_pids)
    return Holder(
        kind=kind,
        bytes=n_bytes,
        pid=pid,
        name=name,
        command=command,
        age_s=age_s,
        idle=busy_s < IDLE_SHARE * age_s if age_s > 60 else None,
        kill_line=f"kill {pid}" if kind == "same_user" else "",
    )


def _kind(
    pid: int, name: str, same_user: bool, own_pids: Collection[int], leftover_pids: Collection[int]
) -> HolderKind:
    plain = name.lower()
    if pid in own_pids:
        return "worker"
    if pid in leftover_pids:
        return "leftover"
    if plain in DESKTOP:
        return "desktop"
    if not same_user:
        return "other_user"
    return "browser" if plain in BROWSERS else "same_user"


def _same_user_pids() -> Iterator[int]:
    """Processes of this user that have a GPU device open; for places where NVML lists none."""
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid() and _has_device_open(process.pid):
                yield process.pid
        except (psutil.Error, OSError):
            continue


def _has_device_open(pid: int) -> bool:
    links = (link for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    return any(str(link.readlink()).startswith(DEVICES) for link in links)
