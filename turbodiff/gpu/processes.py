"""Processes: what names one for ever, and who holds the memory of a card.

Nothing in here signals anybody. A line to copy is offered for programs of the same user only; never for the
desktop, and for a browser the advice is to close its video tabs.
"""

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict

from turbodiff.gpu.probe import CardSample, Sample

HolderKind = Literal["worker", "leftover", "same_user", "browser", "desktop", "other_user", "unaccounted"]

X11 = ("xorg", "x", "xwayland", "xfwm4", "compiz", "gdm")
DESKTOP = (*X11, "gnome-shell", "kwin_x11", "kwin_wayland", "plasmashell", "mutter", "cinnamon", "sway", "weston")
BROWSERS = ("chrome", "chromium", "firefox", "firefox-bin", "msedge", "brave", "opera", "vivaldi-bin")
IDLE_SHARE = 0.02  # of one core over its whole life
COMMAND_CHARS = 160
OVERCOUNT = 1.1  # sums above this share of what is used are not believed (old drivers garble the list)
MAX_PID = 1 << 22  # the kernel's limit on 64-bit machines, proc(5); garbled lists hold larger ones
EMPTY_LIST_BYTES = 1 << 30  # an empty list beside more used memory is a container's or WSL's, not the truth
HOST_COMMAND = "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv"
DEVICES = ("/dev/nvidia", "/dev/dxg")


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), field 22): with the pid it names one process.

    None when it is gone.
    """
    try:
        boot_s = psutil.boot_time()  # psutil adds it to the field; the difference is the field again
        return round((psutil.Process(pid).create_time() - boot_s) * os.sysconf("SC_CLK_TCK"))
    except (psutil.Error, ValueError):
        return None


def is_running(pid: int, ticks: int) -> bool:
    """Whether the process that started then still runs; a zombie does not."""
    try:
        return start_ticks(pid) == ticks and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


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
        own_pids: our worker. leftover_pids: workers of an earlier run (supervisor/ownership.py).
    """
    found = []
    for card in sample.cards:
        if card.state != "ok":
            continue
        believed, used = _believed(card), card.used_bytes
        by_pid = dict.fromkeys(_same_user_pids()) if believed is None else believed
        rows = [_holder(pid, n_bytes, own_pids, leftover_pids) for pid, n_bytes in by_pid.items()]
        rows.sort(key=lambda row: -(row.bytes or 0))
        known = sum(row.bytes or 0 for row in rows)
        if used is not None and used > known:
            rows.append(Holder(kind="unaccounted", bytes=used - known))
        listed = believed is not None
        command = "" if listed else HOST_COMMAND
        found.append(
            CardHolders(
                uuid=card.uuid, name=card.name, used_bytes=used, listed=listed, rows=tuple(rows), host_command=command
            )
        )
    return tuple(found)


def _believed(card: CardSample) -> dict[int, int | None] | None:
    """Bytes by pid, a process on both lists once; None for a list that is absent or cannot be true.

    In a container the pids are the host's: none of them exists here, and the list is as good as absent.
    """
    if card.processes is None:
        return None
    total, used = card.total_bytes, card.used_bytes
    by_pid: dict[int, int | None] = {}
    for process in card.processes:
        seen = by_pid.get(process.pid)
        by_pid[process.pid] = process.bytes if seen is None else max(seen, process.bytes or 0)
    if not by_pid:
        return {} if not used or used < EMPTY_LIST_BYTES else None
    real = {
        pid: n_bytes
        for pid, n_bytes in by_pid.items()
        if 0 < pid <= MAX_PID and psutil.pid_exists(pid) and (n_bytes is None or total is None or n_bytes <= total)
    }
    known = sum(n_bytes or 0 for n_bytes in real.values())
    return real if real and (used is None or known <= OVERCOUNT * used) else None


def _holder(pid: int, n_bytes: int | None, own_pids: Collection[int], leftover_pids: Collection[int]) -> Holder:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            name, same_user = process.name(), process.uids().real == os.getuid()
            age_s = max(0.0, time.time() - process.create_time())
            busy_s = sum(process.cpu_times()[:2])
            command = " ".join(process.cmdline())[:COMMAND_CHARS] if same_user else ""
    except psutil.Error:
        return Holder(kind="other_user", bytes=n_bytes, pid=pid)
    kind: HolderKind
    if pid in own_pids:
        kind = "worker"
    elif pid in leftover_pids:
        kind = "leftover"
    elif name.lower() in DESKTOP:
        kind = "desktop"
    elif not same_user:
        kind = "other_user"
    else:
        kind = "browser" if name.lower() in BROWSERS else "same_user"
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


def _same_user_pids() -> Iterator[int]:
    """Processes of this user that have a GPU device open; for places where NVML lists none."""
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid():
                continue
            links = (link for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.is_symlink())
            if any(str(link.readlink()).startswith(DEVICES) for link in links):
                yield process.pid
        except (psutil.Error, OSError):
            continue
