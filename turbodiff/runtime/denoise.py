"""Noise to latents: the steps of a sampler, each by the expert whose turn it is, one expert on the device at a time."""

import copy
import time
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from turbodiff.models.attention import DENSE, AttentionPlan, rope_tables
from turbodiff.models.parallel import SequenceParallel
from turbodiff.models.patches import PATCH
from turbodiff.models.wan_dit import BlockInputs, CrossAttentionCache
from turbodiff.runtime import offload, preview
from turbodiff.runtime.attempt import Attempt, work_of
from turbodiff.runtime.elastic import Elastic
from turbodiff.runtime.model_cache import PlacedDit
from turbodiff.runtime.ranks import Ranks
from turbodiff.runtime.step_graph import GraphedSteps, usable
from turbodiff.runtime.text import TextRows
from turbodiff.sampling import samplers, unipc
from turbodiff.sampling.conditioning import Noise
from turbodiff.sampling.rcm import network_timesteps
from turbodiff.spec.errors import TurbodiffError
from turbodiff.spec.events import Notice, NoticeEvent, StepEvent
from turbodiff.spec.experts import Expert
from turbodiff.spec.plan import Levers, Plan
from turbodiff.spec.request import Request

Result = TypeVar("Result")
LEVERS = Levers()


@torch.inference_mode()
def denoise(
    attempt: Attempt, text: TextRows, condition: Tensor | None, negative: TextRows | None = None,
    features: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Latents [1, 16, T, H, W], float32 on the CPU, from the noise of the request's seed.

    Consecutive steps of one expert are one phase, in which that expert alone is on the device. After every step the
    latents are checked, the step and a preview are reported, and a person may cancel or ask to decode what there is.
    On a GPU fewer blocks stay there while another program grows, see runtime/elastic.py.

    Raises:
        TurbodiffError: code nan_latents, where the latents are no longer finite.
        CancelledByUser: a person stopped the job.
    """
    request, models, ranks = attempt.request, attempt.models, attempt.ranks
    device = models.device.torch_device
    attention = AttentionPlan(attempt.attention().kind, request.topk)
    noise = Noise(request.seed or 0, (1, *request.shape.latent), request.noise_device)
    evaluate: Callable[[Tensor, Tensor], Tensor] | None = None
    parallel = None if ranks is None else ranks.parallel.exchanging(attempt.plan.levers.exchange)

    def velocity(latents: Tensor, t: float) -> Tensor:
        assert evaluate is not None
        return evaluate(latents.float(), offload.sent(network_timesteps(t, 1), device))

    def draw() -> Tensor:
        return offload.sent(noise(), device)

    steps = samplers.sample(velocity, draw, request.sampler, request.steps, request.sigma_max, request.shift)
    last_s, decode_now = time.monotonic(), False
    for expert, turns in groupby(request.experts):
        with attempt.phase(expert.phase), models.dit(expert, attempt.plan, parallel) as placed:
            for note in placed.lora_notes:
                attempt.send(NoticeEvent(**note.model_dump()))
            levers = attempt.plan.levers
            guidance = request.guidance_of(expert)
            against = negative if guidance > 1 else None
            elastic = Elastic(attempt, expert.phase, placed) if models.device.is_cuda and ranks is None else None
            given = text, condition, against, guidance, attention, levers, features
            if ranks is not None:
                begin_shared(ranks, attempt.plan, expert, *given)
            evaluate = evaluation(attempt, expert, Network(placed, device, *given, elastic, parallel))
            for _ in turns:
                step = next(steps)
                done, now_s = step.index + 1, time.monotonic()
                if not bool(torch.isfinite(step.latents).all()):
                    raise not_finite(request, done)
                took_s, last_s = now_s - last_s, now_s
                times = {"t": step.t, "dt_s": took_s, "eta_s": took_s * (request.steps - done)}
                attempt.send(StepEvent(i=done, n=request.steps, expert=expert, **times))
                if done < request.steps:
                    preview.show(attempt, step.clean, done)
                attempt.check_cancelled()
                if decode_now := attempt.id in attempt.commands.decode_now:
                    break
            evaluate = None  # the network's text cache must leave the device before the next expert comes
        if decode_now:
            break
    return (step.clean if decode_now else step.latents).float().cpu()


def evaluation(attempt: Attempt, expert: Expert, network: "Network") -> Callable[[Tensor, Tensor], Tensor]:
    """What evaluates an expert's network: the processes that share the clip, or this one, whose steps become graphs
    where they may (runtime/step_graph.py)."""

    def tell(note: Notice) -> None:
        attempt.send(NoticeEvent(**note.model_dump()))

    if attempt.ranks is not None:
        return partial(attempt.ranks.evaluate, network)
    if not usable(attempt.models.device):
        return network
    steps = attempt.request.experts.count(expert)
    has_room = partial(attempt.models.has_room, attempt.plan, work_of(attempt.plan, expert.phase))
    return GraphedSteps(attempt.models.graphs, network, steps, has_room, tell)


def not_finite(request: Request, step: int) -> TurbodiffError:
    """The error for latents that are no longer numbers."""
    what = f"the latents are not numbers any more after step {step} of {request.steps}"
    advice = "--attention dense; if it stays, turbodiff models verify"
    options = {"got": request.attention, "expected": "finite latents", "try_instead": advice}
    return TurbodiffError(what, code="nan_latents", field="attention", **options)


def begin_shared(
    ranks: Ranks, plan: Plan, expert: Expert, text: TextRows, condition: Tensor | None, against: TextRows | None,
    guidance: float, attention: AttentionPlan, levers: Levers, features: Tensor | None,
) -> None:  # fmt: skip
    """Have the followers make the network that this process makes; see runtime/shared_work.py."""
    negatives = (None, None) if against is None else (against.rows, against.bias)
    tensors = (text.rows, text.bias, *negatives, condition, features)
    plan = plan.model_copy(update={"levers": levers})
    how = {"expert": expert, "attention": attention.kind, "guidance": guidance}
    ranks.tell("denoise", tensors, plan=plan.model_dump(mode="json"), **how)


class Network:
    """An expert at work on one clip: holds what does not change from step to step, and a call is one evaluation.

    Args:
        text: the prompt's rows.
        condition: of image to video, [1, 20, T, H, W].
        negative: rows of a negative prompt; with them every velocity is a guided one, of two passes.
        levers: chunks of the feed-forward, and whether blocks keep the keys and values of the text.
        features: of the picture, [1, tokens, image_dim], where the network attends to it.
        elastic: repeats what ran out of memory, with fewer blocks on the device.
        parallel: this process' place among those that share the clip; all of them make the same calls.
    """

    def __init__(
        self, placed: PlacedDit, device: torch.device, text: TextRows, condition: Tensor | None = None,
        negative: TextRows | None = None, guidance: float = 1.0, attention: AttentionPlan = DENSE,
        levers: Levers = LEVERS, features: Tensor | None = None, elastic: Elastic | None = None,
        parallel: SequenceParallel | None = None,
    ) -> None:  # fmt: skip
        self._elastic, self._parallel = elastic, parallel
        self.dit, self._blocks = placed.dit, placed.blocks
        self._device, self._guidance, self._attention, self._ffn_chunks = device, guidance, attention, levers.ffn_chunks
        keep = levers.text_keys == "kept"
        self._condition = None if condition is None else offload.to_device(condition, device)
        picture = None if features is None else offload.to_device(features, device)
        self._picture = self.run(partial(placed.dit.embed_picture, picture, keep))
        self._rope: tuple[Tensor, Tensor] | None = None

        def embed() -> list[tuple[CrossAttentionCache, Tensor | None]]:
            return [
                (
                    CrossAttentionCache(placed.dit.embed_text(offload.to_device(prompt.rows, device)), keep),
                    None if prompt.bias is None else offload.to_device(prompt.bias, device),
                )
                for prompt in ((text,) if negative is None else (text, negative))
            ]

        self._texts = self.run(embed)

    def __call__(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity float32 of latents [1, 16, T, H, W] at timesteps [1, 1] (x1000)."""
        dit = self.dit
        if self._rope is None:
            t, h, w = (size // patch for size, patch in zip(latents.shape[2:], PATCH, strict=True))
            table = partial(rope_tables, t, h, w, dit.config.head_dim, device=self._device)
            self._rope = self.run(table)
        time_embedding, velocities = self.run(partial(dit.embed_time, timesteps)), []
        for context, bias in self._texts:
            prepare = partial(
                dit.prepare, latents, timesteps, context, self._condition, self._picture, attention=self._attention,
                context_bias=bias, rope=self._rope, time=time_embedding, parallel=self._parallel,
            )  # fmt: skip
            x, inputs = self.run(prepare)
            for index in range(len(self._blocks)):
                x = self.run(partial(self._block, x, inputs, index, set()))
            velocities.append(self.run(partial(dit.finish, x, inputs)))
            del x, inputs  # before the second pass makes its own
        velocity, *negative = velocities
        return unipc.guided(velocity, negative[0], self._guidance) if negative else velocity

    def _block(self, x: Tensor, inputs: BlockInputs, index: int, added: set[int]) -> Tensor:
        tokens: Tensor = self._blocks[index](x, inputs, index, self._ffn_chunks, added)
        return tokens

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, repeated where it may be."""
        return work() if self._elastic is None else self._elastic.run(work)

    @property
    def settings(self) -> tuple[object, ...]:
        """What a velocity depends on beside tensors, and which of these there are."""
        biased = [bias is not None for _, bias in self._texts]
        given = self._condition is not None, self._picture is not None, *biased
        return self._attention, self._ffn_chunks, self._guidance, given

    def clip_tensors(self) -> list[Tensor]:
        """What a velocity is made of beside weights, latents and timestep, once there was one: in the same order for
        every clip of one shape and of the same settings."""
        caches = [text for text, _ in self._texts] + ([self._picture] if self._picture else [])
        made = [t for cache in caches for index in sorted(cache.keys_values) for t in cache.keys_values[index]]
        given = [self._condition, *(bias for _, bias in self._texts), *(cache.context for cache in caches)]
        return [t for t in (*(self._rope or ()), *given, *made) if t is not None]

    def weights_at(self) -> tuple[int, ...] | None:
        """Where every weight lies on the device; None where blocks pass through it."""
        if self._blocks.resident < len(self._blocks):
            return None
        return tuple([tensor.data_ptr() for tensor in offload.tensors_of(self.dit)])

    def alone(self) -> "Network":
        """The same, but it looks after no neighbour while it computes."""
        alone = copy.copy(self)
        alone._elastic = None
        return alone
