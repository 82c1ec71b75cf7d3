"""Downloads: the right files for a card, from the Hugging Face hub or a mirror of it, with progress, resume and checks.

Addresses, sign-in and checksums are huggingface_hub's; the bytes are read here, because the library throws a partial
file away when its process ends (its pull request 4228), and these files take hours. A partial file keeps its checksum
in its name, so it is only ever continued with the same content.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from turbodiff.spec.environment import NETWORK, usable_network
from turbodiff.spec.errors import FileError
from turbodiff.spec.files import sha256_of, sync
from turbodiff.spec.models import Inventory, ModelFile, ModelSpec, Variant, find_model
from turbodiff.spec.numbers import GIB, gib
from turbodiff.weights.detect import is_weights, read_header
from turbodiff.weights.locate import download_root, inventory

DEFAULT_ENDPOINT = "https://huggingface.co"
RESERVE_BYTES = GIB  # left free on the disk
CHUNK_BYTES = 4 << 20
TIMEOUT_S = 30
ATTEMPTS = 6  # in a row without a single new byte
# Of the disk, not of the hub: full, over quota, files of this size refused (FAT32, ulimit), read-only, broken
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[str, int, int], None]


class Remote(NamedTuple):
    """A file on the hub as it is now."""

    url: str
    location: str
    etag: str
    nbytes: int


def endpoint() -> str:
    """The hub or its mirror: $HF_ENDPOINT."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def missing_files(files: Sequence[ModelFile], spec: ModelSpec, found: Inventory) -> list[ModelFile]:
    """Those of `files` that no file on this disk can stand for."""
    missing = []
    for file in files:
        alike = [have for have in found.files if (have.model, have.component) == (spec.name, file.component)]
        if file.component.startswith("dit"):
            alike = [have for have in alike if (have.quant, have.sla) == (file.quant, spec.turbo)]
            alike = [have for have in alike if have.resolution in ("", file.resolution)]
        missing += [] if alike else [file]
    return missing


def pull(
    model: str,
    *,
    variant: Variant | None = None,
    root: Path | None = None,
    found: Inventory | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Download what `model` still needs into `root` (default: the first search root); `progress(name, bytes, of all)`.

    variant: which networks; plan/tiers.py `suited` says which suit a machine. None: the smallest.

    Raises:
        FileError: offline, unreachable, a proxy that cannot be used, too little disk, or a file that is not what the
            hub promised. A download that stopped is continued by the next call.
    """
    spec = find_model(model)
    folder = (root or download_root()).absolute()
    files = spec.files_of(variant or spec.variants[0])
    wanted = [file for file in missing_files(files, spec, found or inventory()) if file.repo]
    if not wanted:
        return []
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise _unreachable(wanted, folder, "HF_HUB_OFFLINE is set", code="offline")
    usable, bad = usable_network(os.environ)
    if bad is not None:
        raise FileError(
            "this setting of the network cannot be used", code="proxy_unusable", field=bad.name, got=bad.value,
            expected=bad.expected, try_instead=f"unset {bad.name}",
        )  # fmt: skip
    for name in NETWORK:  # HTTP libraries read them as they are
        os.environ.pop(name, None)
    os.environ.update(usable)
    remotes = [_remote(file, wanted, folder) for file in wanted]
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_part(folder / file.names[0], remote) for file, remote in zip(wanted, remotes, strict=True)]
    nbytes = sum(remote.nbytes for remote in remotes) - sum(map(_size, parts))
    if nbytes + RESERVE_BYTES > shutil.disk_usage(folder).free:
        raise _disk_full(folder, nbytes)
    return [_download(file, wanted, folder, progress) for file in wanted]


def _part(target: Path, remote: Remote) -> Path:
    return target.with_name(f".{target.name}.{remote.etag[:16]}.part")


def _remote(file: ModelFile, wanted: Sequence[ModelFile], folder: Path) -> Remote:
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url  # 0.3 s

    url = hf_hub_url(file.repo, file.names[0], endpoint=endpoint())
    try:
        found = get_hf_file_metadata(url, token=get_token(), endpoint=endpoint(), timeout=TIMEOUT_S)
    except Exception as error:  # noqa: BLE001  its transport raises kinds of its own, other ones in each version
        raise _unreachable(wanted, folder, f"{file.names[0]}: {type(error).__name__}: {error}"[:200]) from None
    etag = re.sub(r"[^\w-]", "", found.etag or "")
    if not etag or found.size is None:
        raise _unreachable(wanted, folder, f"{file.names[0]}: no size or checksum from the server")
    return Remote(url, found.location, etag, found.size)


def _disk_full(folder: Path, nbytes: int) -> FileError:
    return FileError(
        "not enough room for the download", code="disk_full", field=str(folder),
        got=f"{gib(shutil.disk_usage(folder).free)} free", expected=gib(nbytes + RESERVE_BYTES),
        try_instead="set TURBODIFF_MODELS to a folder on a larger disk",
    )  # fmt: skip


def _disk_failure(folder: Path, nbytes: int, error: OSError) -> FileError:
    if error.errno == errno.ENOSPC:
        return _disk_full(folder, nbytes)
    return FileError(
        "the disk does not take the download", code="disk_refuses", field=str(folder), got=error.strerror or error,
        expected=f"a disk for files of {gib(nbytes)}",
        try_instead="set TURBODIFF_MODELS to a folder on another disk",
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


def _download(file: ModelFile, wanted: Sequence[ModelFile], folder: Path, progress: Progress | None) -> Path:
    target = folder / file.names[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        remote = _remote(file, wanted, folder)  # anew each time: the location is signed for minutes
        part = _part(target, remote)
        before = _size(part)
        try:
            with _alone(part, file.names[0]):
                if before < remote.nbytes:
                    for done in _receive(remote, part):
                        if progress:
                            progress(file.names[0], done, remote.nbytes)
                _check(part, remote)
                return part.replace(target)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise _disk_failure(folder, remote.nbytes - _size(part), error) from None
            failures = 1 if _size(part) > before else failures + 1
            if failures >= ATTEMPTS or isinstance(error, PermissionError):
                raise _unreachable(wanted, folder, f"{file.names[0]}: {error}"[:200]) from None
            time.sleep(min(2**failures / 4, 8))


def _check(part: Path, remote: Remote) -> None:
    """Compare size, the sha256 where the hub tells it, and the header of weights; a bad file is deleted.

    Raises:
        FileError: not what the hub promised.
    """
    size = _size(part)
    digest = sha256_of(part) if SHA256.fullmatch(remote.etag) else remote.etag
    try:
        if size != remote.nbytes or digest != remote.etag:
            raise FileError(
                "the downloaded file is not what the server promised", code="download_damaged",
                field=remote.url, got=f"{size} bytes, {digest[:16]}",
                expected=f"{remote.nbytes} bytes, {remote.etag[:16]}", try_instead="run the same command again",
            )  # fmt: skip
        if is_weights(remote.url):
            read_header(part)
    except FileError:
        part.unlink()
        raise


def _receive(remote: Remote, part: Path) -> Iterator[int]:
    """Append what is missing of the file to `part`; yield the bytes that are there after each chunk.

    Raises:
        OSError: the connection broke; what came is kept.
    """
    import httpx
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # not in its __all__

    # the person's token goes to the hub itself, never to the storage that it redirects to
    same = urlsplit(remote.location).netloc == urlsplit(remote.url).netloc
    headers = {name: value for name, value in (build_hf_headers() if same else {}).items() if isinstance(value, str)}
    done = _size(part)
    headers |= {"Accept-Encoding": "identity", "Range": f"bytes={done}-"}
    told = done
    try:
        with httpx.stream("GET", remote.location, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
            answer.raise_for_status()
            if answer.status_code != 206:
                done = 0  # the server sends the whole file
            with part.open("r+b" if done else "wb") as file:
                file.seek(done)
                for chunk in answer.iter_raw():
                    file.write(chunk)
                    done += len(chunk)
                    if not told <= done < told + CHUNK_BYTES:
                        told = done
                        yield done
    except httpx.HTTPError as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from None
    yield done
    sync(part)
    if done < remote.nbytes:
        raise ConnectionError(f"the connection ended after {done} of {remote.nbytes} bytes")


def _unreachable(files: Sequence[ModelFile], folder: Path, got: str, code: str = "hub_unreachable") -> FileError:
    """The error with everything for a download by hand: addresses, names, folder."""
    urls = "; ".join(
        f"{endpoint()}/{file.repo}/resolve/main/{file.names[0]} -> {folder / file.names[0]}" for file in files
    )
    return FileError(
        f"cannot download from {endpoint()}", code=code, field="HF_ENDPOINT", got=got, expected=urls,
        try_instead="set HF_ENDPOINT to a mirror that you can reach, or download these files by hand to these places",
    )  # fmt: skip


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
