"""Processes: who holds the memory of a card.

Nothing in here signals anybody. A line to copy is offered for programs of the same user only; never for the
desktop, and for a browser the advice is to close its video tabs.
"""

import contextlib
import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict

from turbodiff.gpu.probe import SAMPLER, CardSample, Sample

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
# what a program has open that can hold memory of a card: its node, by minor number; unified memory, for all cards; the
# way through the host under WSL. /dev/nvidiactl alone holds none. A DRM node counts where its driver says NVIDIA.
DEVICE = re.compile(r"/dev/(?:nvidia(?P<minor>\d+)|nvidia-uvm|dxg|(?P<drm>dri/(?:card|renderD)\d+))")
DRM_DRIVER = re.compile(r"^drm-driver:\s*(?:nvidia|nouveau)", re.M)
# DRM usage stats of the kernel (Documentation/gpu/drm-usage-stats.rst): no unit is bytes, `memory` the older name of
# `resident`. NVIDIA's own driver publishes none of them, nouveau does.
DRM_CLIENT = re.compile(r"^drm-client-id:\s*(\d+)", re.M)
DRM_BYTES = re.compile(r"^drm-(?:resident|memory)-vram\d*:\s*(\d+)\s*(KiB|MiB|)", re.M)
UNITS_BYTES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}


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

    Where NVML keeps no list, or knows no card, the rows are this user's programs that have a GPU open.

    Args:
        own_pids: our worker. leftover_pids: workers of an earlier run (supervisor/ownership.py).
    """
    cards = [card for card in sample.cards if card.state == "ok"]
    believed = [_believed(card) for card in cards]
    opened = _opened_by_same_user() if None in believed or not cards else {}
    found = []
    for card, listed in zip(cards, believed, strict=True):
        by_pid, used = listed, card.used_bytes
        if by_pid is None:
            by_pid = {pid: None for pid in (*own_pids, *leftover_pids) if psutil.pid_exists(pid)}
            for pid, (minors, n_bytes) in opened.items():
                if not minors or card.minor is None or card.minor in minors:
                    by_pid[pid] = n_bytes if len(cards) == 1 else None
                else:
                    by_pid.pop(pid, None)  # ours, on another card
        rows = [_holder(pid, n_bytes, own_pids, leftover_pids) for pid, n_bytes in by_pid.items()]
        rows.sort(key=lambda row: -(row.bytes or 0))
        known = sum(row.bytes or 0 for row in rows)
        if used is not None and used > known:
            rows.append(Holder(kind="unaccounted", bytes=used - known))
        command = "" if listed is not None else HOST_COMMAND
        found.append(
            CardHolders(
                uuid=card.uuid, name=card.name, used_bytes=used, listed=not command, rows=tuple(rows),
                host_command=command,
            )
        )  # fmt: skip
    if opened and not cards:  # the driver's library is broken or missing, and programs use the card all the same
        rows = [_holder(pid, n_bytes, own_pids, leftover_pids) for pid, (_, n_bytes) in opened.items()]
        nameless = CardHolders(
            uuid="", name="", used_bytes=None, listed=False, rows=tuple(rows), host_command=HOST_COMMAND
        )
        return (nameless,)
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


def _opened_by_same_user() -> dict[int, tuple[frozenset[int], int | None]]:
    """By pid, for programs of this user that have a GPU open: minor numbers of its cards (none: any card), and the
    bytes that its DRM descriptors own up to. Our own sampler is left out: it holds nothing."""
    found = {}
    for process in psutil.process_iter():
        minors, clients, uses = set(), dict[str, int](), False
        try:
            if process.uids().real != os.getuid() or str(SAMPLER) in process.cmdline():
                continue
            home = Path(psutil.PROCFS_PATH) / str(process.pid)
            links = list((home / "fd").iterdir())
        except (psutil.Error, OSError):  # it ended meanwhile, or hides what it has open
            continue
        for link in links:
            with contextlib.suppress(OSError):  # closed meanwhile
                device = DEVICE.fullmatch(str(link.readlink()))
                told = (home / "fdinfo" / link.name).read_text("ascii", "replace") if device else ""
                if device is None or (device["drm"] and not DRM_DRIVER.search(told)):
                    continue
                uses = True
                minors |= {int(device["minor"])} if device["minor"] else set()
                if sizes := DRM_BYTES.findall(told):  # descriptors of one client share what it holds
                    client = DRM_CLIENT.search(told)
                    clients[client[1] if client else link.name] = sum(int(n) * UNITS_BYTES[unit] for n, unit in sizes)
        if uses:
            found[process.pid] = frozenset(minors), sum(clients.values()) if clients else None
    return found
