"""What a plan's phases allocate, counted on meta tensors by running the real modules: no device, no weights, no maths.

Two blocks stand for all (what a block needs does not depend on how many follow). Weights are counted from the modules,
activations from the ledger; library scratch and the CUDA context are not seen here.

The ledger counts live bytes without a device. On meta tensors it is the dry run that the memory plan's formulas are
held to; with a cap it is the small device of the tests, which raises torch.OutOfMemoryError as the real allocator
would. Temporaries inside one operation are not seen, unless the ledger is told of them.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from turbodiff.memory_lab.allocator_model import Allocation
from turbodiff.models import vae as vae_driver
from turbodiff.models.attention import AttentionPlan, rope_tables
from turbodiff.models.wan_dit import CrossAttentionCache, WanDiT
from turbodiff.runtime.model_cache import dit_config
from turbodiff.spec.attention import AttentionKind
from turbodiff.spec.models import ModelSpec, VaeFacts
from turbodiff.spec.plan import Plan
from turbodiff.spec.shapes import CONDITION_CHANNELS, VideoShape

BLOCKS = 2
GRAIN_BYTES = 512  # the CUDA caching allocator rounds every block up to this
META = torch.device("meta")


# name of an operator -> bytes that it holds while it runs, or its pieces, or the function that runs in its place
Inside = Mapping[str, "int | tuple[int, ...] | Callable[..., object]"]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storage of every tensor that an operation returns, until it dies.

    `device_type`: only tensors there ("meta", "cpu", "cuda"), None for all. `inside`: bytes that operators of these
    names ("turbodiff::sage_attention") hold for themselves while they run, or what they are made of.
    """

    def __init__(
        self, device_type: str | None = None, cap_bytes: int | None = None, inside: Inside | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.cap_bytes, self._inside = device_type, cap_bytes, inside or {}
        self.live_bytes = self.peak_bytes = 0
        self.events: list[Allocation] = []  # everything in order, for a replay (memory_lab/streams.py)
        self.passes: list[list[int]] = []  # of each pass of a network how many there were before its blocks and after
        self._numbers = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = self._inside.get(func.name(), ())
        if callable(inside):
            with self:
                result = inside(*args, **(kwargs or {}))
            return result if func._schema.returns else None  # an operator cannot hand out what it was given
        held = [(self.take(size), size) for size in ((inside,) if isinstance(inside, int) else inside) if size]
        try:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_iter(out):
                if isinstance(tensor, Tensor):
                    self.see(tensor)
        finally:
            for number, size in held:
                self.give_back(number, size)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it dies.

        Raises:
            torch.OutOfMemoryError: the cap is reached.
        """
        if self.device_type is not None and tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = -(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES
        number = self.take(size)
        self._known.add(storage)
        weakref.finalize(storage, self.give_back, number, size)

    def see_module(self, module: nn.Module) -> None:
        """Count a network's parameters and buffers."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.see(tensor)

    def reset_peak(self) -> None:
        """Start a new phase: the peak falls to what is live."""
        self.peak_bytes = self.live_bytes

    def take(self, size: int) -> int:
        """Count bytes as live; the number of this allocation."""
        if self.cap_bytes is not None and self.live_bytes + size > self.cap_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes; {self.live_bytes} of {self.cap_bytes} are in use."
            )
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._numbers += 1
        self.events.append(Allocation(self._numbers, size))
        return self._numbers

    def give_back(self, number: int, size: int) -> None:
        """Count bytes as dead."""
        self.live_bytes -= size
        self.events.append(Allocation(number, -size))


def dry_run(plan: Plan) -> dict[str, int]:
    """Activation bytes of the phases that have a dry run (denoise*, image_encode, vae_decode), by phase name."""
    request, levers = plan.request, plan.levers
    spec, dtype = request.spec, torch.float32 if plan.device == "cpu" else torch.bfloat16
    traced: dict[str, int] = {}
    for name in (phase.name for phase in plan.phases):
        if name.startswith("denoise"):
            traced[name] = denoise_bytes(
                spec, request.shape, dtype, int8=request.quant_linear == "on", chunks=levers.ffn_chunks,
                attention=cast("AttentionKind", request.attention), forwards=2 if request.guided else 1,
                keep_text=levers.text_keys == "kept",
            )  # fmt: skip
        elif name in ("vae_decode", "image_encode"):
            decode = name == "vae_decode"
            traced[name] = vae_bytes(spec, request.shape, dtype, levers.tile, decode=decode)
    return traced


def denoise_bytes(
    spec: ModelSpec, shape: VideoShape, dtype: torch.dtype, *, int8: bool, chunks: int,
    attention: AttentionKind = "dense", inside: Inside | None = None,
    change: Callable[[WanDiT], object] | None = None, blocks: int = BLOCKS, forwards: int = 1, keep_text: bool = True,
) -> int:  # fmt: skip
    """Peak beside the weights of a forward pass after the first, with the state that the sampler keeps meanwhile.

    Args:
        inside: what the attention operators hold for themselves (see Ledger); a dry run cannot see it.
        change: changes the network first, as LoRAs do.
        blocks: how many really run; the others only keep their text.
        forwards: passes of a step, each with a text of its own: 2 under guidance.
        keep_text: blocks keep the keys and values of the text.
    """
    ledger = denoise_ledger(
        spec, shape, dtype, int8=int8, chunks=chunks, attention=attention, inside=inside, change=change, blocks=blocks,
        forwards=forwards, keep_text=keep_text,
    )  # fmt: skip
    rows = forwards * spec.text_encoder.text_len + (spec.image_encoder.tokens if spec.image_encoder else 0)
    kept_per_block = 2 * rows * spec.dit.dim * dtype.itemsize
    return ledger.peak_bytes + (spec.dit.num_layers - blocks) * kept_per_block * keep_text


def denoise_ledger(
    spec: ModelSpec, shape: VideoShape, dtype: torch.dtype, *, int8: bool, chunks: int,
    attention: AttentionKind, inside: Inside | None, change: Callable[[WanDiT], object] | None, blocks: int,
    forwards: int = 1, keep_text: bool = True,
) -> Ledger:  # fmt: skip
    """The ledger of two steps through so many blocks, see `denoise_bytes`; weights are not in it."""
    facts, latent = spec.dit, shape.latent
    config = replace(dit_config(spec, quant_linear=int8, sla=spec.turbo), num_layers=blocks)
    how = AttentionPlan(attention)
    with META:
        dit = WanDiT(config).to(dtype)
        if change is not None:
            change(dit)
    with counted(dit, inside) as ledger:
        state = [torch.empty(1, *latent, dtype=torch.float64) for _ in range(3)]  # x, velocity, clean estimate
        rows = (1, spec.text_encoder.text_len, facts.dim)
        texts = [CrossAttentionCache(torch.empty(rows, dtype=dtype), keep_text) for _ in range(forwards)]
        condition = torch.empty(1, CONDITION_CHANNELS, *latent[1:]) if spec.kind == "i2v" else None
        clip = spec.image_encoder
        features = torch.empty(1, clip.tokens, clip.dim, dtype=dtype) if clip else None
        picture = dit.embed_picture(features, keep_text)
        rope = rope_tables(*latent.patch_grid, facts.head_dim)
        for _ in range(2):
            ledger.reset_peak()
            velocities = []
            for text in texts:
                x, inputs = dit.prepare(
                    state[0].float(), torch.empty(1, 1), text, condition, picture, attention=how, rope=rope
                )
                marks = [len(ledger.events)]
                for index, block in enumerate(dit.blocks):
                    x = block(x, inputs, index, chunks)
                    marks.append(len(ledger.events))
                ledger.passes.append(marks)
                velocities.append(dit.finish(x, inputs))
                del x, inputs
            del velocities
    return ledger


def vae_bytes(spec: ModelSpec, shape: VideoShape, dtype: torch.dtype, tile: int | None, *, decode: bool) -> int:
    """Peak beside the weights of decoding a whole clip, or of encoding the picture and the empty frames after it.

    `tile`: side in latent pixels, None for the whole picture.
    """
    return vae_ledger(spec.vae, shape, dtype, tile, decode=decode).peak_bytes


def vae_ledger(facts: VaeFacts, shape: VideoShape, dtype: torch.dtype, tile: int | None, *, decode: bool) -> Ledger:
    """The ledger of what `vae_bytes` says; weights are not in it."""
    with META:
        vae = vae_driver.make_vae(**facts.model_dump()).to(dtype)
    with counted(vae) as ledger:
        if decode:
            for chunk in vae_driver.decode_stream(vae, torch.empty(1, *shape.latent), tile=tile):
                vae_driver.frames_to_uint8(chunk)
        else:
            vae_driver.encode(vae, torch.empty(1, 3, *shape, dtype=dtype), tile=tile)
    return ledger


@contextmanager
def counted(module: torch.nn.Module, inside: Inside | None = None) -> Iterator[Ledger]:
    """A ledger over meta tensors that knows the module's weights and leaves them out of its figures."""
    ledger = Ledger("meta", inside=inside)
    ledger.see_module(module)
    weights_bytes = ledger.live_bytes
    ledger.events.clear()
    with torch.inference_mode(), ledger, META:
        yield ledger
    ledger.peak_bytes -= weights_bytes
