"""WHAT EACH PANEL SHOWS: pure functions from one snapshot of the studio to words and numbers. No Gradio, no markup.

Lives here: Snapshot, and one module per panel. Never here: clicks, HTML, the store.
Who may knock: webui.panels and webui.page.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from turbodiff.spec.jobs import QueuedJob

if TYPE_CHECKING:
    from turbodiff.plan.hardware import Machine

ACTIVE = ("running", "verifying")
WAITING = ("queued", "parked")
SHORT_NAMES = {"Wan2.1-1.3B": "1.3B", "Wan2.1-14B": "14B", "Wan2.2-A14B": "A14B"}


@dataclass(frozen=True)
class Snapshot:
    """Everything the page shows at one moment, read once for all tabs; jobs and clips are the newest first."""

    machine: "Machine | None" = None
    jobs: tuple[QueuedJob, ...] = ()
    clips: tuple[Any, ...] = ()
    log: tuple[str, ...] = ()
    models: tuple[Any, ...] = ()  # (spec, what is missing)
    offers: Mapping[str, Any] = field(default_factory=dict)  # model name -> files that suit this card
    downloads: Mapping[str, Any] = field(default_factory=dict)  # model name -> how its download is doing
    holders: tuple[Any, ...] = ()
    leftovers: tuple[Any, ...] = ()
    paused: bool = False
    policy: str = "auto"
    selftest: Any = None  # how the self-test is doing
    tier: Any = None  # of this machine's card
    restarted: Mapping[str, Any] | None = None  # what came of the last restart
    now_s: float = 0.0

    def job(self, number: int | None) -> QueuedJob | None:
        """The job of that id, if it is still listed."""
        return next((job for job in self.jobs if job.id == number), None)

    @property
    def active(self) -> QueuedJob | None:
        """The job that is running."""
        return next((job for job in self.jobs if job.state in ACTIVE), None)

    @property
    def waiting(self) -> list[QueuedJob]:
        """Jobs in the queue, the next one first."""
        return sorted((job for job in self.jobs if job.state == "queued"), key=lambda job: (job.place, job.id))


def short_model(display_name: str) -> str:
    """The model's name as a button has room for it: Wan2.1-14B is 14B."""
    return SHORT_NAMES.get(display_name, display_name)
