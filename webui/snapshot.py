"""What the studio says, typed: one Snapshot for all tabs, read at most once a second, and the reads behind it."""

import contextlib
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from turbodiff.spec.cached import CachedValue
from turbodiff.spec.clips import UNKNOWN_REQUEST, Sidecar, clip_id, clip_stem, read_record
from turbodiff.spec.errors import RequestError
from turbodiff.spec.files import atomic_write
from turbodiff.spec.jobs import ACTIVE, Outcome, QueuedJob, Recovered
from turbodiff.spec.models import ModelSpec, PassedOver
from turbodiff.spec.plan import Change, Plan
from turbodiff.spec.request import Request
from turbodiff.studio import (
    HOST_COMMAND,
    CardHolders,
    Clip,
    Download,
    Fleet,
    Holder,
    Identity,
    Installed,
    LoraFacts,
    Machine,
    Move,
    Offer,
    Outlook,
    Policy,
    SelfTest,
    StoredFile,
    Studio,
    Tier,
    doctor,
    pictures,
    pretend,
)
from turbodiff.studio.cards import ClusterFacts
from webui import form

FRESH_S = 0.9  # all tabs share one reading
CLIPS_FRESH_S = 5.0  # a clip that is made here shows at once; it reads 200 sidecars
OFFERS_FRESH_S = 30.0  # how each model would run on this card, over again as free memory moves: dozens of plans
HOLDERS_FRESH_S = 5.0  # without NVML's list it looks at what every program has open
REPORT_FRESH_S = 3600.0
RESTART_NEWS_S = 30.0  # as long as what a restart brought back is shown
MAX_JOBS, MAX_CLIPS, LOG_LINES = 40, 200, 300  # read at most


@dataclass(frozen=True)
class ClipView:
    """A clip as the panels read it; `id` is its file name without .mp4."""

    id: str
    path: Path
    poster: Path | None
    sidecar: Sidecar  # of unknown settings where the file says nothing
    created_s: float = 0.0

    @property
    def request(self) -> Request:
        """What made the clip."""
        return self.sidecar.request

    @property
    def changes(self) -> tuple[Change, ...]:
        """What the planner changed of the request."""
        return self.sidecar.plan.changes if self.sidecar.plan else ()


def clip_view(clip: Clip) -> ClipView:
    """A clip of the library as the panels read it."""
    sidecar = clip.sidecar or read_record(Sidecar, {"request": dict(UNKNOWN_REQUEST)})
    assert sidecar is not None
    return ClipView(
        clip_id(clip.path.stem), clip.path, clip.poster, sidecar, clip.created.timestamp() if clip.created else 0.0
    )


@dataclass(frozen=True)
class Snapshot:
    """Everything the page shows at one moment, read once for all tabs; jobs and clips are the newest first."""

    machine: Machine | None = None
    fleet: Fleet | None = None  # the cards, and what waits for them
    cluster: ClusterFacts | None = None  # the other machines that work for this queue
    jobs: tuple[QueuedJob, ...] = ()
    queued: int = 0  # how many wait, listed or not
    clips: tuple[ClipView, ...] = ()
    log: tuple[str, ...] = ()
    models: tuple[tuple[ModelSpec, list[str]], ...] = ()  # what is missing of each
    passed_over: tuple[PassedOver, ...] = ()  # files of the search roots that no model uses
    installed: Mapping[str, Installed] = field(default_factory=dict)  # model name -> the networks that are here
    offers: Mapping[str, tuple[Offer, ...]] = field(default_factory=dict)  # model name -> what there is to download
    downloads: Mapping[str, Download] = field(default_factory=dict)  # model name -> how its download is doing
    stored: Mapping[str, tuple[StoredFile, ...]] = field(default_factory=dict)  # model name -> its files on this disk
    moves: Mapping[str, Move] = field(default_factory=dict)  # model name -> how its move to another disk does
    mirror: str = ""  # the server that a person chose for downloads
    holders: tuple[CardHolders, ...] = ()
    host_command: str = HOST_COMMAND  # lists the holders where they cannot be seen from here
    leftovers: tuple[Identity, ...] = ()
    paused: bool = False
    held_until_s: float = 0.0  # no job starts before it
    policy: Policy = "auto"
    selftest: SelfTest | None = None
    tier: Tier | None = None  # of this machine's card
    restarted: Outcome | None = None  # what came of the last restart
    recovered: Recovered | None = None  # what the last start brought back of the queue
    now_s: float = 0.0

    def job(self, number: int) -> QueuedJob | None:
        """The job of that id, if it is still listed."""
        return next((job for job in self.jobs if job.id == number), None)

    @property
    def active(self) -> QueuedJob | None:
        """The job that is running."""
        return next((job for job in self.jobs if job.state in ACTIVE), None)

    @cached_property
    def waiting(self) -> list[QueuedJob]:
        """Jobs in the queue, the next one first."""
        return sorted((job for job in self.jobs if job.state == "queued"), key=lambda job: (job.place, job.id))

    def holder_rows(self, uuid: str | None = None) -> Iterator[Holder]:
        """Who holds memory of the card of that id, by default of any."""
        return (row for card in self.holders if uuid in (None, card.uuid) for row in card.rows)


def no_such_clip(name: str) -> RequestError:
    """The error for the id of a clip that is not here, or not any more."""
    return RequestError("no such clip", code="clip_unknown", field="clip", got=name[:80])


class StudioReader:
    """One studio for many tabs: what is read often is kept for a moment, files come from places of ours only."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.acted = 0  # how many changes were made from tabs
        self.snapshot = CachedValue(self._read, FRESH_S)
        self.loras = CachedValue(studio.loras, 10.0)
        self.tier = CachedValue(studio.tier, 60.0)
        self.report = CachedValue(doctor, REPORT_FRESH_S)
        self._machine = CachedValue(studio.machine, 1.0)
        self._clips = CachedValue(lambda: tuple(map(clip_view, studio.clips(MAX_CLIPS))), CLIPS_FRESH_S)
        self._models = CachedValue(lambda: tuple(studio.models()), 10.0)
        self.inventory = CachedValue(studio.inventory, 5.0)
        self._offers = CachedValue(studio.offers, OFFERS_FRESH_S)
        self._installed = CachedValue(studio.installed, OFFERS_FRESH_S)
        self._stored = CachedValue(studio.storage.stored, 10.0)
        self._history = CachedValue(studio.history, 5.0)
        self._holders = CachedValue(lambda: (studio.holders(), tuple(studio.leftovers())), HOLDERS_FRESH_S)
        self._restart: int | None = None
        self._restart_seen_s = math.inf  # when its outcome was first read
        self._done: tuple[int, int] | None = None
        self._missing: object = None  # of each model, when it was last read

    def _read(self) -> Snapshot:
        studio = self.studio
        jobs, queued = studio.overview(MAX_JOBS)
        done = (jobs[0].id if jobs else 0, sum(job.state == "done" for job in jobs))
        if self._done is not None and done != self._done:  # a job ended: its clip is there
            self._clips.now()
            self.studio.clip_index.refresh_soon(0)
        self._done = done
        models = self._models()
        if self._missing not in (None, models):  # a file came or went
            self._offers.now()
            self._installed.now()
        self._missing = models
        holders, leftovers = self._holders()
        return Snapshot(
            machine=self._machine(),
            fleet=studio.cards.fleet(),
            cluster=studio.cards.cluster(),
            jobs=tuple(jobs),
            queued=queued,
            clips=self._clips(),
            log=tuple(studio.log_tail(LOG_LINES)),
            models=models,
            passed_over=self.inventory().passed_over,
            installed=self._installed(),
            offers=self._offers(),
            downloads={name: studio.downloads.of(name) for name in self._offers()},
            stored=self._stored(),
            moves={name: studio.downloads.moving(name) for name, files in self._stored().items() if files},
            mirror=studio.downloads.mirror,
            holders=holders,
            leftovers=leftovers,
            paused=studio.paused,
            held_until_s=studio.waiting.held_until_s,
            policy=studio.policy,
            selftest=studio.selftest(),
            tier=self.tier(),
            restarted=self.restarted(),
            recovered=studio.recovered,
            now_s=time.time(),
        )

    def changed(self, clips: bool = False) -> None:
        """Something was just changed from a tab, with `clips` the sidecar of a clip: show it at once.

        What cannot be shown is no failure of the change, which is done: a client that was told so would ask again.
        """
        self.acted += 1
        with contextlib.suppress(Exception):
            if clips:
                self._clips.now()
                self.studio.clip_index.refresh()
            self.snapshot.now()

    def rescan(self) -> None:
        """Look for weights again."""
        for cached in (self.inventory, self._models, self._offers, self._installed, self._stored, self.loras):
            cached.now()

    def restart(self) -> None:
        """Ask the supervisor for a fresh worker."""
        self._restart, self._restart_seen_s = self.studio.restart(by="page"), math.inf

    def restarted(self) -> Outcome | None:
        """What came of the last restart, while it is news."""
        outcome = self.studio.restart_outcome(self._restart) if self._restart is not None else None
        if outcome is not None:
            self._restart_seen_s = min(self._restart_seen_s, time.monotonic())
            if time.monotonic() > self._restart_seen_s + RESTART_NEWS_S:
                self._restart = outcome = None
        return outcome

    def here(self) -> dict[str, bool]:
        """Which models have their files on this disk, or on a machine that works for this queue."""
        there = self.studio.cards.models_there()
        return {spec.name: not missing or spec.name in there for spec, missing in self._models()}

    def _machine_with(self, card: str) -> Machine:
        """The machine as it was a moment ago; with a card of so many GiB in place of its own, "" for its own."""
        return pretend(self._machine(), float(card)) if card in form.CARDS else self._machine()

    def estimate(self, fields: Mapping[str, object], policy: Policy = "auto", card: str = "") -> Plan:
        """The plan for a form on the machine as it was a moment ago, or on a pretended `card` of so many GiB.

        Raises:
            TurbodiffError: not a legal request, or nothing fits.
        """
        return self.studio.plan(fields, self._machine_with(card), self.inventory(), policy, self._history())

    def outlook(self, fields: Mapping[str, object], card: str = "") -> Outlook:
        """Whether a form fits the machine as it was a moment ago, or a pretended card, and the seconds it would take.

        Raises:
            TurbodiffError: not a legal request.
        """
        return self.studio.outlook(fields, self._machine_with(card), self.inventory(), self._history())

    def count_tokens(self, model: str, prompt: str) -> int | None:
        """Tokens of a prompt for a model's encoder; None while its tokenizer is not on this disk."""
        return self.studio.count_tokens(model, prompt, self.inventory())

    def asked(self, values: Mapping[str, Any], keep: bool = False) -> dict[str, Any]:
        """The form's values as fields of a request, with files of this machine for names.

        Args:
            keep: copy the picture below the state folder, named by its content: uploads are swept. It is looked at
                first: what the page has shown is known already, and what cannot be read makes no job.

        Raises:
            RequestError: a picture that was not uploaded, a LoRA that is not here.
            FileError: with `keep`, not a picture that can be used.
        """
        fields = form.request_fields(values)
        for name in [name for name in form.PICTURES if fields.get(name)]:
            upload = picture = self.own(Path(str(fields[name])))
            if keep:
                pictures.look(upload)
                data = upload.read_bytes()
                picture = (
                    self.studio.state
                    / "pictures"
                    / (f"{hashlib.sha256(data).hexdigest()[:24]}{upload.suffix.lower()[:8]}")
                )
                if not picture.exists():
                    with atomic_write(picture) as part:
                        part.write_bytes(data)
            fields[name] = str(picture)
        if fields.get("continues"):
            fields["continues"] = str(self.clip_called(str(fields["continues"])).path)
            fields.pop("image", None)
        # of two files that answer to a name the first one
        paths = {name: str(file.path) for file in reversed(self.loras()) for name in (file.path.name, file.name)}
        for row in fields.get("loras", ()):
            name = row.pop("name")
            if name not in paths:
                raise RequestError("no such LoRA here", code="lora_missing", field="lora", got=name[:80])
            row["path"] = paths[name]
        return fields

    def lora_facts(self, name: str) -> tuple[LoraFacts, bytes | None]:
        """What the LoRA of that name says of itself and its picture; nothing for one that is not here."""
        path = next((file.path for file in self.loras() if name in (file.name, file.path.name)), None)
        return (self.studio.lora_facts(path), self.studio.lora_picture(path)) if path else (LoraFacts(), None)

    def clip(self, name: str) -> ClipView | None:
        """The clip of that id, however old, or None; a name that is no plain file name is never looked up."""
        if not (stem := clip_stem(name)):
            return None
        found = next((clip for clip in self._clips() if clip.id == name), None)
        older = None if found else self.studio.clip(stem)
        return clip_view(older) if older else found

    def clip_called(self, name: str) -> ClipView:
        """The clip of that id.

        Raises:
            RequestError: there is none.
        """
        found = self.clip(name)
        if found is None:
            raise no_such_clip(name)
        return found

    def own(self, picture: Path) -> Path:
        """A picture that was uploaded here, or made here from a clip.

        Raises:
            RequestError: neither; a path that a program sends is never read.
        """
        home = (self.studio.state / "uploads").resolve()
        if home not in picture.resolve().parents or not picture.is_file():
            raise RequestError("not an upload of this page", code="image_remote", field="image", got=picture.name[:80])
        with contextlib.suppress(OSError):  # used now: a form that stands open keeps its picture (uploads.py)
            os.utime(picture)
        return picture

    def frame(self, clip: ClipView, at: str) -> Path:
        """The frame that a clip shows after `at` seconds, as a picture; the last one where that is no number.

        Raises:
            FileError: the clip cannot be read.
        """
        number = clip.sidecar.whole_frames - 1
        if re.fullmatch(r"\d{1,4}(\.\d{1,9})?", at):
            number = min(number, int(float(at) * clip.request.fps))
        return pictures.frame(clip.path, number, self.studio.state / "uploads" / "frames")

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

    def rate(self, clip: str, cells: Mapping[str, str]) -> None:
        """Rate a clip or note something: in the archive of seeds, or in its sidecar alone where that has no row of it.

        Raises:
            TurbodiffError: too long, or it cannot be written.
        """
        row = self.studio.seed(clip=clip_stem(clip))
        if row is not None:
            self.studio.rate(row.id, **cells)
        elif not self.studio.clip_index.edit([clip], **cells):
            raise no_such_clip(clip)
