"""Weights by model: the room they take, deleting them, moving them to another disk.

Only regular files below the folder of downloads are ever removed: not what another search root or the Hugging Face
cache holds, nothing behind a link, no file of a model that a job needs, and none that another model here needs.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.files import sha256_of, sync
from turbodiff.spec.models import Inventory, ModelSpec, all_models
from turbodiff.weights.detect import INDEX, open_checkpoint
from turbodiff.weights.download import RESERVE_BYTES, disk_failure
from turbodiff.weights.locate import download_root, inventory

COPY_BYTES = 8 << 20
Keep = Literal["", "shared", "outside"]


class StoredFile(NamedTuple):
    """A file of a model; `keep` says why deleting the model leaves it: "" where it does not."""

    path: Path
    nbytes: int
    shared_with: tuple[str, ...] = ()  # other models that need it and have their networks here
    keep: Keep = ""
    link_to: Path | None = None  # it is a link: deleting the model removes the link, never the file behind it


def stored_files(spec: ModelSpec, found: Inventory, root: Path | None = None) -> tuple[StoredFile, ...]:
    """The files of a model on this disk, each once, shards and what was told of them (`FILE.toml`) included."""
    root = (root or download_root()).absolute()
    networks = {file.model for file in found.files if file.component.startswith("dit")}
    users: dict[Path, set[str]] = {}
    for file in found.files:
        paths = [Path(file.path)]
        if file.path.endswith(INDEX):
            paths += open_checkpoint(file.path).header.files
        told = paths[0].with_name(paths[0].name + ".toml")
        for path in (*paths, *((told,) if told.is_file() else ())):
            users.setdefault(path.absolute(), set()).add(file.model)
    stored = []
    for path, models in sorted(users.items()):
        if spec.name not in models:
            continue
        others = tuple(sorted((models & networks) - {spec.name}))
        # below the folder with no link between them; what is beside a link is somebody else's place
        own = path.is_relative_to(root) and path.parent.resolve() == root.resolve() / path.parent.relative_to(root)
        keep: Keep = "outside" if not own else "shared" if others else ""
        link_to = path.resolve() if path.is_symlink() else None
        stored.append(StoredFile(path, path.stat().st_size, others, keep, link_to))
    return tuple(stored)


class Storage:
    """The weights below the folder of downloads, to be deleted or moved.

    Args:
        in_jobs: names of the models that jobs run or wait with, asked each time.
        root: the folder; None for the first search root, asked each time.
        look: what is on this disk, asked each time.
    """

    def __init__(
        self,
        in_jobs: Callable[[], Collection[str]],
        root: Path | None = None,
        look: Callable[[], Inventory] = inventory,
    ) -> None:
        self.in_jobs, self.root, self.look = in_jobs, root, look

    def stored(self) -> dict[str, tuple[StoredFile, ...]]:
        """By model name: its files on this disk."""
        here = self.look()
        return {spec.name: stored_files(spec, here, self.root) for spec in all_models() if not spec.bundled}

    def going(self, spec: ModelSpec, shared: bool) -> tuple[StoredFile, ...]:
        """The files of a model that would be removed, or with `shared` moved.

        Raises:
            FileError: a job needs one of them.
        """
        found, jobs = self.look(), self.in_jobs()
        needed = {file.path for job in all_models() if job.name in jobs for file in stored_files(job, found, self.root)}
        files = tuple(
            file for file in stored_files(spec, found, self.root) if not file.keep or (shared and file.keep == "shared")
        )
        for file in files:
            if file.path in needed:
                raise FileError(
                    "a job needs these weights", code="model_busy", field=file.path.name, got=file.path,
                    try_instead="wait for the jobs of this model, or cancel them",
                )  # fmt: skip
        return files

    def delete(self, spec: ModelSpec) -> list[Path]:
        """Remove the files of a model that nothing keeps, of a link the link; returns their paths.

        Raises:
            FileError: a job needs one of them: nothing is removed. Or the disk refuses.
        """
        files = self.going(spec, shared=False)
        for file in files:
            try:
                file.path.unlink(missing_ok=True)
            except OSError as error:
                raise disk_failure(file.path.parent, file.nbytes, error) from None
        return [file.path for file in files]

    def move(self, spec: ModelSpec, folder: Path) -> Iterator[tuple[str, int, int]]:
        """Copy the files of a model to `folder`, compare the copies by SHA-256, leave a link in the place of each.

        A move that was killed is continued by the next call. Yields name, bytes done, bytes in all.

        Raises:
            FileError: a job needs one of them, no room, the folder cannot be used, or another file is in the way.
        """
        root, folder = (self.root or download_root()).absolute(), folder.absolute()
        going = [file for file in self.going(spec, shared=True) if file.link_to is None]
        total, done = sum(file.nbytes for file in going), 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder.resolve().is_relative_to(root.resolve()):
                raise FileError(
                    "the weights are in this folder already", code="move_inside", field=str(folder), got=root,
                    expected="a folder outside of it",
                )  # fmt: skip
            places = [folder / file.path.relative_to(root) for file in going]
            there = sum(path.stat().st_size for place in places for path in (place, _part(place)) if path.exists())
            if total - there + RESERVE_BYTES > shutil.disk_usage(folder).free:
                raise disk_failure(folder, total - there, OSError(errno.ENOSPC, ""))
            for file, place in zip(going, places, strict=True):
                place.parent.mkdir(parents=True, exist_ok=True)
                for copied in _copy(file, place):
                    yield file.path.name, done + copied, total
                link = file.path.with_name(f".{file.path.name}.link")
                link.unlink(missing_ok=True)
                link.symlink_to(place)
                link.replace(file.path)  # the name is never without a file
                done += file.nbytes
                yield file.path.name, done, total
        except OSError as error:
            raise disk_failure(folder, total - done, error) from None


def _copy(file: StoredFile, target: Path) -> Iterator[int]:
    """Copy a file beside its target, continue a copy that is there, compare, then give it its name.

    Raises:
        FileError: another file has that name, or the disk does not give back what was written.
    """
    part, digest = _part(target), hashlib.sha256()
    written = target if target.exists() else part
    with file.path.open("rb") as source, contextlib.ExitStack() as opened:
        copy, there, at = None, file.nbytes, 0
        if written is part:
            copy = opened.enter_context(part.open("ab"))
            there = min(copy.seek(0, os.SEEK_END), file.nbytes)
            copy.truncate(there)
        while data := source.read(COPY_BYTES):  # what is there already is read for the comparison alone
            digest.update(data)
            if copy is not None:
                copy.write(data[max(0, there - at) :])
            at += len(data)
            yield max(at, there)
    if written is part:
        sync(part)
    if sha256_of(written) != digest.hexdigest():
        nbytes = written.stat().st_size
        if written is part:
            part.unlink()
        raise FileError(
            "the copy is not the same file", code="move_differs", field=str(target), got=f"{nbytes} bytes",
            expected=f"the content of {file.path}", try_instead="another folder, or look at that disk",
        )  # fmt: skip
    if written is part:
        part.replace(target)
    sync(target.parent)


def _part(place: Path) -> Path:
    return place.with_name(f".{place.name}.move")
