"""The page's reader of the studio: at most twice a second for all tabs, as one typed snapshot."""

import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbodiff.spec.errors import RequestError
from turbodiff.spec.files import atomic_write
from turbodiff.spec.plan import Plan
from turbodiff.studio import Studio, doctor, pictures
from webui import form
from webui.view import Snapshot

FRESH_S = 0.5
QUIET_S = 1.0
CLIPS_FRESH_S = 3.0
REPORT_FRESH_S = 3600.0
CLIP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,160}")


@dataclass(frozen=True)
class ClipView:
    """A clip as the views read it; `id` is its file name without .mp4."""

    id: str
    path: Path
    poster: Path | None
    request: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    result: Mapping[str, Any]
    seed: int | None
    created_s: float
    rating: str = ""
    note: str = ""


def shot(clip: Any) -> ClipView:
    """A clip of the library (its path, its sidecar, its poster) as the views read it."""
    sidecar = clip.sidecar.model_dump(mode="json") if clip.sidecar else {}
    request = sidecar.get("request") or {}
    flaws = sidecar.get("warnings") or ()
    result = {"ran": sidecar.get("ran") or {}, "flaws": flaws, **(sidecar.get("measured") or {})}
    return ClipView(
        id=clip.path.stem,
        path=clip.path,
        poster=clip.poster,
        request=request,
        plan=sidecar.get("plan"),
        result=result,
        seed=request.get("seed"),
        created_s=clip.created.timestamp() if clip.created else 0.0,
        rating=str(sidecar.get("rating") or ""),
        note=str(sidecar.get("note") or ""),
    )


class CachedValue:
    """A value that is read again when it is older than `fresh_s`: later readers take the old one while one thread reads
    the new one. The first reader waits, and so does one who comes after a long quiet time: nobody sees old news."""

    def __init__(self, read: Callable[[], Any], fresh_s: float) -> None:
        self._read, self._fresh_s = read, fresh_s
        self.value: Any = None
        self._at_s: float | None = None
        self._lock = threading.Lock()

    def __call__(self) -> Any:
        at_s = self._at_s
        if at_s is None:
            with self._lock:
                if self._at_s is None:
                    self._refresh()
        elif time.monotonic() - at_s > QUIET_S + 2 * self._fresh_s:
            self.now()
        elif time.monotonic() - at_s > self._fresh_s and self._lock.acquire(blocking=False):
            threading.Thread(target=self._refresh_and_release, daemon=True).start()
        return self.value

    def now(self) -> Any:
        """The value as it is now, read in this thread."""
        with self._lock:
            self._refresh()
        return self.value

    def _refresh_and_release(self) -> None:
        try:
            self._refresh()
        finally:
            self._lock.release()

    def _refresh(self) -> None:
        self.value = self._read()
        self._at_s = time.monotonic()


class StudioReader:
    """One studio for many tabs."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._machine = CachedValue(studio.machine, 1.0)
        self._clips = CachedValue(self._read_clips, CLIPS_FRESH_S)
        self._models = CachedValue(lambda: tuple(studio.models()), 10.0)
        self._inventory = CachedValue(studio.inventory, 5.0)
        self._offers = CachedValue(studio.offers, 10.0)
        self._loras = CachedValue(studio.loras, 10.0)
        self._tier = CachedValue(studio.tier, 60.0)
        self._holders = CachedValue(lambda: (studio.holders(), tuple(studio.leftovers())), 2.0)
        self._snapshot = CachedValue(self._read, FRESH_S)
        self._report = CachedValue(doctor, REPORT_FRESH_S)
        self._report_started = False
        self._restart: int | None = None
        self._done: tuple[int, int] | None = None

    def snapshot(self) -> Snapshot:
        """What there is to show, at most half a second old."""
        snapshot: Snapshot = self._snapshot()
        return snapshot

    def changed(self) -> None:
        """Something was just changed from a tab: show it at once."""
        self._snapshot.now()

    def clips_changed(self) -> None:
        """A clip's sidecar was just changed."""
        self._clips.now()

    def rescan(self) -> None:
        """Look for weights again."""
        self._inventory.now()
        self._models.now()
        self._offers.now()
        self._loras.now()

    def estimate(self, fields: Mapping[str, Any], policy: Any = "auto") -> Plan:
        """The plan for a form on the machine as it was a moment ago.

        Raises:
            TurbodiffError: not a legal request, or nothing fits.
        """
        return self.studio.plan(fields, self._machine(), self._inventory(), policy)

    def asked(self, values: Mapping[str, Any], keep: bool = False) -> dict[str, Any]:
        """The form's values as fields of a request, with files of this machine for names; `keep` copies the picture.

        Raises:
            RequestError: a picture that was not uploaded, a LoRA that is not here.
        """
        fields = form.request_fields(values)
        if fields.get("image"):
            picture = self.own(Path(str(fields["image"])))
            fields["image"] = self.keep_picture(picture) if keep else str(picture)
        if fields.get("loras"):
            fields["loras"] = [self._lora(row) for row in fields["loras"]]
        return fields

    def _lora(self, row: Mapping[str, Any]) -> dict[str, Any]:
        for file in self.loras():
            if row["name"] in (file.name, file.path.name):
                return {"path": str(file.path), "strength": row["strength"], "expert": row["expert"]}
        raise RequestError("no such LoRA here", code="lora_missing", field="lora", got=row["name"][:80])

    def loras(self) -> tuple[Any, ...]:
        """The LoRA files on this disk, as of a moment ago."""
        found: tuple[Any, ...] = self._loras()
        return found

    def here(self) -> dict[str, bool]:
        """Which models have their files on this disk."""
        return {spec.name: not missing for spec, missing in self._models()}

    def tier(self) -> Any:
        """The tier of this machine's card, or None."""
        return self._tier()

    def restart(self) -> None:
        """Ask the supervisor for a fresh worker."""
        self._restart = self.studio.restart(by="page")

    def report(self) -> tuple[Mapping[str, Any], bool]:
        """Versions and warnings, and whether they have been read: torch takes seconds to say so, in its own process."""
        if self._report.value is None:
            if not self._report_started:
                self._report_started = True
                threading.Thread(target=self._report.now, daemon=True).start()
            return {}, False
        return self._report.value, True

    def clip(self, name: str) -> ClipView | None:
        """The clip of that id, or None; only names that the library itself lists are ever looked up."""
        if not CLIP_NAME.fullmatch(name):
            return None
        clips = self._clips()
        found = next((shot for shot in clips if shot.id == name), None)
        return found or next((shot for shot in self._clips.now() if shot.id == name), None)

    def own(self, picture: Path) -> Path:
        """A picture that was uploaded here, or made here from a clip.

        Raises:
            RequestError: neither; a path that a program sends is never read.
        """
        home = (self.studio.state / "uploads").resolve()
        if home not in picture.resolve().parents or not picture.is_file():
            raise RequestError("not an upload of this page", code="image_remote", field="image", got=picture.name[:80])
        return picture

    def frame(self, clip: ClipView, at: str) -> Path:
        """The frame that a clip shows after `at` seconds, as a picture; the last one where that is no number.

        Raises:
            FileError: the clip cannot be read.
        """
        last = max(0, int(clip.request.get("num_frames") or 1) - 1)
        seconds = float(at) if re.fullmatch(r"\d{1,4}(\.\d{1,9})?", at) else None
        number = last if seconds is None else min(last, int(seconds * float(clip.request.get("fps") or 16)))
        return pictures.frame(clip.path, number, self.studio.state / "uploads" / "frames")

    def keep_picture(self, upload: Path) -> str:
        """A copy of an uploaded picture below the state folder, named by its content: uploads are swept after a day."""
        data = upload.read_bytes()
        kept = self.studio.state / "pictures" / f"{hashlib.sha256(data).hexdigest()[:24]}{upload.suffix.lower()[:8]}"
        if not kept.exists():
            with atomic_write(kept) as part:
                part.write_bytes(data)
        return str(kept)

    def picture_again(self, kept: str) -> str | None:
        """A picture of an earlier request of this page, where Gradio may show it; None for any other."""
        home, name = self.studio.state / "pictures", Path(kept).name
        if not kept or Path(kept) != home / name or not Path(kept).is_file():
            return None
        shown = self.studio.state / "uploads" / "again" / name
        shown.parent.mkdir(parents=True, exist_ok=True)
        if not shown.exists():
            shutil.copyfile(kept, shown)
        return str(shown)

    def row_of(self, clip: str) -> int:
        """The archive's row of a clip.

        Raises:
            RequestError: the archive does not know it yet.
        """
        for seed in self.studio.seeds(limit=10_000):
            if seed.path and Path(seed.path).stem == clip:
                return seed.id
        raise RequestError("no such clip", code="clip_unknown", field="clip", got=clip[:80])

    def _read(self) -> Snapshot:
        studio = self.studio
        jobs = tuple(studio.jobs(80))
        done = (jobs[0].id if jobs else 0, sum(job.state == "done" for job in jobs))
        if self._done is not None and done != self._done:  # a job ended: its clip is there
            self._clips.now()
        self._done = done
        held, left = self._holders()
        return Snapshot(
            machine=self._machine(),
            jobs=jobs,
            clips=tuple(self._clips()),
            log=tuple(studio.log_tail(300)),
            models=self._models(),
            offers=self._offers(),
            downloads={name: studio.download(name) for name in self._offers()},
            holders=held,
            leftovers=left,
            paused=studio.paused,
            policy=studio.policy,
            selftest=studio.selftest(),
            tier=self._tier(),
            restarted=studio.restart_outcome(self._restart) if self._restart is not None else None,
            now_s=time.time(),
        )

    def _read_clips(self) -> list[ClipView]:
        return [shot(clip) for clip in self.studio.clips(200)]
