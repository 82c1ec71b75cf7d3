"""Host memory that the kernel will really grant: RAM, every memory limit above this process, and what is used in them.

A limit may stand on this process's own control group or on any group above it: a container, a systemd slice or scope
(MemoryMax, MemoryHigh), a SLURM job. Sources: Linux admin-guide/cgroup-v2 ("memory.max", "memory.high",
"memory.current", "memory.stat") and cgroup-v1/memory; proc(5), mountinfo; slurm sbatch(1), SLURM_MEM_PER_NODE.
"""

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

from turbodiff.spec.files import mount_fields, proc_lines
from turbodiff.spec.numbers import MIB

ROOT = Path("/")
# per version of control groups: files that hold a limit, the file that holds what is used, lines of memory.stat that
# count what the kernel takes back before it refuses (in v1 those of the groups below too)
LIMIT_FILES = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
USED_FILE = {1: "memory.usage_in_bytes", 2: "memory.current"}
CACHE_LINES = {
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}
OWN_PAGES = re.compile(rb"^Rss(?:Anon|Shmem):\s*(\d+) kB$", re.MULTILINE)  # lines of /proc/PID/status
# a limit that lies above what this process can see, v1 only
ABOVE_LINE = "hierarchical_memory_limit"
SLURM_NODE, SLURM_PER_CPU, SLURM_CPUS = "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"  # MiB, MiB, -


class HostMemory(NamedTuple):
    """Bytes of host memory: what there is or may be used at most; what can be had now; what own processes hold alone,
    which is free again when their next job starts. `available + reclaimable` is never above `total`."""

    total_bytes: int
    available_bytes: int
    reclaimable_bytes: int = 0


class Limit(NamedTuple):
    """A memory limit above this process and what is used below it, page cache apart; where it stands, for people."""

    limit_bytes: int
    used_bytes: int
    place: str


def host_memory(own_pids: Collection[int] = (), root: Path = ROOT) -> HostMemory:
    """What this process may use: the tightest of the machine and of all limits above it.

    Args:
        own_pids: processes of ours whose memory counts as reclaimable.
        root: where /proc and /sys are.
    """
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit in limits(root):
        total = min(total, limit.limit_bytes)
        available = min(available, max(0, limit.limit_bytes - limit.used_bytes))
    own_bytes = sum(map(private_bytes, own_pids))
    return HostMemory(total, available, min(own_bytes, total - available))


def limits(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> tuple[Limit, ...]:
    """Every memory limit above this process that can be seen from here."""
    found = [limit for version, folder in _groups(root) for limit in _limits_of(version, folder)]
    told = (environment.get(name, "") for name in (SLURM_NODE, SLURM_PER_CPU, SLURM_CPUS))
    node, per_cpu, cpus = (int(text) if text.isdecimal() and len(text) < 13 else 0 for text in told)
    job_mib = node or per_cpu * cpus
    if job_mib:  # the job's own use stands in its control group, where the cluster has one
        found.append(Limit(job_mib * MIB, 0, SLURM_NODE))
    return tuple(found)


def _groups(root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's memory control groups, its own first, up to the mount point."""
    try:
        lines = proc_lines(root / "proc/self/cgroup")
        mounts = proc_lines(root / "proc/self/mountinfo")
    except OSError:
        return
    own: dict[int, str] = {}
    for line in lines:  # "4:memory:/path" in v1, "0::/path" in v2
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or "memory" in controllers.split(","):
            own[1 if controllers else 2] = path
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, kind = mount_fields(before), mount_fields(after)
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        if version not in own or (version == 1 and "memory" not in kind[2].split(",")):
            continue
        mounted_from, mounted_at = PurePosixPath(fields[3]), root / fields[4].lstrip("/")
        group = PurePosixPath(own[version])
        # in a container the path may be the host's, or lie outside what is mounted: then the mount point is its own
        below = group.relative_to(mounted_from) if group.is_relative_to(mounted_from) else PurePosixPath()
        folder = mounted_at / below if ".." not in below.parts else mounted_at
        while not folder.is_dir() and folder != mounted_at:
            folder = folder.parent
        yield version, folder
        while folder != mounted_at:
            folder = folder.parent
            yield version, folder


def _limits_of(version: int, folder: Path) -> Iterator[Limit]:
    """The limits that stand in one control group."""
    stat: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            stat[name] = int(value)
    used_bytes = max(0, (_number(folder / USED_FILE[version]) or 0) - sum(stat.get(x, 0) for x in CACHE_LINES[version]))
    for name in LIMIT_FILES[version]:
        if (limit_bytes := _number(folder / name)) is not None:
            yield Limit(limit_bytes, used_bytes, str(folder / name))
    if version == 1 and ABOVE_LINE in stat:
        yield Limit(stat[ABOVE_LINE], used_bytes, f"{folder / 'memory.stat'}: {ABOVE_LINE}")


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none ("max", no file, no right to read it)."""
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def private_bytes(pid: int) -> int:
    """Bytes that a process holds and no file does: its own pages, and shared ones such as page-locked copies, which the
    CUDA driver makes of shared memory (RssShmem of /proc/PID/status, proc(5)). Mapped files count as available
    already. 0 when it is gone."""
    with contextlib.suppress(OSError, ValueError):
        return 1024 * sum(map(int, OWN_PAGES.findall(Path(f"/proc/{pid}/status").read_bytes())))
    return 0
