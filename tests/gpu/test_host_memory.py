"""Memory limits of containers, systemd and SLURM: fake /proc and /sys trees, and a real control group where allowed."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from turbodiff.gpu import host_memory
from turbodiff.gpu.host_memory import limits
from turbodiff.plan.hardware import Machine
from turbodiff.spec.numbers import GIB, MIB

V2 = "30 24 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "31 24 0:27 {root} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A function that makes the /proc and /sys of a machine: cgroup lines, mounts, and files by path."""
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)

    def make(cgroup: str, mounts: str, **files: str | int) -> Path:
        proc = tmp_path / "proc/self"
        proc.mkdir(parents=True)
        (proc / "cgroup").write_text(cgroup)
        (proc / "mountinfo").write_text(mounts)
        for path, text in files.items():
            file = tmp_path / "sys/fs/cgroup" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return make


def left(root: Path) -> int:
    """What the tightest limit still grants, GiB."""
    return min(limit.limit_bytes - limit.used_bytes for limit in limits(root)) // GIB


def test_a_container_of_32_gib_with_28_in_use_budgets_at_most_4(tree, monkeypatch):
    memory = type("Memory", (), {"total": 128 * GIB, "available": 100 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    files = {"memory.max": 32 * GIB, "memory.current": 28 * GIB, "memory.stat": "anon 1\ninactive_file 0"}
    found = host_memory.host_memory(root=tree("0::/\n", V2.format(root="/"), **files))
    assert (found.total_bytes, found.available_bytes) == (32 * GIB, 4 * GIB)
    machine = Machine(ram_available_bytes=found.available_bytes, ram_total_bytes=found.total_bytes)
    assert machine.host_budget_bytes <= 4 * GIB


def test_own_memory_is_credited_once_and_never_above_the_limit(tree, monkeypatch):
    memory = type("Memory", (), {"total": 128 * GIB, "available": 100 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(host_memory, "private_bytes", lambda pid: 14 * GIB * pid)
    root = tree("0::/\n", V2.format(root="/"), **{"memory.max": 32 * GIB, "memory.current": 20 * GIB})
    assert host_memory.host_memory([1], root).reclaimable_bytes == 14 * GIB
    assert host_memory.host_memory([2], root) == (32 * GIB, 12 * GIB, 20 * GIB)


def test_page_cache_in_a_group_is_not_in_use(tree):
    stat = f"anon {3 * GIB}\nfile {20 * GIB}\ninactive_file {15 * GIB}\nactive_file {5 * GIB}"
    files = {"memory.max": 32 * GIB, "memory.current": 23 * GIB, "memory.stat": stat}
    assert left(tree("0::/\n", V2.format(root="/"), **files)) == 29


@pytest.mark.parametrize(
    ("path", "files", "grants_gib"),
    [
        ("/user.slice/user-1000.slice/app.slice/page.scope", {"user.slice/user-1000.slice/memory.max": 12 * GIB}, 12),
        ("/user.slice/user-1000.slice/app.slice/page.scope", {"user.slice/user-1000.slice/memory.high": 9 * GIB}, 9),
        (
            "/system.slice/slurmstepd.scope/job_7/step_0/user/task_0",
            {
                "system.slice/slurmstepd.scope/job_7/memory.max": 24 * GIB,
                "system.slice/slurmstepd.scope/job_7/memory.current": 5 * GIB,
                "system.slice/slurmstepd.scope/job_7/step_0/user/memory.max": "max",
            },
            19,
        ),
        (
            "/kubepods.slice/pod1/box",
            {"kubepods.slice/memory.max": 64 * GIB, "kubepods.slice/memory.current": 61 * GIB,
             "kubepods.slice/pod1/box/memory.max": 16 * GIB, "kubepods.slice/pod1/box/memory.current": GIB},
            3,
        ),
    ],
    ids=["systemd MemoryMax", "systemd MemoryHigh", "SLURM", "a full node"],
)  # fmt: skip
def test_the_tightest_of_all_groups_above_counts(tree, path, files, grants_gib):
    root = tree(f"0::{path}\n", V2.format(root="/"), **{f"{path[1:]}/memory.stat": "anon 0", **files})
    assert left(root) == grants_gib


def test_a_job_of_slurm_under_version_1(tree):
    path = "/slurm/uid_1000/job_9/step_0/task_0"
    files = {f"memory{path}/memory.limit_in_bytes": 9223372036854771712,
             "memory/slurm/uid_1000/job_9/memory.limit_in_bytes": 48 * GIB,
             "memory/slurm/uid_1000/job_9/memory.usage_in_bytes": 40 * GIB,
             "memory/slurm/uid_1000/job_9/memory.stat": f"total_inactive_file {10 * GIB}"}  # fmt: skip
    assert left(tree(f"4:cpu:/\n11:memory:{path}\n", V1.format(root="/"), **files)) == 18


def test_a_container_that_sees_only_its_own_group_of_version_1(tree):
    """The path is the host's, and what is mounted begins at it; a limit above it shows in memory.stat alone."""
    files = {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 2 * GIB,
             "memory/memory.stat": f"hierarchical_memory_limit {10 * GIB}"}  # fmt: skip
    assert left(tree("5:memory:/docker/abc\n", V1.format(root="/docker/abc"), **files)) == 8


def test_a_path_outside_the_namespace_is_the_mount_point(tree):
    files = {"memory.max": 6 * GIB}
    assert left(tree("0::/../../other\n", V2.format(root="/"), **files)) == 6
    assert limits(Path("/nowhere")) == ()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("with space", b"with\\040space"),
        ("tab\tand\\", b"tab\\011and\\134"),
        ("\udcff\udcfe", b"\xff\xfe"),  # no UTF-8
        ("樱花", "樱花".encode()),
        ("nbsp\xa0\u2028line", "nbsp\xa0\u2028line".encode()),
        ("#hash", b"\\043hash"),
    ],
    ids=["space", "tab", "bytes", "Chinese", "white", "hash"],
)
def test_groups_and_mounts_of_any_name_are_found(tree, name, written):
    """Mount points and roots are escaped by the kernel (seq_path), the path of a process's group is not."""
    own = b"0::/" + os.fsencode(name) + b"/job: 1\r\n"
    mount = b"30 24 0:26 /" + written + b" /sys/fs/cgroup/" + written + b" rw shared:9 - cgroup2 none rw\n"
    files = {f"{name}/job: 1\r/memory.max": 7 * GIB, f"{name}/memory.max": 9 * GIB}
    root = tree("", "", **files)
    (root / "proc/self/cgroup").write_bytes(own)
    (root / "proc/self/mountinfo").write_bytes(
        b"bad line\n1 2 3\n" + b"29 24 0:9 / /mnt/\xff rw - ext4 \xfe rw\n" + mount
    )
    assert sorted(limit.limit_bytes // GIB for limit in limits(root)) == [7, 9]


def test_what_slurm_granted_is_a_limit_also_without_control_groups(tree):
    root = tree("", "")
    assert limits(root, {"SLURM_MEM_PER_NODE": "32768"})[0].limit_bytes == 32 * GIB
    assert limits(root, {"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "8"})[0].limit_bytes == 16 * GIB
    for odd in ("all", "", "9" * 5000, "-1", "4G"):
        assert limits(root, {"SLURM_MEM_PER_NODE": odd}) == ()
        assert limits(root, {"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": odd}) == ()
        assert limits(root, {"SLURM_MEM_PER_CPU": odd, "SLURM_CPUS_ON_NODE": "8"}) == ()
    assert limits(root, {"SLURM_MEM_PER_CPU": "1024"}) == ()


GROWN = """
import mmap, os, pathlib, sys
from turbodiff.gpu.host_memory import private_bytes
size, file = 64 << 20, pathlib.Path(sys.argv[1])
with file.open("wb") as part:
    for _ in range(64):
        part.write(b"y" * (1 << 20))
before = private_bytes(os.getpid())
shared = mmap.mmap(-1, size)
for _ in range(64):
    shared.write(b"x" * (1 << 20))
with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    assert mapped[:: mmap.PAGESIZE]
    print(private_bytes(os.getpid()) - before)
"""


def test_shared_memory_of_a_process_is_its_own_and_mapped_files_are_not(tmp_path):
    """Page-locked copies of CUDA are shared memory (RssShmem): here a shared map, and a file beside it; in a process of
    its own, where nothing else comes or goes."""
    ran = subprocess.run([sys.executable, "-c", GROWN, tmp_path / "weights"], capture_output=True, text=True)
    assert 60 * MIB < int(ran.stdout) < 100 * MIB, ran.stderr
    assert host_memory.private_bytes(1 << 22) == 0


INSIDE = """
import json, sys
from turbodiff.gpu.host_memory import host_memory
held = bytearray(b"x" * (128 << 20))
print(json.dumps(host_memory()))
"""


def test_a_real_control_group_is_read_from_inside(tmp_path):
    """A group made below our own (it needs the right to): its limit, and what its process holds, are what is told."""
    own = next((folder for version, folder in host_memory._groups(Path("/")) if version), None)
    folder = None if own is None else own / f"turbodiff-test-{os.getpid()}"
    version = 2 if own is not None and (own / "cgroup.controllers").exists() else 1
    limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
    try:
        assert folder is not None
        folder.mkdir()
        (folder / limit).write_text(str(GIB))
        join = f"echo $$ > {folder / 'cgroup.procs'} && exec {sys.executable} -c '{INSIDE}'"
        ran = subprocess.run(["sh", "-c", join], capture_output=True, text=True)
    except (OSError, AssertionError):
        pytest.skip("no right to make a control group")
    finally:
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.rmdir()
    if "Permission denied" in ran.stderr or not ran.stdout:
        pytest.skip(f"no right to join a control group: {ran.stderr[-200:]}")
    total, available, _ = json.loads(ran.stdout)
    assert total == GIB
    assert GIB - 400 * MIB < available < GIB - 128 * MIB
