"""Noise to latents: the steps of a sampler, and one network at a time on the device."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from turbodiff.runtime import offload, preview
from turbodiff.runtime.attempt import Run
from turbodiff.runtime.embeddings import TextRows
from turbodiff.sampling import rcm, unipc
from turbodiff.sampling.noise import Noise
from turbodiff.sampling.rcm import Step
from turbodiff.sampling.schedule import network_timesteps, rcm_timesteps
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import NoticeEvent, StepEvent
from turbodiff.spec.plan import PhaseName
from turbodiff.spec.request import Request


@torch.inference_mode()
def denoise(run: Run, text: TextRows, condition: Tensor | None, negative: TextRows | None = None) -> Tensor:
    """Latents [1, 16, T, H, W], float32 on the CPU, from the noise of the request's seed.

    Raises:
        TurbodiffError: code nan_latents, where the latents stop being numbers.
    """
    turns = ExpertSwitcher(run, text, condition, negative)
    progress = Progress(run)
    latents = None
    with turns:
        for step in steps_of(run, turns.velocity):
            progress.after(step, turns.expert)
            latents = step.latents
            if run.orders.decode_now(run.job.id):
                latents = step.clean
                break
    assert latents is not None
    return latents.float().cpu()


def steps_of(run: Run, velocity: Callable[[Tensor, float], Tensor]) -> Iterator[Step]:
    """The steps of the request's sampler on the noise of its seed."""
    request, device = run.request, run.shelf.device.torch_device
    noise = Noise(request.seed or 0, (1, *request.shape.latent), request.noise_device)

    def draw() -> Tensor:
        return offload.to_device(noise(), device)

    if request.sampler == "unipc":
        return unipc.sample(velocity, draw, request.steps, request.shift)
    return rcm.sample(velocity, draw, times_of(request), request.sampler)


def times_of(request: Request) -> Tensor:
    """When the network is asked, float64 [steps + 1]."""
    if request.sampler == "unipc":
        return unipc.unipc_timesteps(request.steps, request.shift)
    return rcm_timesteps(request.steps, request.sigma_max)


class ExpertSwitcher:
    """The networks taking turns: each expert gets its phase, is on the device for its steps only, and leaves."""

    def __init__(self, run: Run, text: TextRows, condition: Tensor | None, negative: TextRows | None) -> None:
        self._run, self._text, self._condition, self._negative = run, text, condition, negative
        self._experts = iter(run.request.experts)
        self._open: Any = None
        self._network: Any = None
        self.expert = ""

    def __enter__(self) -> "ExpertSwitcher":
        return self

    def __exit__(self, *error: Any) -> None:
        self._leave(*error)

    def velocity(self, latents: Tensor, t: float) -> Tensor:
        """Velocity float32 of latents [1, 16, T, H, W] at time t, from the expert whose turn it is."""
        expert = next(self._experts)
        if expert != self.expert:
            self._leave(None, None, None)
            self._enter(expert)
        return self._network(latents.float(), offload.to_device(network_timesteps(t, 1), latents.device))

    def _enter(self, expert: str) -> None:
        self._open = self._visit(expert)
        self.expert = expert
        self._network = next(self._open)

    def _visit(self, expert: str) -> Any:
        name: PhaseName = "denoise" if expert == "single" else f"denoise_{expert}"  # type: ignore[assignment]
        run = self._run
        with run.phase(name), run.shelf.network(expert, run.plan) as network:
            for note in run.shelf.lora_notes(expert, run.request):
                run.say(NoticeEvent(key="lora_names_unused", text=note, numbers={}))
            network.begin(self._text, self._condition, self._negative, run.request.guidance)
            yield network

    def _leave(self, kind: Any, error: Any, traceback: Any) -> None:
        visit, self._open, self._network = self._open, None, None
        if visit is None:
            return
        if error is None:
            next(visit, None)
        else:
            visit.throw(error)


class Progress:
    """After every step: is it finite, how long is left, what does it look like, does anybody want to stop."""

    def __init__(self, run: Run) -> None:
        self._run, self._last_s = run, time.monotonic()

    def after(self, step: Step, expert: str) -> None:
        """Report one step.

        Raises:
            TurbodiffError: the latents are not finite.
            CancelledByUser: a person stopped the job.
        """
        run, done, total = self._run, step.index + 1, self._run.request.steps
        if not bool(torch.isfinite(step.latents).all()):
            raise not_finite(done, total, run.request.attention)
        now_s = time.monotonic()
        step_s, self._last_s = now_s - self._last_s, now_s
        eta_s = step_s * (total - done)
        run.say(StepEvent(i=done, n=total, t=step.t, expert=expert, dt_s=step_s, eta_s=eta_s))
        if done < total:
            preview.show(run, step.clean, done)
        run.check_cancelled()


def not_finite(step: int, total: int, attention: str) -> TurbodiffError:
    """Latents that are no numbers any more."""
    return TurbodiffError(
        f"the latents are not numbers any more after step {step} of {total}",
        code="nan_latents",
        field="attention",
        got=attention,
        expected="finite latents",
        try_instead="--attention dense; if it stays, turbodiff models verify",
    )
