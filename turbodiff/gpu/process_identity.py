"""What names a process for ever: its number alone is given to another one day."""

import hashlib
import os
from pathlib import Path

import psutil

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")  # a link to "pid:[4026531836]", pid_namespaces(7)


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), field 22): with the pid it names one process.

    None when it is gone.
    """
    try:
        boot_s = psutil.boot_time()  # psutil adds it to the field; the difference is the field again
        return round((psutil.Process(pid).create_time() - boot_s) * os.sysconf("SC_CLK_TCK"))
    except (psutil.Error, ValueError):
        return None


def boot_id() -> str:
    """Random id of this boot, "" where the kernel does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def process_mark(pid: int) -> str:
    """What names a process for ever, for file names: its number, its start, and the boot and the PID namespace that
    both count in, hashed. The number alone where one of these is not to be had."""
    try:
        namespace = PID_NAMESPACE.readlink()
    except OSError:
        namespace = Path()
    boot, ticks = boot_id(), start_ticks(pid)
    if not boot or not namespace.name or ticks is None:
        return str(pid)
    return f"{pid}-{ticks}-{hashlib.sha256(f'{boot} {namespace}'.encode()).hexdigest()[:16]}"


def is_running(pid: int, ticks: int) -> bool:
    """Whether the process that started then still runs; a zombie does not."""
    try:
        return start_ticks(pid) == ticks and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_alive(pid: int) -> bool:
    """Whether some process of that number still runs; a zombie, which its parent has not asked for yet, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
