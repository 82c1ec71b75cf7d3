"""Weights by model: the room they take, deleting them, moving them to another disk.

Only regular files below the folder of downloads are ever removed, and those that a move put elsewhere, which a list in
that folder names: not what another search root or the Hugging Face cache holds, nothing behind a link of somebody
else, no file of a model that a job needs, and none that another model here needs.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from turbodiff.spec.errors import FileError
from turbodiff.spec.files import atomic_write, open_file, sha256_of, sync
from turbodiff.spec.models import Inventory, ModelSpec, all_models
from turbodiff.spec.numbers import gb
from turbodiff.weights.copies import copies
from turbodiff.weights.detect import INDEX, open_checkpoint
from turbodiff.weights.download import RESERVE_BYTES
from turbodiff.weights.locate import download_root, inventory

COPY_BYTES = 8 << 20
MOVED = ".moved.json"  # in the folder of downloads: where moves put files, as a list of paths
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# errno of a move -> code, what happened, what to try
MOVE_ERRORS = {
    **dict.fromkeys(FULL[:2], ("move_full", "not enough room on that disk", "free some room, or a larger disk")),
    errno.EFBIG: ("move_file_size", "that disk does not take files of this size", "not FAT32, or look at ulimit -f"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        ("move_denied", "this user may not write there", "a folder of your own, or ask for the right to write there"),
    ),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST, errno.ELOOP), ("move_not_folder", "this is no folder", "another folder")
    ),
}
Keep = Literal["", "shared", "outside"]


class StoredFile(NamedTuple):
    """A file of a model; `keep` says why deleting the model leaves it: "" where it does not."""

    path: Path
    nbytes: int
    shared_with: tuple[str, ...] = ()  # other models that need it and have their networks here; all where none has
    keep: Keep = ""
    link_to: Path | None = None  # it is a link to this
    moved: bool = False  # by us: deleting the model removes the file behind the link, too; else never


def stored_files(spec: ModelSpec, found: Inventory, root: Path | None = None) -> tuple[StoredFile, ...]:
    """The files of a model on this disk, each once, shards and what was told of them (`FILE.toml`) included."""
    root = (root or download_root()).absolute()
    places = _moved_places(root)
    networks = {file.model for file in found.files if file.component.startswith("dit")}
    users: dict[Path, set[str]] = {}
    for file in found.files:
        paths = [Path(file.path)]
        if INDEX.search(file.path):
            paths += open_checkpoint(file.path).header.files
        told = paths[0].with_name(paths[0].name + ".toml")
        for path in (*paths, *((told,) if told.is_file() else ())):
            users.setdefault(path.absolute(), set()).add(file.model)
    for copy in copies(root):
        for path in (copy.path, copy.index_path) if copy.source in users else ():
            users[path] = set(users[copy.source])
    stored = []
    for path, models in sorted(users.items()):
        if spec.name not in models:
            continue
        others = tuple(sorted((models & networks) - {spec.name}))
        sharing = others if models & networks else tuple(sorted(models - {spec.name}))
        # below the folder with no link between them; what is beside a link is somebody else's place
        own = path.is_relative_to(root) and path.parent.resolve() == root.resolve() / path.parent.relative_to(root)
        keep: Keep = "outside" if not own else "shared" if others else ""
        link_to = path.resolve() if path.is_symlink() else None
        moved = own and str(link_to) in places
        stored.append(StoredFile(path, path.stat().st_size, sharing, keep, link_to, moved))
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
        busy = (spec for spec in all_models() if spec.name in jobs)
        needed = {file.path.resolve() for job in busy for file in stored_files(job, found, self.root)}
        files = tuple(
            file for file in stored_files(spec, found, self.root) if not file.keep or (shared and file.keep == "shared")
        )
        for file in files:
            if file.path.resolve() in needed:
                raise FileError(
                    "a job needs these weights", code="model_busy", field=file.path.name, got=file.path,
                    try_instead="wait for the jobs of this model, or cancel them",
                )  # fmt: skip
        return files

    def delete(self, spec: ModelSpec) -> list[Path]:
        """Remove the files of a model that nothing keeps, and folders that are empty then; returns their paths.

        Of a link only the link goes, unless a move of ours made it: then the file on the other disk, too.

        Raises:
            FileError: a job needs one of them: nothing is removed. Or the disk refuses.
        """
        root, files = (self.root or download_root()).absolute(), self.going(spec, shared=False)
        for file in files:
            levels = len(file.path.relative_to(root).parts) - 1
            try:
                if file.moved and file.link_to is not None:
                    _discard(file.link_to, levels)
                    _note_moved(root, gone=[file.link_to])
                _discard(file.path, levels)
            except OSError as error:
                raise FileError(
                    "cannot be deleted", code="delete_refused", field=str(error.filename or file.path),
                    got=error.strerror or error, expected="a folder that this user may write to",
                    try_instead="the right to write there, or the user that it belongs to",
                ) from None  # fmt: skip
        return [file.path for file in files]

    def move(self, spec: ModelSpec, folder: Path) -> Iterator[tuple[str, int, int]]:
        """Copy the files of a model to `folder`, compare the copies by SHA-256, leave a link in the place of each.

        A move that was killed is continued by the next call; files that were moved before are moved on. Yields name,
        bytes done, bytes in all; nothing where all of them are there.

        Raises:
            FileError: a job needs one of them, there is nothing to move, no room, the folder cannot be used, or another
                file is in the way. Each file is then moved or where it was, and no empty folder stays.
        """
        root, folder = (self.root or download_root()).absolute(), folder.absolute()
        files, target = self.going(spec, shared=True), Path(os.path.realpath(folder))
        going = [
            file for file in files
            if file.link_to is None or (file.moved and file.link_to != target / file.path.relative_to(root))
        ]  # fmt: skip
        if not going and not any(file.moved for file in files):
            raise FileError(
                "nothing of this model can be moved", code="move_nothing", field=spec.display_name,
                got="links to files of others" if files else f"no files below {root}",
                expected=f"files below {root}", try_instead="turbodiff models usage",
            )  # fmt: skip
        places, total, done = [target / file.path.relative_to(root) for file in going], sum(f.nbytes for f in going), 0
        try:
            made = _check_target(folder, target, root, list(zip(going, places, strict=True)))
        except OSError as error:
            raise move_failure(folder, total, error) from None
        try:
            for file, place in zip(going, places, strict=True):
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():  # one that is there is somebody's own, and stays when the model is deleted
                    _note_moved(root, here=[place])
                for copied in _copy(file, place):
                    yield file.path.name, done + copied, total
                link = file.path.with_name(f".{file.path.name}.link")
                link.unlink(missing_ok=True)
                link.symlink_to(place)
                link.replace(file.path)  # the name is never without a file
                if file.link_to is not None:
                    _discard(file.link_to, len(file.path.relative_to(root).parts) - 1)
                    _note_moved(root, gone=[file.link_to])
                done += file.nbytes
                yield file.path.name, done, total
        except OSError as error:
            with contextlib.suppress(OSError):
                if error.errno in FULL:  # a part on a full disk helps nobody
                    _part(place).unlink(missing_ok=True)
            raise move_failure(folder, total - done, error) from None
        finally:
            for place in places:
                _remove_empty(place, len(place.relative_to(target).parts) - 1)
            with contextlib.suppress(OSError):
                _note_moved(root, gone=[place for place in places if not place.exists()])
                for empty in made:
                    empty.rmdir()


def move_failure(folder: Path, nbytes: int, error: OSError) -> FileError:
    """The error of a move that the system stopped, with `nbytes` left to move."""
    refused = ("move_refused", "the disk refuses", "the same once more, or another folder")
    code, what, try_instead = MOVE_ERRORS.get(error.errno or 0, refused)
    return FileError(
        what, code=code, field=str(error.filename or folder), got=error.strerror or error,
        expected=gb(nbytes), try_instead=try_instead,
    )  # fmt: skip


def _check_target(folder: Path, target: Path, root: Path, pairs: list[tuple[StoredFile, Path]]) -> list[Path]:
    """Make the folder of a move where it can hold the files; returns the folders made, the innermost first.

    Raises:
        FileError: it lies in the folder of the weights, a name is taken, or there is no room.
        OSError: it is no folder, or may not be made.
    """
    if target.is_relative_to(root.resolve()):
        raise FileError(
            "the weights are in this folder already", code="move_inside", field=str(folder), got=root,
            expected="a folder outside of it", try_instead="a folder on another disk",
        )  # fmt: skip
    for file, place in pairs:
        if place.exists() and place.stat().st_size != file.nbytes:
            raise _taken(place, file)
    with contextlib.suppress(FileNotFoundError):
        folder.stat()  # a link that leads in a circle says so
    needed = sum(file.nbytes for file, _ in pairs)
    needed -= sum(path.stat().st_size for _, place in pairs for path in (place, _part(place)) if path.exists())
    here = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(here).free
    if pairs and needed + RESERVE_BYTES > free:
        same = here.stat().st_dev == root.stat().st_dev
        what = "this is the disk that the weights are on, and has no room for a copy" if same else "not enough room"
        raise FileError(
            what, code="move_same_disk" if same else "move_full", field=str(folder), got=f"{gb(free)} free",
            expected=gb(needed + RESERVE_BYTES), try_instead="a folder on another, larger disk",
        )  # fmt: skip
    made = [path for path in (target, *target.parents) if not path.exists()]
    target.mkdir(parents=True, exist_ok=True)
    return made


def _taken(place: Path, file: StoredFile) -> FileError:
    return FileError(
        "another file has this name", code="move_taken", field=str(place), got=gb(place.stat().st_size),
        expected=f"none, or the content of {file.path} ({gb(file.nbytes)})",
        try_instead="another folder, or take that file away",
    )  # fmt: skip


def _moved_places(root: Path) -> set[str]:
    """Where moves put files of this folder."""
    try:
        with open_file(root / MOVED) as file:
            listed = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return set()
    return {str(place) for place in listed} if isinstance(listed, list) else set()


def _note_moved(root: Path, *, here: Sequence[Path] = (), gone: Sequence[Path] = ()) -> None:
    """Put places on the list of moves before the files are there, and take them off when these are gone.

    Raises:
        OSError: the folder of downloads cannot be written.
    """
    before = _moved_places(root)
    places = (before | set(map(str, here))) - set(map(str, gone))
    if places == before:
        return
    with atomic_write(root / MOVED, durable=True) as part:
        part.write_text(json.dumps(sorted(places)), "utf-8")
    if not places:
        (root / MOVED).unlink()


def _discard(path: Path, levels: int) -> None:
    """Remove a file, and of so many folders above it those that are empty then."""
    path.unlink(missing_ok=True)
    _remove_empty(path, levels)


def _remove_empty(path: Path, levels: int) -> None:
    with contextlib.suppress(OSError):
        for folder in path.parents[:levels]:
            folder.rmdir()


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
        if written is target:
            raise _taken(target, file)
        part.unlink()
        raise FileError(
            "the copy is not the same file", code="move_differs", field=str(target),
            got="other bytes than were written", expected=f"the content of {file.path}",
            try_instead="another disk: this one does not give back what it takes",
        )  # fmt: skip
    if written is part:
        part.replace(target)
    sync(target.parent)


def _part(place: Path) -> Path:
    return place.with_name(f".{place.name}.move")
