"""What is written down about a clip: the settings in its tags, its sidecar, and the worker's last word."""

import time
from pathlib import Path
from typing import Any

from turbodiff.archive.clips import sidecar_path
from turbodiff.media.verify import Verdict
from turbodiff.models.attention import resolve_attention
from turbodiff.models.linear import int8_mode
from turbodiff.runtime.attempt import Run
from turbodiff.runtime.report import installed
from turbodiff.spec.clips import SIDECAR_VERSION, Measured, Predicted, Ran, Sidecar
from turbodiff.spec.events import ResultEvent

LIBRARIES = ("turbodiff", "torch", "triton", "diffusers", "transformers")


def settings(run: Run) -> dict[str, Any]:
    """What made the clip: request and plan as JSON, for the tags of the mp4."""
    recipe = {"request": run.request.model_dump(mode="json"), "plan": run.plan.model_dump(mode="json")}
    return {"turbodiff": installed("turbodiff"), "job": run.job.id, **recipe}


def sidecar(run: Run, verdict: Verdict) -> Sidecar:
    """The sidecar of a verified clip."""
    request = run.request
    return Sidecar(
        v=SIDECAR_VERSION,
        created=run.created,
        job=run.job.id,
        attempt=run.job.attempt,
        request=request,
        plan=run.plan,
        ran=ran(run),
        versions={name: installed(name) for name in LIBRARIES},
        sha256=verdict.sha256,
        frames=verdict.frames,
        width=request.width,
        height=request.height,
        fps=request.fps,
        warnings=verdict.warnings,
        predicted=Predicted(peak_bytes=run.plan.peak_bytes, seconds=run.plan.seconds),
        measured=measured(run),
    )


def ran(run: Run) -> Ran:
    """What really ran, which a wish or a fall-back may have made different from what was asked."""
    request = run.request
    attention = resolve_attention(request.attention, run.shelf.device.torch_device)
    did: dict[str, Any] = {"attention": attention.kind, "backend": attention.backend}
    did["quant_linear"] = request.quant_linear
    if request.quant_linear == "on":
        did["int8"] = int8_mode()
    return Ran.model_validate(did | run.shelf.facts())


def measured(run: Run) -> Measured:
    """Seconds and peak bytes, in all and per phase."""
    return Measured(
        seconds=round(time.monotonic() - run.started_s, 3),
        peak_bytes=max(run.peaks_bytes.values(), default=0),
        phase_seconds={name: round(value, 3) for name, value in run.seconds.items()},
        phase_peak_bytes=dict(run.peaks_bytes),
    )


def result(run: Run, clip: Path, verdict: Verdict) -> ResultEvent:
    """The `result` event."""
    request = run.request
    return ResultEvent(
        path=str(clip),
        sidecar=str(sidecar_path(clip)),
        sha256=verdict.sha256,
        frames=verdict.frames,
        width=request.width,
        height=request.height,
        fps=request.fps,
        warnings=verdict.warnings,
        ran=ran(run),
        **measured(run).model_dump(),
    )
