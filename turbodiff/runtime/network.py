"""A transformer at work on one clip: what is computed once per clip, and a velocity for every step."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from turbodiff.models.attention import AttentionPlan, rope_tables
from turbodiff.models.wan_dit import PATCH, CrossAttentionCache, WanDiT
from turbodiff.runtime import offload
from turbodiff.runtime.embeddings import TextRows
from turbodiff.sampling.unipc import guided
from turbodiff.spec.plan import Levers


class Network:
    """One expert: `placed` brings it to the device, `begin` starts a clip, a call is one evaluation."""

    def __init__(self, dit: WanDiT, device: torch.device, attention: AttentionPlan, levers: Levers) -> None:
        self._dit, self._device, self._attention, self._levers = dit, device, attention, levers
        self._blocks: Iterable[nn.Module] = dit.blocks
        self._clip: dict[str, Any] = {}
        self._texts: list[tuple[CrossAttentionCache, Tensor | None]] = []
        self._guidance = 1.0

    @contextmanager
    def placed(self, *, stay: bool, alone: bool = True) -> Iterator[None]:
        """On the device, whole or as a stream of blocks; off it again at the end, unless it may stay.

        Where it is not `alone`, a stream leaves no pinned copies: host memory has room for one expert's.
        """
        with ExitStack() as stack:
            if self._levers.experts == "streamed":
                stream = offload.BlockStream(self._dit.blocks, self._device, self._levers.blocks_resident, keep=alone)
                rest = [child for name, child in self._dit.named_children() if name != "blocks"]
                stack.enter_context(offload.placed(nn.ModuleList(rest), self._device))
                stack.enter_context(stream)
                self._blocks = stream
            else:
                stack.enter_context(offload.placed(self._dit, self._device, stay=stay))
            try:
                yield
            finally:
                self._clip, self._texts, self._blocks = {}, [], self._dit.blocks

    @property
    def passing(self) -> Sequence[nn.Module]:
        """What streamed blocks pass through, beside the network itself; empty where it is there whole."""
        return self._blocks.slots if isinstance(self._blocks, offload.BlockStream) else ()

    def begin(
        self, text: TextRows, condition: Tensor | None, negative: TextRows | None = None, guidance: float = 1.0
    ) -> None:
        """Take in the words and the picture of a clip; with a negative prompt every velocity is a guided one."""
        self._texts = [self._take_in(text)] + ([] if negative is None else [self._take_in(negative)])
        self._guidance = guidance
        self._clip = {
            "condition": None if condition is None else offload.to_device(condition, self._device),
            "rope": None,
        }

    def _take_in(self, text: TextRows) -> tuple[CrossAttentionCache, Tensor | None]:
        context = CrossAttentionCache(self._dit.embed_text(offload.to_device(text.rows, self._device)))
        return context, None if text.bias is None else offload.to_device(text.bias, self._device)

    def __call__(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity float32 of latents [1, 16, T, H, W] at timesteps [1, 1] (x1000)."""
        if self._clip["rope"] is None:
            grid = [size // patch for size, patch in zip(latents.shape[2:], PATCH, strict=True)]
            self._clip["rope"] = rope_tables(*grid, self._dit.config.head_dim, device=self._device)
        time = self._dit.embed_time(timesteps)
        velocity, *negative = [self._evaluate(latents, timesteps, time, *text) for text in self._texts]
        return guided(velocity, negative[0], self._guidance) if negative else velocity

    def _evaluate(
        self,
        latents: Tensor,
        timesteps: Tensor,
        time: tuple[Tensor, Tensor],
        text: CrossAttentionCache,
        bias: Tensor | None,
    ) -> Tensor:
        x, inputs = self._dit.prepare(
            latents, timesteps, text, attention=self._attention, context_bias=bias, time=time, **self._clip
        )
        for index, block in enumerate(self._blocks):
            x = block(x, inputs, index, self._levers.ffn_chunks)
        return self._dit.finish(x, inputs)
