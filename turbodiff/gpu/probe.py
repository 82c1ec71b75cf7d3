"""The machine as it is now, asked without torch and without ever waiting more than two seconds.

NVML is called by turbodiff/gpu/sample.py in a process of its own. `machine_now` takes one sample; `Probe` keeps a
sampler running and hands out the newest sample with its age. Nothing in here raises: what cannot be known is None.
"""

import json
import os
import platform
import select
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from turbodiff.plan.hardware import GpuFacts, GpuState, Machine, pretend

DEADLINE_S = 2.0
REAP_S = 0.2  # of it, for the end of a sampler that is stuck
SAMPLER = Path(__file__).with_name("sample.py")
PRETEND_VARIABLE = "TURBODIFF_PRETEND_VRAM"  # GiB


class Sample(NamedTuple):
    """What the sampler said: `cards` as JSON objects (see sample.py), `age_s` seconds since it said so."""

    state: GpuState
    error: str
    driver: str | None
    cards: tuple[dict[str, Any], ...]
    age_s: float = 0.0


def machine_now(deadline_s: float = DEADLINE_S, own_pids: frozenset[int] = frozenset()) -> Machine:
    """This machine now; never raises, never waits longer than `deadline_s`.

    Args:
        own_pids: processes whose memory, on cards and in RAM, is free again when the next job starts (our worker).

    TURBODIFF_PRETEND_VRAM (GiB) puts one card of that size in place of what is there.
    """
    return machine_from(take_sample(deadline_s), own_pids)


def take_sample(deadline_s: float = DEADLINE_S) -> Sample:
    """One sample; a sampler that does not answer in time is killed, not waited for, and the state is "hang"."""
    until_s = time.monotonic() + deadline_s - REAP_S
    child = _spawn()
    if child is None:
        return Sample("error", "the sampler did not start", None, ())
    line = _line_by(child, until_s)
    _end(child)
    return parse(line) if line else Sample("hang", f"NVML did not answer within {deadline_s:g} s", None, ())


def parse(line: bytes) -> Sample:
    """A sampler's line; an unreadable one is an error state, never an exception."""
    try:
        raw = json.loads(line)
        return Sample(raw["state"], raw["error"], raw["driver"], tuple(raw["cards"]))
    except (ValueError, KeyError, TypeError) as error:
        return Sample("error", f"unreadable sample: {error}", None, ())


def machine_from(sample: Sample, own_pids: frozenset[int] = frozenset()) -> Machine:
    """The machine behind a sample, with RAM, CPUs and versions; applies CUDA_VISIBLE_DEVICES and the pretended card."""
    cards = visible([card for card in sample.cards if card["state"] == "ok"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    memory = psutil.virtual_memory()
    machine = Machine(
        gpus=tuple(_gpu(card, index, own_pids) for index, card in enumerate(cards)),
        gpu_state=sample.state if cards or sample.state != "ok" else "none",
        gpu_error=sample.error,
        ram_total_bytes=_container_limit(memory.total),
        ram_available_bytes=min(memory.available, _container_limit(memory.total)),
        ram_reclaimable_bytes=sum(map(_private_bytes, own_pids)),
        cpu_count=len(os.sched_getaffinity(0)),
        driver=sample.driver,
        torch=_version("torch"),
        cudnn=_version("nvidia-cudnn-cu13") or _version("nvidia-cudnn-cu12"),
        wsl="microsoft" in platform.uname().release.lower(),
    )
    pretended = _pretended_gib()
    return pretend(machine, pretended) if pretended is not None else machine


def visible(cards: list[dict[str, Any]], devices: str | None) -> list[dict[str, Any]]:
    """The cards that CUDA will show, in its order, for a CUDA_VISIBLE_DEVICES, under CUDA_DEVICE_ORDER=PCI_BUS_ID.

    Indices count physical cards, "GPU-..." and "MIG-..." may be prefixes; the list ends at the first name that matches
    nothing (CUDA C++ Programming Guide, environment variables).
    """
    if devices is None:
        return cards
    chosen: list[dict[str, Any]] = []
    for name in (part.strip() for part in devices.split(",")):
        found = _named(cards, name)
        if found is None or found in chosen:
            break
        chosen.append(found)
    return chosen


class Probe:
    """A sampler kept running at `interval_s`; `latest` never blocks. A sampler that falls silent is replaced."""

    def __init__(self, interval_s: float = 1.0, deadline_s: float = DEADLINE_S) -> None:
        self.interval_s, self.deadline_s = interval_s, deadline_s
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._sample: Sample | None = None
        self._heard_s = self._started_s = 0.0

    def latest(self) -> Sample:
        """The newest sample with its age; state "hang" once nothing came for interval + deadline."""
        self._keep_running()
        self._drain()
        silent_s = time.monotonic() - max(self._heard_s, self._started_s)
        if silent_s > self.interval_s + self.deadline_s:
            self.stop()
            self._sample = Sample("hang", f"NVML silent for {silent_s:.0f} s", None, ())
        if self._sample is None:
            return Sample("hang", "no sample yet", None, (), age_s=silent_s)
        return self._sample._replace(age_s=time.monotonic() - self._heard_s)

    def stop(self) -> None:
        """End the sampler; a later `latest` starts another."""
        if self._child is not None:
            _end(self._child)
        self._child, self._buffer = None, b""

    def _keep_running(self) -> None:
        if self._child is None or self._child.poll() is not None:
            self.stop()
            self._child = _spawn("--watch", str(self.interval_s))
            self._started_s = time.monotonic()

    def _drain(self) -> None:
        if self._child is None or self._child.stdout is None:
            return
        while select.select([self._child.stdout], [], [], 0)[0]:
            chunk = os.read(self._child.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        if lines:
            self._sample, self._heard_s = parse(lines[-1]), time.monotonic()


def _spawn(*args: str) -> subprocess.Popen[bytes] | None:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", str(SAMPLER), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None


def _line_by(child: subprocess.Popen[bytes], until_s: float) -> bytes:
    """The child's first line, or b"" when time runs out or it ends without one."""
    assert child.stdout is not None
    text = b""
    while b"\n" not in text:
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, until_s - time.monotonic()))
        chunk = os.read(child.stdout.fileno(), 1 << 16) if ready else b""
        if not chunk:
            return b""
        text += chunk
    return text.split(b"\n")[0]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill and reap without waiting for a process that is stuck inside the driver."""
    if child.poll() is None:
        child.kill()
    if child.stdout is not None:
        child.stdout.close()
    try:
        child.wait(REAP_S)
    except subprocess.TimeoutExpired:
        child.returncode = -9  # in D state; the kernel ends it when the driver answers, and nobody waits for that


def _gpu(card: dict[str, Any], index: int, own_pids: frozenset[int]) -> GpuFacts:
    held = [process["bytes"] or 0 for process in card["processes"] or () if process["pid"] in own_pids]
    names = set(GpuFacts.model_fields) & set(card)
    return GpuFacts(**{name: card[name] for name in names}, index=index, reclaimable_bytes=sum(held))


def _named(cards: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    for card in cards:
        is_index = name.isdecimal() and int(name) == card["nvml_index"]
        parent = card.get("parent") or ""
        is_uuid = name.startswith(("GPU-", "MIG-")) and (card["uuid"].startswith(name) or parent.startswith(name))
        if is_index or is_uuid:
            return card
    return None


def _pretended_gib() -> float | None:
    """$TURBODIFF_PRETEND_VRAM; a value that is not a positive number counts as not set (the CLI refuses it earlier)."""
    try:
        value = float(os.environ.get(PRETEND_VARIABLE, ""))
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _container_limit(total_bytes: int) -> int:
    """Host memory as the kernel will grant it: a container's cgroup limit is what the OOM killer counts."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(name).read_text("ascii").strip()
        except OSError:
            continue
        if limit.isdecimal():
            return min(total_bytes, int(limit))
    return total_bytes


def _private_bytes(pid: int) -> int:
    """RAM that only this process holds; pages of mapped files count as available already."""
    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return max(0, info.rss - info.shared)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
