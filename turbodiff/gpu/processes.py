"""What /proc says about a process; every answer has a value for "gone"."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, user and system, in seconds; 0 when it is gone (proc(5), fields 14 and 15)."""
    stat = _stat(pid)
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") if stat else 0.0


def process_state(pid: int) -> str:
    """R, S, D, T, Z of proc(5), or "" when it is gone."""
    stat = _stat(pid)
    return stat[0] if stat else ""


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), field 22): with the pid it names one process."""
    stat = _stat(pid)
    return int(stat[19]) if stat else None


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()  # the name in parentheses may hold anything


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (SigCgt of /proc/PID/status); without one it might die of it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
    return bool(masks) and bool(int(masks[0], 16) >> (number - 1) & 1)


def bytes_read(pid: int) -> int:
    """Bytes a process has read so far, files in the page cache included (rchar of /proc/PID/io); 0 if unknown."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines).get("rchar", 0))


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.05) -> bool:
    """Poll a condition; True as soon as it holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(every_s)
    return True
