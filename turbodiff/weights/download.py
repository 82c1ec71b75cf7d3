"""Downloads: the right files for a card, from the Hugging Face hub, a mirror of it or ModelScope, resumed and checked.

Addresses, sign-in and checksums are huggingface_hub's; the bytes are read by weights/transfer.py, which says why. A
partial file keeps its checksum in its name, so it is only ever continued with the same content, from whichever server.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from turbodiff.plan.weight_sizes import missing_files
from turbodiff.spec.downloads import Progress
from turbodiff.spec.environment import NETWORK, usable_network
from turbodiff.spec.errors import FileError
from turbodiff.spec.models import Inventory, ModelFile, Variant, find_model
from turbodiff.spec.numbers import GIB, gib
from turbodiff.weights.detect import is_weights, read_header
from turbodiff.weights.locate import download_root, inventory
from turbodiff.weights.sources import (
    FAILURES,
    FINAL,
    MAX_WAIT_S,
    SHA256,
    USER_AGENT,
    Remote,
    Source,
    SourceError,
    failure,
    look_up,
    sources,
    without_credentials,
)
from turbodiff.weights.transfer import CONNECTIONS, TICK_S, Part, RangeIgnored, receive

RESERVE_BYTES = GIB  # left free on the disk
HASH_BYTES = 8 << 20
ATTEMPTS = 6  # in a row without a single new byte
SPEED_S = 8.0  # the speed is that of the last seconds
# Of the disk, not of the hub: code of the error, what happened, what to try
DISK_ERRORS = {
    errno.EDQUOT: ("disk_quota", "your quota on this disk is used up", "free some of it, or"),
    errno.EFBIG: ("disk_file_size", "this disk, or `ulimit -f`, does not allow files of this size", "not FAT32;"),
    errno.EROFS: ("disk_read_only", "this folder can only be read", "make it writable, or"),
    errno.EACCES: ("disk_read_only", "this folder can only be read", "make it writable, or"),
    errno.EPERM: ("disk_read_only", "this folder can only be read", "make it writable, or"),
}


Tell = Callable[[Progress], None]


def pull(
    model: str,
    *,
    variant: Variant | None = None,
    root: Path | None = None,
    found: Inventory | None = None,
    tell: Tell | None = None,
    mirror: str = "",
) -> list[Path]:
    """Download what `model` still needs into `root` (default: the first search root).

    Args:
        variant: which networks; plan/tiers.py `suited` says which suit a machine. None: the smallest.
        tell: called every TICK_S at the latest with how far it is; what it raises ends the download, which the next
            call continues.
        mirror: the server to ask first; "" for $HF_ENDPOINT or the hub (sources.py).

    Raises:
        FileError: offline, no server has it, a proxy that cannot be used, a disk that refuses, or a file that is not
            what the server promised. A download that stopped is continued by the next call.
    """
    spec = find_model(model)
    folder = (root or download_root()).absolute()
    files = spec.files_of(variant or spec.variants[0])
    wanted = [file for file in missing_files(files, spec, found or inventory()) if file.repo]
    if not wanted:
        return []
    order = sources(mirror)
    run = Run(order, tuple(wanted), folder, tell, order[0])
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise FileError(
            "HF_HUB_OFFLINE is set", code="offline", field="HF_HUB_OFFLINE", got="HF_HUB_OFFLINE",
            expected=run.by_hand(), try_instead="unset HF_HUB_OFFLINE, or fetch these files by hand to these places",
        )  # fmt: skip
    usable, bad = usable_network(os.environ)
    if bad is not None:
        raise FileError(
            "this setting of the network cannot be used", code="proxy_unusable", field=bad.name, got=bad.value,
            expected=bad.expected, try_instead=f"unset {bad.name}",
        )  # fmt: skip
    for name in NETWORK:  # HTTP libraries read them as they are
        os.environ.pop(name, None)
    os.environ.update(usable)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remotes = [run.find(file) for file in wanted]
        parts = [Part(folder / file.names[0], remote) for file, remote in zip(wanted, remotes, strict=True)]
        run.done = {file.names[0]: part.done_bytes for file, part in zip(wanted, parts, strict=True)}
        total_bytes, done_bytes = sum(remote.nbytes for remote in remotes), sum(run.done.values())
        if total_bytes - done_bytes + RESERVE_BYTES > shutil.disk_usage(folder).free:
            raise disk_failure(folder, total_bytes - done_bytes, OSError(errno.ENOSPC, ""))
        run.came.clear()  # what was here is no speed
        run.progress = run.progress._replace(files=len(wanted), total_bytes=total_bytes)
        return [run.download(file) for file in wanted]
    except OSError as error:
        raise disk_failure(folder, sum(file.bytes for file in wanted), error) from None


@dataclass
class Run:
    """One download of several files: the server in use, and how far it is."""

    order: tuple[Source, ...]  # servers to ask
    wanted: tuple[ModelFile, ...]
    folder: Path
    tell: Tell | None
    server: Source
    progress: Progress = field(default_factory=Progress)
    tried: dict[Source, str] = field(default_factory=dict)  # servers without the present file: what each said
    done: dict[str, int] = field(default_factory=dict)  # bytes here, by file
    known: dict[str, str] = field(default_factory=dict)  # SHA-256 by file, from the first server that told it
    came: deque[tuple[float, int]] = field(default_factory=deque)  # bytes at a moment, of the last seconds

    def by_hand(self) -> str:
        """Addresses and places of the files, for a download without us."""
        return "; ".join(f"{self.order[0].url(file)} -> {self.folder / file.names[0]}" for file in self.wanted)

    def say(self, **changed: object) -> None:
        """Tell how far it is, with the speed of the last seconds."""
        progress = self.progress._replace(**changed)  # type: ignore[arg-type]
        now_s, done_bytes = time.monotonic(), sum(self.done.values())
        self.came.append((now_s, done_bytes))
        while self.came[0][0] < now_s - SPEED_S:
            self.came.popleft()
        first_s, first = self.came[0]
        speed = max(0, done_bytes - first) / (now_s - first_s) if now_s > first_s else 0.0
        left = (progress.total_bytes - done_bytes) / speed if speed else None
        self.progress = progress._replace(done_bytes=done_bytes, bytes_per_s=speed, left_s=left, host=self.server.host)
        if self.tell:
            self.tell(self.progress)

    def find(self, file: ModelFile, patience: int = 1) -> Remote:
        """The file on the first server that has it; `patience`: how often a server is asked that does not answer.

        Raises:
            FileError: no server has it.
        """
        asked, name = 0, file.names[0]
        while True:
            self.say(file=name)
            try:
                remote = look_up(self.server, file)
                sha256 = remote.etag if SHA256.fullmatch(remote.etag) else ""
                if sha256 and self.known.setdefault(name, sha256) != sha256:
                    raise SourceError("download_differs", f"{sha256[:16]} instead of {self.known[name][:16]}")
                return remote
            except Exception as error:  # noqa: BLE001  the hub library's transport raises kinds of its own
                code, wait_s = failure(error)
                more = 0 if code in FINAL else max(patience, 2 * (code == "download_busy"))
                asked = self.again(error, code, wait_s, asked + 1, more)

    def again(self, error: Exception, code: str, wait_s: float, failures: int, limit: int) -> int:
        """Wait after a failure of a server, or go on with the next one after the last of `limit` in a row; returns how
        many are in a row from here on.

        Raises:
            FileError: there is no other server.
        """
        if failures >= limit or wait_s > MAX_WAIT_S:
            self.leave(code, error)
            return 0
        self.wait(wait_s or min(2**failures / 4, 8))
        return failures

    def leave(self, code: str, error: BaseException) -> None:
        """Go on with the next server.

        Raises:
            FileError: there is none; it tells why the first failed.
        """
        address, proxies = urlsplit(self.server.endpoint), getproxies()
        proxied = (address.scheme in proxies or "all" in proxies) and not proxy_bypass(address.hostname or "")
        if proxied and code in ("download_dns", "hub_unreachable"):
            code = "download_proxy"  # nobody else was asked
        first_code = self.progress.left_code if self.tried else code
        said = f"{self.server.host}: {self.progress.file}: {type(error).__name__}: {error}"
        self.tried[self.server] = without_credentials(said.splitlines()[0])[:240]
        rest = [server for server in self.order if server not in self.tried]
        if rest:
            left, self.server = self.server.host, rest[0]
            self.say(left_host=left, left_code=code)
            return
        what, try_instead = FAILURES[first_code]
        raise FileError(
            what, code=first_code, field=self.order[0].host, got="; ".join(self.tried.values()),
            expected=self.by_hand(), try_instead=f"{try_instead}; or fetch these files by hand to these places",
        ) from None  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Wait, and go on telling."""
        for _ in range(math.ceil(seconds / TICK_S)):
            self.say()
            time.sleep(TICK_S)

    def download(self, file: ModelFile) -> Path:
        """One file, checked and under its name.

        Raises:
            FileError: as `pull`.
            OSError: the disk refused.
        """
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # not in its __all__

        target, name = self.folder / file.names[0], file.names[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        self.tried.clear()
        failures, connections = 0, CONNECTIONS
        while True:
            remote = self.find(file, ATTEMPTS)  # anew each time: the location is signed for minutes
            part = Part(target, remote)
            had = part.done_bytes
            # the person's token goes to the hub itself, never to the storage that it redirects to
            own = remote.trusted and urlsplit(remote.location).netloc == urlsplit(remote.url).netloc
            given = build_hf_headers(token=None if own else False, library_name=USER_AGENT)
            headers = {key: value for key, value in given.items() if isinstance(value, str)}
            try:
                with _alone(part.path, name):
                    if had < remote.nbytes:
                        with contextlib.closing(receive(remote, part, headers, connections)) as coming:
                            for self.done[name] in coming:
                                self.say(file=name)
                    self.check(part, remote)
                    part.list_path.unlink(missing_ok=True)  # a part without a list is whole: it is checked again
                    part.path.replace(target)
                    self.say(files_done=self.progress.files_done + 1, checking=False)
                    return target
            except RangeIgnored:
                connections = 0
                self.say(starts_over=True)
            except SourceError as error:  # damaged
                self.leave(error.code, error)
            except ConnectionError as error:
                code, wait_s = failure(error)
                failures = 1 if part.done_bytes > had else failures + 1
                if code == "download_busy" and connections:
                    connections = max(1, connections // 2)
                failures = self.again(error, code, wait_s, failures, ATTEMPTS)

    def check(self, part: Part, remote: Remote) -> None:
        """Compare size, the SHA-256 where the server tells it, and the header of weights; a bad file is deleted.

        Raises:
            SourceError: not what the server promised.
            FileError: what it promised is no checkpoint.
        """
        digest, size = hashlib.sha256(), 0
        with part.path.open("rb") as file:
            while chunk := file.read(HASH_BYTES):
                digest.update(chunk)
                size += len(chunk)
                self.say(checking=True)
        got = digest.hexdigest() if SHA256.fullmatch(remote.etag) else remote.etag
        if size != remote.nbytes or got != remote.etag:
            part.discard()
            promised = f"{remote.nbytes} bytes, {remote.etag[:16]}"
            raise SourceError("download_damaged", f"{size} bytes, {got[:16]} came, {promised} were promised")
        if is_weights(remote.url):
            try:
                read_header(part.path)
            except FileError:
                part.discard()
                raise


def disk_failure(folder: Path, nbytes: int, error: OSError) -> FileError:
    """The error of a disk that does not take `nbytes`."""
    larger = "set TURBODIFF_MODELS to a folder on another disk"
    if error.errno == errno.ENOSPC:
        here = next(path for path in (folder, *folder.parents) if path.exists())
        return FileError(
            "not enough room for the download", code="disk_full", field=str(folder),
            got=f"{gib(shutil.disk_usage(here).free)} free",
            expected=gib(nbytes + RESERVE_BYTES), try_instead="set TURBODIFF_MODELS to a folder on a larger disk",
        )  # fmt: skip
    refused = ("disk_refuses", "the disk does not take the download", "")
    code, what, try_first = DISK_ERRORS.get(error.errno or 0, refused)
    return FileError(
        what, code=code, field=str(folder), got=error.strerror or error,
        expected=f"a disk for files of {gib(nbytes)}", try_instead=f"{try_first} {larger}".strip(),
    )  # fmt: skip


@contextlib.contextmanager
def _alone(part: Path, name: str) -> Iterator[None]:
    """Hold the partial file against other downloads, also of other processes: two would write into each other.

    Raises:
        FileError: somebody else is downloading it now.
    """
    with part.open("ab") as held:  # the lock goes with the file when it gets its name
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):  # else: a disk without locks
                raise FileError(
                    "this file is being downloaded already", code="download_running", field=name, got=part.name,
                    expected="one download of a file at a time",
                    try_instead="wait for the other one, then run this again",
                ) from None  # fmt: skip
        yield


def discard_parts(files: Sequence[ModelFile], folder: Path) -> None:
    """Remove the partial files of these; those that somebody is downloading now stay."""
    for file in files:
        target = folder / file.names[0]
        for path in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            with contextlib.suppress(FileError), _alone(path, target.name):
                path.with_suffix(".ranges").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
