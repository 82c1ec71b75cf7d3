"""The machine as it is now, asked without torch and without ever waiting more than two seconds.

NVML is called by turbodiff/gpu/sample.py in a process of its own. `machine_now` takes one sample; `Probe` keeps a
sampler running and hands out the newest sample with its age. Nothing in here raises: what cannot be known is None.
"""

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict, ValidationError

from turbodiff.gpu.allocator import allocator_mode, is_tegra, is_wsl
from turbodiff.gpu.card_measurements import CardMeasurement, all_measurements, measurement_of
from turbodiff.gpu.host_memory import host_memory
from turbodiff.gpu.kernel_verdicts import kernels_of
from turbodiff.plan.hardware import GpuFacts, GpuState, Machine, pretend

DEADLINE_S = 2.0
FIRST_ANSWER_S = 30.0  # a driver without persistence mode starts each card for it: 3 s with two of them, 10 with eight
REAP_S = 0.2  # of it, for the end of a sampler that is stuck
LAST_BYTES = 4096  # of what a sampler that died wrote
SHOWN_BYTES = 200  # of a line of it
MOST_LINE_BYTES = 1 << 20  # a sample of 16 cards with 100 processes each has 0.1 MB
MOST_READS = 64  # of 64 KiB
MOST_ERROR = 300  # characters of a library's words
WSL_PINNED_BYTES = 512 << 20  # page-locked memory ends between 0.5 and 1 GiB under WSL2 (microsoft/WSL issue 8447)
SHARED_MEMORY_CARDS = ("GB10", "Orin", "Thor", "Xavier", "Tegra")  # no memory of their own; NVML answers for some
SAMPLER = Path(__file__).with_name("sample.py")
PRETEND_VARIABLE = "TURBODIFF_PRETEND_VRAM"  # GiB


class GpuProcess(BaseModel):
    """A process on a card and the device memory that it holds, None where the driver does not say."""

    model_config = ConfigDict(frozen=True)
    pid: int
    kind: str = "compute"  # or "graphics"
    bytes: int | None = None


class CardSample(GpuFacts):
    """One card or MIG slice as the sampler said it; None where NVML does not say."""

    state: GpuState = "ok"
    nvml_index: int = 0
    minor: int | None = None  # /dev/nvidiaN
    parent: str = ""  # uuid of a slice's card
    instance: tuple[int, int] | None = None  # of a slice: its GPU instance and compute instance
    processes: tuple[GpuProcess, ...] | None = None


class Sample(BaseModel):
    """What the sampler said, `age_s` seconds ago."""

    model_config = ConfigDict(frozen=True)
    state: GpuState
    reason: str = ""  # why no card can be used: a key of plan/reasons.toml, to which `error` is what was got
    error: str
    driver: str | None
    cards: tuple[CardSample, ...]
    age_s: float = 0.0
    taken_s: float = 0.0  # by time.monotonic, 0 where it was not taken here


def machine_now(deadline_s: float = DEADLINE_S, own_pids: frozenset[int] = frozenset()) -> Machine:
    """This machine now; never raises, never waits longer than `deadline_s`.

    Args:
        own_pids: processes whose memory, on cards and in RAM, is free again when the next job starts (our worker).

    TURBODIFF_PRETEND_VRAM (GiB) puts one card of that size in place of what is there.
    """
    return machine_from(take_sample(deadline_s), own_pids)


def take_sample(deadline_s: float = DEADLINE_S) -> Sample:
    """One sample. A sampler that does not answer in time is killed, not waited for, and the state is "hang".

    Of one that died the reason is told, and the state is "error".
    """
    until_s = time.monotonic() + deadline_s - REAP_S
    try:
        child = _spawn()
    except OSError as error:
        return _failed("error", "gpu_sampler_not_started", error.strerror or str(error))
    output, found = Output(child), None
    try:
        while found is None and not output.closed:
            ready, _, _ = select.select([output.fd], [], [], max(0.0, until_s - time.monotonic()))
            if not ready or time.monotonic() > until_s:
                return output.silence(deadline_s)
            found = output.read()
        return found or output.end()
    finally:
        _end(child)


def _failed(state: GpuState, reason: str, error: str) -> Sample:
    return Sample(state=state, reason=reason, error=error, driver=None, cards=(), taken_s=time.monotonic())


class Output:
    """What a sampler prints: samples, and lines that are none, of which the first is kept."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        self._child, self.fd, self._rest, self._other = child, child.stdout.fileno(), b"", b""
        self.closed = False

    def read(self) -> Sample | None:
        """The newest sample that has arrived. Never blocks, and an endless flood does not hold it up."""
        newest = None
        for _ in range(MOST_READS):
            if self.closed or not select.select([self.fd], [], [], 0)[0]:
                break
            chunk = os.read(self.fd, 1 << 16)
            self.closed = not chunk
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if self.closed or len(self._rest) > MOST_LINE_BYTES:
                lines, self._rest = [*lines, self._rest], b""
            for line in lines:
                try:
                    newest = Sample.model_validate_json(line).model_copy(update={"taken_s": time.monotonic()})
                except ValidationError:
                    self._other = self._other or line.strip()[:SHOWN_BYTES]
        return newest

    def silence(self, silent_s: float) -> Sample:
        """What is to be said of a sampler that printed no sample for so long."""
        if self._other or self._rest:
            garbage = self._other or self._rest[:SHOWN_BYTES]
            return _failed("error", "gpu_unreadable", garbage.decode("utf-8", "replace"))
        first = self._words(0)
        return _failed("hang", "gpu_hang", f"{silent_s:.3g} s" + (f": {first}" if first else ""))

    def end(self) -> Sample:
        """How a sampler that closed its output ended, with the last line that it wrote, the first where it means to
        have done well."""
        try:
            status = self._child.wait(REAP_S)
        except subprocess.TimeoutExpired:
            return _failed("error", "gpu_sampler_ended", "stdout")
        said = self._words(-1 if status else 0) or self._other.decode("utf-8", "replace")
        if status == 0 and said:
            return _failed("error", "gpu_unreadable", said)
        crashed = -status in set(signal.Signals)
        how = signal.Signals(-status).name if crashed else f"status {status}"
        key = "gpu_sampler_crashed" if crashed else "gpu_sampler_ended"
        return _failed("error", key, f"{how}: {said}" if said else how)

    def _words(self, line: int) -> str:
        """The first (0) or last (-1) line that the sampler wrote to standard error."""
        if self._child.stderr is None:
            return ""
        errors = self._child.stderr.fileno()
        start = max(0, os.fstat(errors).st_size - LAST_BYTES) if line else 0
        lines = os.pread(errors, LAST_BYTES, start).decode("utf-8", "replace").strip().splitlines()
        return lines[line][:SHOWN_BYTES] if lines else ""


def machine_from(
    sample: Sample, own_pids: frozenset[int] = frozenset(), told_bytes: Mapping[str, int] = MappingProxyType({})
) -> Machine:
    """The machine behind a sample, with RAM, CPUs and versions; applies CUDA_VISIBLE_DEVICES and the pretended card.

    RAM is what the kernel will grant (gpu/host_memory.py).

    Args:
        told_bytes: what own processes say that they hold, by the UUID of the card ("": the first one). In a container
            and under WSL2 NVML knows them by other ids or not at all.
    """
    cards = visible([card for card in sample.cards if card.state == "ok"], os.environ.get("CUDA_VISIBLE_DEVICES"))
    shared = set(GpuFacts.model_fields) - {"index", "reclaimable_bytes", "kernels"}
    gpus, known, torch = [], all_measurements(), _version("torch")
    kernels = {kind: kernels_of(*kind) for kind in {(card.name, card.known_capability) for card in cards}}
    page_locked = None
    for index, card in enumerate(cards):
        held_bytes = sum(process.bytes or 0 for process in card.processes or () if process.pid in own_pids)
        told = max(told_bytes.get(card.uuid, 0), 0 if index else told_bytes.get("", 0))
        held_bytes = max(held_bytes, min(told, told if card.used_bytes is None else card.used_bytes))
        told_by_nvml = card.model_dump(include=shared) | {"kernels": kernels[card.name, card.known_capability]}
        facts = told_by_nvml | known.facts_of(card, sample.driver, torch)
        page_locked = measurement_of(known.cards, card, sample.driver, torch) or page_locked
        gpus.append(GpuFacts.model_validate({**facts, "index": index, "reclaimable_bytes": held_bytes}))
    memory, wsl, tegra = host_memory(own_pids), is_wsl(), is_tegra()
    # a card that is too old to compute on is no choice beside one that is not
    gpus = [gpu for gpu in gpus if not gpu.too_old] or gpus
    machine = Machine(
        gpus=tuple(gpus),
        gpu_state=sample.state if cards or sample.state != "ok" else "none",
        gpu_reason=sample.reason,
        gpu_error="".join(letter if letter.isprintable() else " " for letter in sample.error)[:MOST_ERROR],
        ram_total_bytes=memory.total_bytes,
        ram_available_bytes=memory.available_bytes,
        ram_reclaimable_bytes=memory.reclaimable_bytes,
        cpu_count=len(os.sched_getaffinity(0)),
        driver=sample.driver,
        torch=torch,
        bitsandbytes=bool(_version("bitsandbytes")),
        cudnn=_version("nvidia-cudnn-cu13") or _version("nvidia-cudnn-cu12"),
        wsl=wsl,
        tegra=tegra,
        unified_memory=tegra or any(kind in card.name for card in cards for kind in SHARED_MEMORY_CARDS),
        pinned_limit_bytes=page_lock_limit(page_locked, wsl),
        allocator=allocator_mode(gpus, sample.driver, wsl=wsl, tegra=tegra),
    )
    try:  # a value that is not a positive number counts as not set (the CLI refuses it earlier)
        pretended_gib = float(os.environ.get(PRETEND_VARIABLE, ""))
    except ValueError:
        return machine
    return pretend(machine, pretended_gib) if 0 < pretended_gib < float("inf") else machine


def page_lock_limit(measured: CardMeasurement | None, wsl: bool) -> int | None:
    """Host memory that may be page-locked: where more was refused, what was granted; where nothing was refused at
    least that under WSL2, and no limit elsewhere. None: no limit known."""
    granted = measured.page_locked_bytes if measured else None
    if measured and measured.page_lock_refused and granted is not None:
        return granted
    return max(WSL_PINNED_BYTES, granted or 0) if wsl else None


def visible(cards: list[CardSample], devices: str | None) -> list[CardSample]:
    """The cards that CUDA will show, in its order, for a CUDA_VISIBLE_DEVICES, under CUDA_DEVICE_ORDER=PCI_BUS_ID.

    Numbers count physical cards and are read as by strtoul(3); "GPU-..." and "MIG-..." may be prefixes, and of the kind
    of the first name; "MIG-GPU-.../1/0" is a slice as drivers before 470 named it. The list ends at the first name that
    matches nothing, and a card that is named twice leaves none (CUDA C++ Programming Guide, environment variables;
    torch/cuda/__init__.py, _parse_visible_devices).
    """
    if devices is None:
        return cards
    kind = next((kind for kind in ("GPU-", "MIG-") if devices.strip().startswith(kind)), "")
    chosen: list[CardSample] = []
    for name in (part.strip() for part in devices.split(",")):
        number = re.match(r"\+?(\d+)", name)
        if kind and name.startswith(kind):
            found = next((card for card in cards if _is_named(card, name)), None)
        elif not kind and number is not None:
            found = next((card for card in cards if card.nvml_index == int(number[1])), None)
        else:
            break
        if found in chosen:
            return []
        if found is None:
            break
        chosen.append(found)
    return chosen


def visible_name(index: int, devices: str | None) -> str:
    """What a CUDA_VISIBLE_DEVICES that shows it alone calls the card that is number `index` under this one: numbers in
    it count physical cards, whatever the process that sets it sees."""
    names = [] if devices is None else [name.strip() for name in devices.split(",")]
    return names[index] if index < len(names) else str(index)


def _is_named(card: CardSample, name: str) -> bool:
    """Whether a card or slice goes by this UUID, prefix of one, or old name of a slice."""
    old = re.fullmatch(r"MIG-(GPU-[\w-]+)/(\d+)/(\d+)", name)
    if old is not None:
        return card.uuid == name or (card.parent == old[1] and card.instance == (int(old[2]), int(old[3])))
    return card.uuid.startswith(name) or card.parent.startswith(name)


class Probe:
    """A sampler kept running at `interval_s`; `latest` never blocks. A sampler that falls silent is replaced; until its
    first answer it is left to it for half a minute."""

    def __init__(self, interval_s: float = 1.0, deadline_s: float = DEADLINE_S) -> None:
        self.interval_s, self.deadline_s = interval_s, deadline_s
        self._child: subprocess.Popen[bytes] | None = None
        self._output: Output | None = None
        self._sample: Sample | None = None
        self._received_s = self._started_s = 0.0

    def latest(self) -> Sample:
        """The newest sample with its age; state "hang" once nothing came for interval + deadline."""
        if self._child is None or self._child.poll() is not None:
            if self._output is not None and self._received_s < self._started_s:  # it died before its first sample
                last = self._output.read()
                self._sample, self._received_s = last or self._output.end(), time.monotonic()
            self.stop()
            self._started_s = time.monotonic()
            try:
                self._child = _spawn("--watch", str(self.interval_s))
                self._output = Output(self._child)
            except OSError as error:
                self._sample = _failed("error", "gpu_sampler_not_started", error.strerror or str(error))
                self._received_s = self._started_s
        newest = self._output.read() if self._output else None
        if newest is not None:
            self._sample, self._received_s = newest, time.monotonic()
        silent_s = time.monotonic() - max(self._received_s, self._started_s)
        if self._output is not None and silent_s > self.interval_s + self.deadline_s:
            self._sample = self._output.silence(silent_s)
            starts = self._received_s < self._started_s and self._sample.state == "hang"
            if not starts or silent_s > FIRST_ANSWER_S:
                self.stop()
        if self._sample is None:
            return _failed("hang", "gpu_no_sample_yet", "").model_copy(update={"age_s": silent_s})
        return self._sample.model_copy(update={"age_s": time.monotonic() - self._received_s})

    def stop(self) -> None:
        """End the sampler; a later `latest` starts another."""
        if self._child is not None:
            _end(self._child)
        self._child = self._output = None


def _spawn(*args: str) -> subprocess.Popen[bytes]:
    """A sampler; OSError where the system does not start it."""
    errors = tempfile.TemporaryFile()  # noqa: SIM115  nothing can block on a file; `_end` closes it
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", str(SAMPLER), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # a key of the terminal is for us: it would take SIGQUIT as an order to dump core
        )
    except OSError:
        errors.close()
        raise
    child.stderr = errors
    return child


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill and reap without waiting for a process that is stuck inside the driver."""
    if child.poll() is None:
        child.kill()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()
    try:
        child.wait(REAP_S)
    except subprocess.TimeoutExpired:
        child.returncode = -9  # in D state; the kernel ends it when the driver answers, and nobody waits for that


@lru_cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
